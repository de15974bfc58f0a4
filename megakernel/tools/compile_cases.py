"""What compile_check compiles: models as their users call them, without storage."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megakernel.config import FLOAT32, SHIPPED, KernelConfig, default_height
from megakernel.experts import Experts
from megakernel.launch.call import Call, make_spec
from megakernel.launch.collect import (
    MoEOutput,
    combine_call,
    given_call,
    routed_call,
    rows_call,
)
from megakernel.plan.buffers import Rows, Slots
from megakernel.plan.forward import STAGES
from megakernel.plan.spec import KernelSpec
from megakernel.tools.compile_backward import for_purpose
from megakernel.tools.models import KIND_OF_MODEL, KINDS, MODELS, ModelShape

ROUTES = ("live", "given", "replay")
# One model also with its experts in slots (copies take turns, or the caller names the slot), with
# its tasks timed, in stages, with each lever moved, and in float32.
ONE_MODEL = "Qwen3-30B-A3B"
ROUTE_OF_SPLIT = {"even": "live", "slot": "given"}
NUM_SLOTS_OVER_EXPERTS, MAX_COPIES = 32, 4
TOKENS_OF_PHASE = {"decode": (1, 8, 64), "prefill": (1024, 8192, 32768)}
# What may be tuned without a change of bits, and the values that are compiled beside each shipped
# config's own.
LEVERS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("column_groups", (1,)),
    ("tile_group", (1,)),
    ("num_stages", (2,)),
    ("blocks_per_task", (1, 2)),
    ("look_ahead", (False,)),
    ("fast_sigmoid", (False,)),
    ("half_tails", (True,)),
    ("cache_hints", (True,)),
)
# In float32 also the models whose router and experts are of other kinds, and the height that a
# replay brings along which was prepared for 16-bit weights.
FLOAT32_CALLS = (
    *((ONE_MODEL, route) for route in ROUTES),
    ("gpt-oss-120b", "live"),
    ("DeepSeek-V3 routed", "live"),
)
# Every model with its router, and those whose parts are of different kinds in every way.
KINDS_TRAINED = (ONE_MODEL, "gpt-oss-120b", "DeepSeek-V3 routed")
TRAINED = (
    *((model_name, "live", "backward") for model_name in MODELS),
    *((model_name, "replay", "backward") for model_name in KINDS_TRAINED),
    *((model_name, "given", "backward") for model_name in KINDS_TRAINED),
    *((ONE_MODEL, "replay", purpose) for purpose in ("frozen", "anew", "added")),
    ("DeepSeek-V3 routed", "live", "anew"),
    *((model_name, "live", "saving") for model_name in KINDS_TRAINED),
    (ONE_MODEL, "replay", "saving"),
)
TALL_FLOAT32 = replace(FLOAT32, block_rows=SHIPPED["rows128"].block_rows)


@dataclass(frozen=True)
class CompileCase:
    """One compilation.

    Attributes:
        name: of the config; a shipped one's own name, or what is different in it.
        config: how the launch is cut.
        model: sizes of the layer.
        route: of ROUTES, where the routing comes from.
        kind: key of KINDS, what the layer computes.
        split: see KernelSpec.
        stages: see KernelSpec; "rows" and "combine" are of a replay.
        dtype: of tokens and weights.
        purpose: of PURPOSES, what the launch is for.
    """

    name: str
    config: KernelConfig
    model: ModelShape
    route: str
    kind: str = "plain"
    split: str = "one"
    stages: str = "layer"
    dtype: torch.dtype = torch.bfloat16
    purpose: str = "forward"

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
            if self.name in {default_height(T * top_k, num_experts) for T in counts}
        ]

    def __str__(self) -> str:
        marks = [self.name, f"for {self.model.name}, {self.route}, split {self.split}"]
        marks[1:1] = ["(timed)"] if self.config.record_times else []
        marks[1:1] = [f"({self.stages})"] if self.stages != "layer" else []
        marks[1:1] = [f"({self.purpose})"] if self.purpose != "forward" else []
        return " ".join(marks)


def compile_cases() -> list[CompileCase]:
    """Return every case: the layers of the shipped configs, and for one model also the rest."""
    forward = [*layer_cases(), *slot_cases(), *stage_cases(), *lever_cases(), *float32_cases()]
    return [*forward, *training_cases()]


def figure_cases() -> list[CompileCase]:
    """Return the cases whose figures are compared: one model's layers, live and replayed."""
    return [
        case
        for case in compile_cases()
        if case.model.name == ONE_MODEL
        and case.route in ("live", "replay")
        and (case.split, case.stages, case.config.record_times) == ("one", "layer", False)
        and case.purpose in ("forward", "saving", "backward")
    ]


def layer_cases() -> list[CompileCase]:
    """Return every shipped config for every named model and route, and timed for one model."""
    every = [
        _case(name, config, model_name, route)
        for model_name in MODELS
        for name, config in SHIPPED.items()
        for route in ROUTES
    ]
    timed = {name: replace(config, record_times=True) for name, config in SHIPPED.items()}
    return every + [_case(name, config, ONE_MODEL, "live") for name, config in timed.items()]


def slot_cases() -> list[CompileCase]:
    """Return the shipped configs with the experts in slots."""
    return [
        _case(name, config, ONE_MODEL, route, split=split)
        for name, config in SHIPPED.items()
        for split, route in ROUTE_OF_SPLIT.items()
    ]


def stage_cases() -> list[CompileCase]:
    """Return the shipped configs in launches of one stage each."""
    return [
        _case(name, config, ONE_MODEL, "replay", stages=stages)
        for name, config in SHIPPED.items()
        for stages in STAGES
        if stages != "layer"
    ]


def lever_cases() -> list[CompileCase]:
    """Return the shipped configs with one lever moved.

    Those of one block per task stay so: their loops have no register left for several.
    """
    return [
        _case(f"{name} {lever}={value}", replace(config, **{lever: value}), ONE_MODEL, "live")
        for name, config in SHIPPED.items()
        for lever, values in LEVERS
        for value in values
        if getattr(config, lever) != value
        and (lever, config.blocks_per_task) != ("blocks_per_task", 1)
    ]


def float32_cases() -> list[CompileCase]:
    """Return the config for float32 in all routes."""
    cases = [_case("float32", FLOAT32, *call) for call in FLOAT32_CALLS]
    cases.append(_case("float32 block_rows=128", TALL_FLOAT32, ONE_MODEL, "replay"))
    return [replace(case, dtype=torch.float32) for case in cases]


def training_cases() -> list[CompileCase]:
    """Return what training launches: for each model saving and all gradients, the rest for some.

    A backward sorts ids into rows or has tables, and goes on to a router or does not: live and
    replay with it, given without.
    """
    configs = {**SHIPPED, "float32": FLOAT32}
    return [
        _case(name, config, model_name, route, purpose=purpose, dtype=_dtype_of(name))
        for name, config in configs.items()
        for model_name, route, purpose in TRAINED
        if name in ("rows128", "float32") or model_name in KINDS_TRAINED
    ]


def _dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name == "float32" else torch.bfloat16


def _case(
    name: str, config: KernelConfig, model_name: str, route: str, **more: Any
) -> CompileCase:
    kind = KIND_OF_MODEL[model_name]
    return CompileCase(name, config, MODELS[model_name], route, kind, **more)


def make_call(case: CompileCase, num_tokens: int = 1) -> Call:
    """Return a call without storage: shapes, dtypes and alignment of a real one."""
    return for_purpose(make_forward_call(case, num_tokens), case.purpose)


def make_forward_call(case: CompileCase, num_tokens: int) -> Call:
    """Return the forward that a case is or belongs to."""
    model, T = case.model, num_tokens
    router, experts = (_in_dtype(one, case.dtype) for one in KINDS[case.kind](model))
    x_TH, y_TH = (_meta(T, model.hidden, dtype=case.dtype) for _ in range(2))
    shape_TK = T, model.top_k
    ids_TK = _meta(*shape_TK, dtype=torch.int32)
    gate_TK = _meta(*shape_TK, dtype=torch.float32)
    if case.stages != "layer":
        return make_stage_call(case, x_TH, ids_TK, experts)
    slots = Slots() if case.split == "one" else make_slots(model.num_experts)
    places = slots, case.split, ids_TK if case.split == "slot" else None
    if case.route == "given":
        return given_call(x_TH, ids_TK, gate_TK, experts, places, y_TH, case.config)
    weight_EH = _meta(model.num_experts, model.hidden, dtype=case.dtype)
    out = MoEOutput(
        y_TH, ids_TK, gate_TK, _meta(T, model.num_experts, dtype=torch.float32),
        _meta(model.num_experts, dtype=torch.int32),
    )  # fmt: skip
    rows = make_rows(case, ids_TK) if case.route == "replay" else None
    return routed_call(x_TH, weight_EH, router, experts, out, places, rows, case.config)


def make_stage_call(case: CompileCase, x_TH: Tensor, ids_TK: Tensor, experts: Experts) -> Call:
    """Return a call of one stage of a replay of one row tile."""
    y_CH = _meta(case.config.block_rows, case.model.hidden, dtype=case.dtype)
    if case.stages == "rows":
        return rows_call(x_TH, ids_TK, make_rows(case, ids_TK), experts, y_CH, case.config)
    gate_TK = _meta(*ids_TK.shape, dtype=torch.float32)
    return combine_call(y_CH, ids_TK, gate_TK, torch.empty_like(x_TH), case.config)


def make_rows(case: CompileCase, ids_TK: Tensor) -> tuple[Rows, int]:
    """Return the tables of a replay of one row tile."""
    table = _meta(1, dtype=torch.int32)
    return Rows(ids_TK, _meta(case.config.block_rows, dtype=torch.int32), table, table), 1


def make_slots(num_experts: int) -> Slots:
    """Return the tables of a placement with some replicas."""
    num_slots = num_experts + NUM_SLOTS_OVER_EXPERTS
    shapes = ((num_slots,), (num_slots,), (num_experts,), (num_experts, MAX_COPIES))
    return Slots(*(_meta(*shape, dtype=torch.int32) for shape in shapes))


def _in_dtype(record: Any, dtype: torch.dtype) -> Any:
    """Return a record of bfloat16 tensors, and of such records, in another dtype."""
    if isinstance(record, Tensor):
        return record.to(dtype) if record.dtype == torch.bfloat16 else record
    if not is_dataclass(record) or isinstance(record, type):
        return record
    parts = {one.name: getattr(record, one.name) for one in fields(record) if one.init}
    return replace(record, **{name: _in_dtype(part, dtype) for name, part in parts.items()})


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
