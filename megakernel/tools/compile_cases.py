"""What compile_check compiles: models as their users call them, without storage."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megakernel.config import SHIPPED, KernelConfig, default_height
from megakernel.launch.call import Call, make_spec
from megakernel.launch.collect import MoEOutput, given_call, routed_call
from megakernel.plan.buffers import Rows, Slots
from megakernel.plan.spec import KernelSpec
from megakernel.tools.models import KIND_OF_MODEL, KINDS, MODELS, ModelShape

ROUTES = ("live", "given", "replay")
# One model also with its experts in slots: copies take turns, or the caller names the slot. And
# with its tasks timed.
ONE_MODEL = "Qwen3-30B-A3B"
ROUTE_OF_SPLIT = {"even": "live", "slot": "given"}
NUM_SLOTS_OVER_EXPERTS, MAX_COPIES = 32, 4
TOKENS_OF_PHASE = {"decode": (1, 8, 64), "prefill": (1024, 8192, 32768)}


@dataclass(frozen=True)
class CompileCase:
    """One compilation.

    Attributes:
        config_name: of a shipped config.
        model: sizes of the layer.
        route: of ROUTES, where the routing comes from.
        kind: key of KINDS, what the layer computes.
        split: see KernelSpec.
        timed: whether the launch keeps its tasks' times.
    """

    config_name: str
    model: ModelShape
    route: str
    kind: str = "plain"
    split: str = "one"
    timed: bool = False

    @property
    def config(self) -> KernelConfig:
        return replace(SHIPPED[self.config_name], record_times=self.timed)

    @property
    def spec(self) -> KernelSpec:
        """What the compiler must know; cases with equal specs compile to the same code."""
        return replace(make_spec(make_call(self)), interpreted=False)

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
        return f"{self.config_name} for {self.model.name}, {self.route}, split {self.split}{timed}"


def compile_cases() -> list[CompileCase]:
    """Return every shipped config for every named model and route; for one model also the rest."""
    every = [
        CompileCase(config_name, model, route, KIND_OF_MODEL[model.name])
        for model in MODELS.values()
        for config_name in SHIPPED
        for route in ROUTES
    ]
    model, kind = MODELS[ONE_MODEL], KIND_OF_MODEL[ONE_MODEL]
    for config_name in SHIPPED:
        every += [
            CompileCase(config_name, model, route, kind, split)
            for split, route in ROUTE_OF_SPLIT.items()
        ]
        every.append(CompileCase(config_name, model, "live", kind, timed=True))
    return every


def make_call(case: CompileCase, num_tokens: int = 1) -> Call:
    """Return a bfloat16 call without storage: shapes, dtypes and alignment of a real one."""
    model, T = case.model, num_tokens
    router, experts = KINDS[case.kind](model)
    x_TH, y_TH = _meta(T, model.hidden), _meta(T, model.hidden)
    shape_TK = T, model.top_k
    ids_TK = _meta(*shape_TK, dtype=torch.int32)
    gate_TK = _meta(*shape_TK, dtype=torch.float32)
    slots = Slots() if case.split == "one" else make_slots(model.num_experts)
    places = slots, case.split, ids_TK if case.split == "slot" else None
    if case.route == "given":
        return given_call(x_TH, ids_TK, gate_TK, experts, places, y_TH, case.config)
    weight_EH = _meta(model.num_experts, model.hidden)
    out = MoEOutput(
        y_TH, ids_TK, gate_TK, _meta(T, model.num_experts, dtype=torch.float32),
        _meta(model.num_experts, dtype=torch.int32),
    )  # fmt: skip
    rows = make_rows(case, ids_TK) if case.route == "replay" else None
    return routed_call(x_TH, weight_EH, router, experts, out, places, rows, case.config)


def make_rows(case: CompileCase, ids_TK: Tensor) -> tuple[Rows, int]:
    """Return the tables of a replay of one row tile."""
    table = _meta(1, dtype=torch.int32)
    return Rows(ids_TK, _meta(case.config.block_rows, dtype=torch.int32), table, table), 1


def make_slots(num_experts: int) -> Slots:
    """Return the tables of a placement with some replicas."""
    num_slots = num_experts + NUM_SLOTS_OVER_EXPERTS
    shapes = ((num_slots,), (num_slots,), (num_experts,), (num_experts, MAX_COPIES))
    return Slots(*(_meta(*shape, dtype=torch.int32) for shape in shapes))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
