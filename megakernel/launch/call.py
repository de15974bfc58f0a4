"""One call of the layer: its tensors by owner, its rules and its integers; checked before."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megakernel.config import KernelConfig
from megakernel.formats import Dense
from megakernel.launch.fences import needs_fences, numbers_of
from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.buffers import Buffers
from megakernel.plan.order import INTERPRETED
from megakernel.plan.rules import ExpertRule, GradientRule, RouterRule, WeightRule
from megakernel.plan.spec import KernelSpec

# Fields of a config that the compiler must know, which a spec has under the same names.
COMPILED_FIELDS = (
    "block_rows", "block_i", "block_h", "step", "block_tokens", "block_experts", "select_tokens",
    "combine_tokens", "column_groups", "tile_group", "blocks_per_task", "least_tasks",
    "look_ahead", "half_tails", "cache_hints", "num_stages",
)  # fmt: skip


@dataclass(frozen=True)
class CallRule:
    """What a call is, apart from its tensors: hashable, and text under torch.compile.

    Attributes:
        stages, route, split: see KernelSpec.
        router, expert: what they compute.
        transposed: whether the experts' weights are ``mT`` of contiguous tensors.
        config: how to cut the work.
    """

    stages: str
    route: str
    split: str
    router: RouterRule
    expert: ExpertRule
    transposed: bool
    config: KernelConfig


@dataclass(frozen=True, eq=False)
class Call:
    """One call's arguments, checked.

    Attributes:
        buffers: tensors; scratch, control and descriptors are the launch's to add.
        rule: what the call is.
        num_tiles: row tiles of a replay, without those of the shared expert; 0 otherwise.
        capacity, seed: of the router, 0 where it has none.
        is_added: whether gradients of expert weights are added to what is there.
    """

    buffers: Buffers
    rule: CallRule
    num_tiles: int = 0
    capacity: int = 0
    seed: int = 0
    is_added: int = 0

    @property
    def tokens(self) -> Tensor:
        """A tensor with a row per token: the layer's input, or its output where that is all."""
        tokens = self.buffers.y_TH if self.buffers.x_TH is None else self.buffers.x_TH
        assert tokens is not None
        return tokens


def flattens_well(version: str) -> bool:
    """Say whether a version of Triton can flatten a loop over products.

    From 3.8.0 on it may lay the shared memory of several such loops side by side, and then spills:
    with gpt-oss's biases, or with low tails, the kernel would not fit.

    Args:
        version: as ``triton.__version__`` has it.
    """
    return numbers_of(version) < (3, 8)


class LayerSizes(NamedTuple):
    """What a spec takes from the shapes of a call's tensors."""

    top_k: int
    num_experts: int
    num_slots: int
    max_copies: int
    hidden: int
    intermediate: int
    shared_width: int


def sizes_of(b: Buffers) -> LayerSizes:
    """Read the sizes off the tensors; what a call does not have is 1, a shared expert 0 wide."""
    top_k = 1 if b.routing.expert_of_TK is None else b.routing.expert_of_TK.shape[1]
    if b.experts.down_EHI is None:  # the combine of given rows
        assert b.y_TH is not None and b.rows.row_of_TK is not None
        return LayerSizes(b.rows.row_of_TK.shape[1], 1, 1, 1, b.y_TH.shape[1], 1, 0)
    num_experts, hidden, intermediate = b.experts.down_EHI.shape
    slots = b.slots
    return LayerSizes(
        top_k,
        num_experts,
        num_experts if slots.expert_of_P is None else slots.expert_of_P.shape[0],
        1 if slots.slots_of_EV is None else slots.slots_of_EV.shape[1],
        hidden,
        intermediate,
        0 if b.shared.up_JH is None else b.shared.up_JH.shape[0],
    )


def make_spec(call: Call) -> KernelSpec:
    """Collect what the compiler must know."""
    b, rule = call.buffers, call.rule
    if b.experts.down_EHI is None:
        return _make_spec(rule, sizes_of(b), None, None)
    assert b.experts.gate_up_E2IH is not None
    config, expert = rule.config, rule.expert
    block = config.block_i * expert.rows_per_column
    gate_up = Dense(b.experts.gate_up_E2IH, rule.transposed)
    down = Dense(b.experts.down_EHI, rule.transposed)
    return _make_spec(
        rule,
        sizes_of(b),
        gate_up.rule(expert.stacked, block, config.block_rows),
        down.rule(1, config.block_h, config.block_rows),
        config.fast_sigmoid and call.tokens.dtype == torch.bfloat16,
        asked_of(b) if rule.stages == "backward" else None,
    )


def asked_of(b: Buffers) -> GradientRule:
    """Return which gradients a backward call has places for, and what it works from."""
    places = b.gradients
    return GradientRule(
        x=places.x_TH is not None,
        router=places.router_weight_EH is not None,
        router_bias=places.router_bias_E is not None,
        gate_up=places.gate_up_E2IH is not None,
        down=places.down_EHI is not None,
        gate_up_bias=places.gate_up_bias_E2I is not None,
        down_bias=places.down_bias_EH is not None,
        gates=places.gate_TK is not None,
        shared_gate=places.shared_gate_JH is not None,
        shared_up=places.shared_up_JH is not None,
        shared_down=places.shared_down_HJ is not None,
        token_gate=places.token_gate_1H is not None,
        weighs=b.router.weight_EH is not None,
        token_gated=b.shared.token_gate_1H is not None,
        recomputes=b.saved.z_A2I is None,
    )


@lru_cache(maxsize=1024)
def _make_spec(
    rule: CallRule,
    sizes: LayerSizes,
    gate_up: WeightRule | None,
    down: WeightRule | None,
    fast_sigmoid: bool = False,
    asked: GradientRule | None = None,
) -> KernelSpec:
    compiled = {name: getattr(rule.config, name) for name in COMPILED_FIELDS}
    kind = KernelSpec if asked is None else partial(BackwardSpec, gradients=asked)
    return kind(
        stages=rule.stages,
        route=rule.route,
        split=rule.split,
        router=rule.router,
        expert=rule.expert,
        gate_up=gate_up,
        down=down,
        fast_sigmoid=fast_sigmoid,
        timed=rule.config.record_times,
        fenced=needs_fences(triton.__version__),
        flattened=flattens_well(triton.__version__),
        interpreted=INTERPRETED,
        **sizes._asdict(),
        **compiled,
    )
