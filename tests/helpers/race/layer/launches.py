"""Launches the race check watches: each dialect of the kernel, small, with a reason."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megakernel import (
    Experts,
    KernelConfig,
    Placement,
    Router,
    SharedExpert,
    moe,
    moe_routed,
    prepare_replay,
)
from megakernel.launch.call import Call
from megakernel.plan.buffers import Buffers
from tests.helpers.race.layer.backwards import call_backward, run_forward
from tests.helpers.race.layer.parts import call_part

# Small enough to be quick, large enough that every counter is awaited for more than one signal:
# three token tiles, two blocks of bins, two of I, two of H in each of two column groups.
CONFIG = KernelConfig(
    num_workers=1, block_rows=16, block_i=16, block_h=16, step=32, block_tokens=16,
    block_experts=64, select_tokens=16, combine_tokens=16, column_groups=2, tile_group=2,
    blocks_per_task=1,
)  # fmt: skip
T, K, E, H, I = 35, 2, 36, 64, 32
USED = (0, 3, 34)  # experts of the routing: few, for few row tiles, in both blocks of bins


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch: a routing, a layer, a cut.

    ``route`` is "live", "given" or "replay"; ``split`` is "one", "even" or "slot"; ``stages`` is
    "layer", "rows", "combine" or "backward", of a layer whose forward is not watched.
    """

    name: str
    reason: str
    route: str = "live"
    split: str = "one"
    stages: str = "layer"
    tokens: int = T
    num_experts: int = E
    widths: tuple[int, int] = (H, I)
    dtype: torch.dtype = torch.float32
    shared_width: int = 0
    biased: bool = False
    router: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    save: str = "preactivations"
    asks: tuple[
        str, ...
    ] = ()  # what has a gradient, by dotted name; all that can have one if none
    is_added: bool = False  # whether gradients of expert weights are added to what is there
    absent: int = 0  # choices of the first tokens that are -1, where ids are given
    sampled: bool = False  # whether ``make test`` watches it
    kept: list[Buffers] = field(default_factory=list, init=False)  # what a backward works from

    def call(self, num_workers: int = 1) -> Any:
        """Make the launch, and return its outputs."""
        config = replace(CONFIG, num_workers=num_workers, **self.config)
        if self.stages == "backward":
            return call_backward(self, config)
        if self.stages != "layer":
            return call_part(self, config)
        layer, placement = self.layer, self.placement
        if self.route == "given":
            gate_TK = torch.full((self.tokens, K), 0.5)
            return moe_routed(
                layer.x_TH, self.ids_TK, gate_TK, layer.experts, placement=placement, config=config
            )
        replay = None
        if self.route == "replay":
            replay = prepare_replay(self.ids_TK, self.num_experts, placement, config)
        return moe(
            layer.x_TH, layer.router_EH, layer.experts, layer.router, replay=replay,
            placement=placement, config=config,
        )  # fmt: skip

    @cached_property
    def layer(self) -> "Layer":
        """The tensors, the same at every call."""
        return make_layer(self)

    def kept_of(self, forward: Call) -> Buffers:
        """Return what a forward leaves for its backward, the same at every call."""
        if not self.kept:
            self.kept.append(run_forward(forward))
        return self.kept[0]

    @property
    def used(self) -> tuple[int, ...]:
        """The experts of the routing."""
        return USED if self.num_experts == E else (0, 1, self.num_experts - 1)

    @cached_property
    def ids_TK(self) -> Tensor:
        """The ids where they are given."""
        token = torch.arange(self.tokens)
        ids_TK = torch.stack([token % 2, token % 2 + 1], 1)
        ids_TK = torch.tensor(self.used)[ids_TK]
        ids_TK.view(-1)[: self.absent] = -1
        return ids_TK.int()

    @cached_property
    def placement(self) -> Placement | None:
        """Reversed experts, an empty slot, and copies of two used experts."""
        if self.split == "one":
            return None
        expert_of_P = torch.tensor([*reversed(range(E)), -1, USED[0], USED[2], USED[0]])
        slot_of_E = torch.tensor([int((expert_of_P == e).nonzero()[-1]) for e in range(E)])
        named_TK = slot_of_E[self.ids_TK.clamp(min=0).long()] if self.split == "slot" else None
        return Placement(expert_of_P, named_TK)


@dataclass(frozen=True, eq=False)
class Layer:
    """Tensors of a launch."""

    x_TH: Tensor
    router_EH: Tensor
    experts: Experts
    router: Router


def make_layer(launch: Launch) -> Layer:
    """Draw a layer whose router prefers the used experts."""
    generator = torch.Generator().manual_seed(3)
    (hidden, intermediate), num_experts = launch.widths, launch.num_experts

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(launch.dtype)

    x_TH = draw(launch.tokens, hidden)
    router_EH = draw(num_experts, hidden)
    if launch.route == "live" and launch.split != "slot":
        x_TH[:, 0] = 1.0
        router_EH[list(launch.used), 0] += 10.0
    shared = None
    if launch.shared_width:
        up_JH, down_HJ = draw(launch.shared_width, hidden), draw(hidden, launch.shared_width)
        shared = SharedExpert(draw(launch.shared_width, hidden), up_JH, down_HJ, draw(1, hidden))
    biases = (
        (draw(num_experts, 2 * intermediate), draw(num_experts, hidden))
        if launch.biased
        else (None, None)
    )
    weights = draw(num_experts, 2 * intermediate, hidden), draw(num_experts, hidden, intermediate)
    router = dict(launch.router)
    if launch.biased:
        router |= {"bias_E": draw(num_experts), "correction_bias_E": draw(num_experts)}
    return Layer(x_TH, router_EH, Experts(*weights, *biases, shared=shared), Router(K, **router))


LAUNCHES = [
    Launch("live", "every kind of task, every counter", sampled=True),
    Launch("given", "no gate: ids are checked, weights read", "given"),
    Launch("given-some-absent", "choices without an expert", "given", absent=5),
    Launch("given-even", "copies take turns", "given", "even"),
    Launch("given-slot", "bins are slots", "given", "slot", sampled=True),
    Launch("replay", "row tables are inputs, the gate comes after FFN1", "replay", sampled=True),
    Launch("replay-even", "tables of a placement", "replay", "even"),
    Launch("replay-nobody", "no row tile at all", "replay", absent=2 * T),
    Launch("rows", "experts without a combine", "given", stages="rows"),
    Launch("rows-slot", "bins are slots, the list ends with FFN2", "given", "slot", stages="rows"),
    Launch("rows-replay", "nothing but experts", "replay", stages="rows"),
    Launch("rows-shared", "shared rows among them", "given", stages="rows", shared_width=24),
    Launch("combine", "one kind of task, no wait at all", "replay", stages="combine"),
    Launch("live-even", "copies take turns, the gate counts experts", split="even"),
    Launch("shared", "shared tiles need no tables", shared_width=80),
    Launch("shared-replay", "the combine waits for the token gate", "replay", shared_width=24,
           sampled=True),
    Launch("shared-given", "the gate tasks weigh the shared expert", "given", shared_width=24),
    Launch("capacity", "scatter takes choices back", router={"capacity": 9}, sampled=True),
    Launch("random-second", "the gate takes choices back", router={"random_second_seed": 5}),
    Launch("biased", "everything that can be added", biased=True),
    Launch("groups", "sigmoid scores, choice in two steps", router={
        "score": "sigmoid", "num_groups": 4, "top_groups": 2, "renormalize": False}),
    Launch("one-token", "below every tile", tokens=1, sampled=True),
    Launch("one-group", "no combine between the FFN2 tasks", config={"column_groups": 1}),
    Launch("four-groups", "a column group of one block", config={"column_groups": 4}),
    Launch("odd-widths", "no descriptors, masks everywhere", widths=(37, 19)),
    Launch("bfloat16", "elements of two bytes", dtype=torch.bfloat16),
    Launch("select-in-parts", "a gate task selects twice", config={"block_tokens": 32}),
    Launch("wide", "tasks of two blocks, and of one in the last column group",
           widths=(144, 64), sampled=True,
           config={"blocks_per_task": 2, "least_tasks": 1, "column_groups": 3}),
    Launch("wide-replay", "such tasks of a replay, one column group", "replay", widths=(80, 48),
           config={"blocks_per_task": 2, "least_tasks": 1, "column_groups": 1}),
    Launch("half-tails", "row tiles that are half empty", config={"half_tails": True}),
    Launch("no-look-ahead", "claims and row tables after the waits", config={"look_ahead": False}),
    Launch("timed", "a launch that writes times", config={"record_times": True}),
    Launch("timed-replay", "a replay that writes times", "replay", config={"record_times": True}),
]  # fmt: skip

# Two token tiles, few experts of which one is empty, two blocks of each width.
BACK: dict[str, Any] = {
    "stages": "backward",
    "tokens": 20,
    "num_experts": 4,
    "widths": (32, 32),
}
BACKWARDS = [
    Launch("backward", "rows made, every gradient of a routed layer", **BACK, sampled=True),
    Launch("backward-replay", "row tables are inputs", "replay", **BACK),
    Launch("backward-nothing", "FFN1 runs again", "replay", save="nothing", **BACK),
    Launch("backward-given", "no router: gradients of given weights", "given", absent=5, **BACK),
    Launch("backward-shared", "a shared expert of two slices, a token gate, FFN1 again",
           shared_width=40, save="nothing", **BACK),
    Launch("backward-biased", "biases of experts and router", "replay", biased=True, **BACK),
    Launch("backward-added", "gradients of expert weights are added", "replay", is_added=True,
           **BACK),
    Launch("backward-x", "weights are frozen: no dDown for dx to stand among", "replay",
           asks=("x_TH",), **BACK),
    Launch("backward-router", "all but the router is frozen", asks=("router.weight_EH",), **BACK),
    Launch("backward-weights", "nothing but gradients of expert weights", "replay",
           asks=("experts.gate_up_E2IH", "experts.down_EHI"), **BACK),
    Launch("backward-wide", "tasks of several blocks of H", "replay",
           **BACK | {"widths": (48, 32)}, config={"blocks_per_task": 2}),
    Launch("backward-dropped", "choices over capacity", router={"capacity": 9}, **BACK),
    Launch("backward-odd", "masks everywhere", **BACK | {"widths": (37, 19)}),
    Launch("backward-bfloat16", "elements of two bytes", dtype=torch.bfloat16, **BACK),
    Launch("backward-one-token", "below every tile", **BACK | {"tokens": 1}),
    Launch("backward-nobody", "no row tile at all", "replay", absent=2 * T, **BACK),
    Launch("backward-timed", "a launch that writes times", config={"record_times": True}, **BACK),
    Launch("backward-many-experts", "two blocks of bins", **BACK | {"num_experts": E},
           asks=("x_TH", "experts.gate_up_bias_E2I"), biased=True),
]  # fmt: skip
LAUNCHES += BACKWARDS
