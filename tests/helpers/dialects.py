"""One small call for each thing a launch can be asked for, with the reason why it is there."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megakernel import Experts, Placement, Router, prepare_replay
from megakernel.experts import SharedExpert
from megakernel.launch.call import Call, make_spec
from megakernel.launch.collect import combine_call, rows_call
from megakernel.plan.buffers import Scratch
from megakernel.plan.schedule import count_row_tiles
from tests.helpers.cases import Case
from tests.helpers.inputs import SMALL, Inputs, make_inputs
from tests.helpers.specs import live_call, replay_call, routed_given_call

# Two blocks of I, three of H in two column groups, so that the last group ends in an empty block.
TINY = replace(SMALL, block_i=16, block_h=16)
HELD = torch.tensor([2, 0, 1, -1, 3, 0, 2, 0])  # copies, an empty slot, not in order


@dataclass(frozen=True)
class Dialect:
    """One call.

    Attributes:
        name, reason: for the reader.
        route, stages, split: see KernelSpec.
        sizes: of a Case, where they are not the usual ones.
        router: fields of Router beside top_k; a bias is drawn where it says True.
        experts: fields of Experts beside the weights; a bias is drawn where it says True.
        shared: its width and whether it has a token gate.
        dtype: of tokens and weights.
        router_dtype: of the router's weight, where it is another.
        skip: which ids are -1: "some", "all", or none.
        ids_dtype, gate_dtype: of a given routing.
        ties: whether experts 2n and 2n + 1 have equal logits.
    """

    name: str
    reason: str
    route: str = "live"
    stages: str = "layer"
    split: str = "one"
    sizes: dict[str, int] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    shared: tuple[int, bool] | None = None
    dtype: torch.dtype = torch.float32
    router_dtype: torch.dtype | None = None
    skip: str = ""
    ids_dtype: torch.dtype = torch.int32
    gate_dtype: torch.dtype = torch.float32
    ties: bool = False


OSS = {
    "activation": "clamped_swiglu", "interleaved": True, "limit": 0.7, "transposed": True,
    "gate_up_bias_E2I": True, "down_bias_EH": True,
}  # fmt: skip
GROUPS = {"num_groups": 4, "top_groups": 2}
ROUTES = ("live", "given", "replay")
HALF, BFLOAT = torch.float16, torch.bfloat16

DIALECTS = [
    Dialect("live", "the whole list"),
    Dialect("given", "no router", "given"),
    Dialect("given-wide", "int64 ids, 16-bit weights", "given", skip="some",
            ids_dtype=torch.int64, gate_dtype=BFLOAT),
    Dialect("replay", "no dispatch, weights late", "replay"),
    Dialect("one-token", "far below every tile", sizes={"T": 1}),
    Dialect("many-experts", "two prefix tasks, most experts empty", sizes={"E": 40, "T": 18}),
    Dialect("odd-widths", "H and I odd: masks everywhere", sizes={"H": 37, "I": 19}),
    Dialect("one-choice", "K = 1", sizes={"K": 1, "E": 3}),
    Dialect("ties", "pairs of experts with equal logits: the lower id first", ties=True),
    # Ids that are absent.
    Dialect("given-absent", "some choices without an expert", "given", skip="some"),
    Dialect("replay-absent", "a renormalised sum leaves them out", "replay", skip="some"),
    Dialect("given-nothing", "no row at all", "given", skip="all"),
    Dialect("replay-nothing", "no row at all, and weights of none", "replay", skip="all"),
    # Where experts lie.
    Dialect("live-even", "copies take turns", split="even"),
    Dialect("given-even", "copies take turns, some ids absent", "given", split="even",
            skip="some"),
    Dialect("replay-even", "rows of slots, made ahead", "replay", split="even"),
    Dialect("live-slot", "counted by slot, load by expert", split="slot"),
    Dialect("given-slot", "named slots, some ids absent", "given", split="slot", skip="some"),
    # How routers choose and weigh.
    Dialect("over-all", "softmax over all experts, scaled, biased",
            router={"renormalize": False, "scale": 2.5, "bias_E": True}),
    Dialect("over-all-replay", "the same, of given ids", "replay", skip="some",
            router={"renormalize": False, "scale": 2.5, "bias_E": True}),
    Dialect("sigmoid", "neither corrected nor renormalised", sizes={"E": 8},
            router={"score": "sigmoid", "renormalize": False}),
    Dialect("deepseek", "sigmoid, corrected, in groups, scaled", sizes={"E": 8},
            router={"score": "sigmoid", "correction_bias_E": True, "scale": 2.5, **GROUPS}),
    Dialect("sigmoid-replay", "renormalised over ids that are there", "replay", skip="some",
            router={"score": "sigmoid"}),
    Dialect("softmax-groups", "chosen by probability", sizes={"E": 8}, router=GROUPS),
    Dialect("groups-of-one", "a group's score is its only expert's",
            router={"num_groups": 4, "top_groups": 3}),
    Dialect("corrected", "softmax and a correction", router={"correction_bias_E": True}),
    Dialect("capacity", "later tokens lose a choice", router={"capacity": 11}),
    Dialect("capacity-even", "the limit is the expert's, not the copy's", split="even",
            router={"capacity": 11}),
    Dialect("random-second", "a draw per token", router={"random_second_seed": 12345}),
    Dialect("gshard", "a draw, then a capacity", split="even",
            router={"random_second_seed": 7, "capacity": 9}),
    Dialect("router-fp32", "a wider router than tokens", dtype=BFLOAT,
            router_dtype=torch.float32),
    # What experts compute.
    Dialect("gelu", "exact", experts={"activation": "gelu", "down_bias_EH": True}),
    Dialect("gelu-tanh", "by tanh", experts={"activation": "gelu_tanh"}),
    Dialect("relu", "with a gate, and a bias", experts={"activation": "relu",
            "gate_up_bias_E2I": True}),
    Dialect("nemotron", "no gate, squared relu, biases",
            experts={"activation": "relu2", "has_gate": False, "gate_up_bias_E2I": True}),
    Dialect("gpt-oss", "interleaved, transposed, clamped, biases", experts=OSS),
    Dialect("transposed", "gate rows and up rows in turned weights",
            experts={"transposed": True}),
    Dialect("bfloat16", "rounds to bfloat16 in between", dtype=BFLOAT),
    Dialect("float16", "rounds to float16 in between", "replay", dtype=HALF),
    # The shared expert: as wide as a routed one, of several slices, the last one short.
    *(Dialect(f"shared-{route}", "three slices, the last short, weighed per token", route,
              shared=(56, True)) for route in ROUTES),
    Dialect("shared-one", "one slice and no token gate, with copies", split="even",
            shared=(24, False)),
    Dialect("shared-no-gate", "up rows alone, narrower than a slice", "given",
            shared=(13, False), experts={"activation": "relu2", "has_gate": False}),
    Dialect("shared-alone", "no routed row", "given", shared=(56, True), skip="all"),
    # Stages of their own.
    Dialect("rows-replay", "the FFN of prepared rows", "replay", "rows"),
    Dialect("rows-replay-even", "rows of copies, in 16 bits", "replay", "rows", "even",
            dtype=BFLOAT, skip="some"),
    Dialect("rows-given", "dispatch and FFN", "given", "rows", skip="some"),
    Dialect("rows-given-slot", "dispatch to named slots and FFN", "given", "rows", "slot"),
    Dialect("combine", "rows from elsewhere", "replay", "combine", skip="some"),
    Dialect("combine-16", "16-bit rows and weights", "replay", "combine", dtype=BFLOAT,
            gate_dtype=BFLOAT),
]  # fmt: skip


def inputs_of(dialect: Dialect) -> tuple[Inputs, Router, Callable[..., Tensor]]:
    """Return a dialect's inputs, its router, and what draws further tensors."""
    sizes = {"T": 37, "K": 2, "E": 4, "H": 40, "I": 24} | dialect.sizes
    case = Case(dialect.name, reason=dialect.reason, dtype=dialect.dtype, **sizes)
    inputs = with_kind(make_inputs(case), dialect)
    draw = drawer(inputs)
    router = Router(
        case.K, **{name: value if value is not True else draw(torch.float32, case.E)
                   for name, value in dialect.router.items()}
    )  # fmt: skip
    return inputs, router, draw


def make_dialect(dialect: Dialect) -> Call:
    """Return the call of a dialect."""
    inputs, router, draw = inputs_of(dialect)
    case = inputs.case
    ids_TK = draw_ids(case, dialect.skip)
    if dialect.route == "live":
        ids_TK = choices_of(inputs)
    placement = place(dialect.split, ids_TK)
    if dialect.stages == "layer" and dialect.route == "live":
        return live_call(inputs, router=router, placement=placement, config=TINY)
    if dialect.route == "given":
        ids_TK, gate_TK = ids_TK.to(dialect.ids_dtype), draw(dialect.gate_dtype, *ids_TK.shape)
        call = routed_given_call(inputs, ids_TK, gate_TK, placement=placement, config=TINY)
        return rows_alone(call) if dialect.stages == "rows" else call
    replay = prepare_replay(ids_TK, case.E, placement, TINY)
    if dialect.stages == "layer":
        return replay_call(inputs, replay, router=router, config=TINY)
    y_CH = draw(case.dtype, replay.num_tiles * TINY.block_rows, case.H)
    if dialect.stages == "rows":
        tables = replay.rows, replay.num_tiles
        return rows_call(inputs.x_TH, ids_TK, tables, inputs.experts, y_CH, TINY)
    gate_TK, y_TH = draw(dialect.gate_dtype, *ids_TK.shape), torch.empty_like(inputs.x_TH)
    return combine_call(y_CH, replay.rows.row_of_TK, gate_TK, y_TH, TINY)


def choices_of(inputs: Inputs) -> Tensor:
    """Return the ids that a plain router chooses."""
    logits_TE = inputs.x_TH.double() @ inputs.router_EH.double().T
    return logits_TE.argsort(1, descending=True)[:, : inputs.case.K]


def drawer(inputs: Inputs) -> Callable[..., Tensor]:
    """Return a function that draws tensors of a dtype and shape, around a half in size."""
    generator = torch.Generator().manual_seed(1)

    def draw(dtype: torch.dtype, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / 2).to(dtype).to(inputs.x_TH.device)

    return draw


def with_kind(inputs: Inputs, dialect: Dialect) -> Inputs:
    """Return inputs whose experts and router are of the dialect's kind."""
    draw, dtype, options = drawer(inputs), dialect.dtype, dict(dialect.experts)
    gate_up, down = inputs.experts.gate_up_E2IH, inputs.experts.down_EHI
    if not options.get("has_gate", True):
        gate_up = gate_up.chunk(2, dim=1)[0].contiguous()
    for name, shape in (("gate_up_bias_E2I", gate_up.shape[:2]), ("down_bias_EH", down.shape[:2])):
        if options.get(name):
            options[name] = draw(torch.float32, *shape)
    if options.get("transposed"):
        gate_up, down = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
    if dialect.shared is not None:
        (J, weighs), H = dialect.shared, down.shape[1]
        gate_JH, up_JH, down_HJ = draw(dtype, J, H), draw(dtype, J, H), draw(dtype, H, J)
        gated = gate_JH if options.get("has_gate", True) else None
        token_gate_1H = draw(dtype, 1, H) if weighs else None
        options["shared"] = SharedExpert(gated, up_JH, down_HJ, token_gate_1H)
    router_EH = inputs.router_EH.to(dialect.router_dtype or dtype)
    if dialect.ties:
        router_EH = router_EH[::2].repeat_interleave(2, dim=0)
    return replace(inputs, router_EH=router_EH, experts=Experts(gate_up, down, **options))


def draw_ids(case: Case, skip: str) -> Tensor:
    """Return distinct int32 ids [T, K], some of them or all -1 if asked for."""
    generator = torch.Generator().manual_seed(2)
    ids_TK = torch.rand(case.T, case.E, generator=generator).argsort(1)[:, : case.K].int()
    if skip == "some":  # among them all choices of some tokens
        ids_TK[torch.rand(case.T, case.K, generator=generator) < 0.3] = -1
        ids_TK[5:7] = -1
    return torch.full_like(ids_TK, -1) if skip == "all" else ids_TK.contiguous()


def place(split: str, ids_TK: Tensor) -> Placement | None:
    """Return a placement with copies, or none; tokens name the copies in turn."""
    if split == "one":
        return None
    if split == "even":
        return Placement(HELD)
    named = [
        [slots_of(expert)[token % len(slots_of(expert))] for expert in experts]
        for token, experts in enumerate(ids_TK.tolist())
    ]
    return Placement(HELD, torch.tensor(named))


def slots_of(expert: int) -> list[int]:
    """Return the slots that hold an expert; any for an id that is absent."""
    return torch.eq(HELD, expert).nonzero().flatten().tolist()


def rows_alone(call: Call) -> Call:
    """Return the stages up to the experts' rows of a call whose routing is given."""
    call = replace(call, rule=replace(call.rule, stages="rows"))
    num_rows = TINY.block_rows * count_row_tiles(make_spec(call), len(call.tokens), None)
    y_CH = call.tokens.new_empty(num_rows, call.tokens.shape[1])
    routing = call.buffers.routing._replace(gate_TK=None)
    buffers = call.buffers._replace(routing=routing, scratch=Scratch(y_CH=y_CH), y_TH=None)
    return replace(call, buffers=buffers)
