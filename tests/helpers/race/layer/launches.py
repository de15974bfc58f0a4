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
    "layer", "rows" or "combine".
    """

    name: str
    reason: str
    route: str = "live"
    split: str = "one"
    stages: str = "layer"
    tokens: int = T
    widths: tuple[int, int] = (H, I)
    dtype: torch.dtype = torch.float32
    shared_width: int = 0
    biased: bool = False
    router: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    absent: int = 0  # choices of the first tokens that are -1, where ids are given
    sampled: bool = False  # whether ``make test`` watches it

    def call(self, num_workers: int = 1) -> Any:
        """Make the launch, and return its outputs."""
        config = replace(CONFIG, num_workers=num_workers, **self.config)
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
            replay = prepare_replay(self.ids_TK, E, placement, config)
        return moe(
            layer.x_TH, layer.router_EH, layer.experts, layer.router, replay=replay,
            placement=placement, config=config,
        )  # fmt: skip

    @cached_property
    def layer(self) -> "Layer":
        """The tensors, the same at every call."""
        return make_layer(self)

    @cached_property
    def ids_TK(self) -> Tensor:
        """The ids where they are given."""
        token = torch.arange(self.tokens)
        ids_TK = torch.stack([token % 2, token % 2 + 1], 1)
        ids_TK = torch.tensor(USED)[ids_TK]
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
    hidden, intermediate = launch.widths

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(launch.dtype)

    x_TH = draw(launch.tokens, hidden)
    router_EH = draw(E, hidden)
    if launch.route == "live" and launch.split != "slot":
        x_TH[:, 0] = 1.0
        router_EH[list(USED), 0] += 10.0
    shared = None
    if launch.shared_width:
        up_JH, down_HJ = draw(launch.shared_width, hidden), draw(hidden, launch.shared_width)
        shared = SharedExpert(draw(launch.shared_width, hidden), up_JH, down_HJ, draw(1, hidden))
    biases = (draw(E, 2 * intermediate), draw(E, hidden)) if launch.biased else (None, None)
    weights = draw(E, 2 * intermediate, hidden), draw(E, hidden, intermediate)
    router = dict(launch.router)
    if launch.biased:
        router |= {"bias_E": draw(E), "correction_bias_E": draw(E)}
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
