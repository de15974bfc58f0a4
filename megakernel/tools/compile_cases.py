"""What compile_check compiles: models as their users call them, without storage."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megakernel.api import shared_arguments
from megakernel.config import SHIPPED, KernelConfig, default_height
from megakernel.device.kernel import Biases, Routing, Rows, Slots
from megakernel.experts import Router
from megakernel.launch.run import NO_SLOTS, Layer, make_spec
from megakernel.plan.spec import KernelSpec
from megakernel.tools.models import KIND_OF_MODEL, KINDS, MODELS, ModelShape

ROUTE_OF_MODE = {"live": "live", "routed": "given", "replay": "replay"}
# One model also with its experts in slots: copies take turns, or the caller names the slot. And
# with its tasks timed.
ONE_MODEL = "Qwen3-30B-A3B"
MODE_OF_SPLIT = {"even": "live", "slot": "routed"}
NUM_SLOTS_OVER_EXPERTS, MAX_COPIES = 32, 4
TOKENS_OF_PHASE = {"decode": (1, 8, 64), "prefill": (1024, 8192, 32768)}


@dataclass(frozen=True)
class CompileCase:
    """One compilation.

    Attributes:
        config_name: of a shipped config.
        model: sizes of the layer.
        mode: key of ROUTE_OF_MODE.
        kind: key of KINDS, what the layer computes.
        split: see KernelSpec.
        timed: whether the launch keeps its tasks' times.
    """

    config_name: str
    model: ModelShape
    mode: str
    kind: str = "plain"
    split: str = "one"
    timed: bool = False

    @property
    def config(self) -> KernelConfig:
        return replace(SHIPPED[self.config_name], record_times=self.timed)

    @property
    def spec(self) -> KernelSpec:
        """What the compiler must know; cases with equal specs compile to the same code."""
        route, router = ROUTE_OF_MODE[self.mode], make_router(self)
        spec = make_spec(make_layer(self), route, self.split, router.rule, self.config)
        return replace(spec, interpreted=False)

    @property
    def default_for(self) -> list[str]:
        """The phases in which this config is the default at a usual number of tokens."""
        top_k, num_experts = self.model.top_k, self.model.num_experts
        return [
            phase
            for phase, counts in TOKENS_OF_PHASE.items()
            if self.config_name in {default_height(T * top_k, num_experts) for T in counts}
        ]

    def __str__(self) -> str:
        timed = ", timed" if self.timed else ""
        return f"{self.config_name} for {self.model.name}, {self.mode}, split {self.split}{timed}"


def compile_cases() -> list[CompileCase]:
    """Return every shipped config for every named model and mode; for one model also the rest."""
    every = [
        CompileCase(config_name, model, mode, KIND_OF_MODEL[model.name])
        for model in MODELS.values()
        for config_name in SHIPPED
        for mode in ROUTE_OF_MODE
    ]
    model, kind = MODELS[ONE_MODEL], KIND_OF_MODEL[ONE_MODEL]
    for config_name in SHIPPED:
        every += [
            CompileCase(config_name, model, mode, kind, split)
            for split, mode in MODE_OF_SPLIT.items()
        ]
        every.append(CompileCase(config_name, model, "live", kind, timed=True))
    return every


def make_router(case: CompileCase) -> Router:
    """Return the router of a case; a given routing has none but the default."""
    router, _ = KINDS[case.kind](case.model)
    return Router(case.model.top_k) if case.mode == "routed" else router


def make_layer(case: CompileCase) -> Layer:
    """Return a bfloat16 layer without storage: shapes, dtypes and alignment of a real call."""
    model, router = case.model, make_router(case)
    _, experts = KINDS[case.kind](model)
    T = num_tiles = 1
    has_gate = case.mode != "routed"
    x_TH = _meta(T, model.hidden)
    routing = make_routing(case, T)
    table = _meta(num_tiles, dtype=torch.int32)
    rows_C = _meta(num_tiles * case.config.block_rows, dtype=torch.int32)
    rows = Rows(routing.expert_of_TK, rows_C, table, table)
    return Layer(
        x_TH,
        _meta(model.num_experts, model.hidden) if has_gate else None,
        experts.gate_up_E2IH,
        experts.down_EHI,
        routing,
        NO_SLOTS if case.split == "one" else make_slots(model.num_experts),
        rows if case.mode == "replay" else None,
        _meta(T, model.hidden),
        Biases(router.bias_E, router.correction_bias_E, *experts.biases),
        experts.rule,
        *shared_arguments(experts.shared, x_TH),
    )


def make_routing(case: CompileCase, num_tokens: int) -> Routing:
    """Return the routing's tensors: inputs and outputs as in the calls of the mode."""
    shape_TK, num_experts = (num_tokens, case.model.top_k), case.model.num_experts
    ids_TK = _meta(*shape_TK, dtype=torch.int32)
    has_gate = case.mode != "routed"
    return Routing(
        expert_of_TK=ids_TK,
        gate_TK=_meta(*shape_TK, dtype=torch.float32),
        logits_TE=_meta(num_tokens, num_experts, dtype=torch.float32) if has_gate else None,
        slot_of_TK=ids_TK if case.split == "slot" else None,
        load_E=_meta(num_experts, dtype=torch.int32) if case.mode == "live" else None,
    )


def make_slots(num_experts: int) -> Slots:
    """Return the tables of a placement with some replicas."""
    num_slots = num_experts + NUM_SLOTS_OVER_EXPERTS
    shapes = ((num_slots,), (num_slots,), (num_experts,), (num_experts, MAX_COPIES))
    return Slots(*(_meta(*shape, dtype=torch.int32) for shape in shapes))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
