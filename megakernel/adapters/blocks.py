"""A transformers sparse block as one launch: subclasses that keep parameters, keys and hooks."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from megakernel.adapters.families import Family, family_of, read_shared
from megakernel.adapters.modules import check_experts_module, local, read_experts
from megakernel.api import MoEOutput, moe, moe_routed
from megakernel.config import KernelConfig
from megakernel.placement import Placement
from megakernel.replay import Replay


@dataclass
class LayerState:
    """What a layer does on top of its weights. Plain data: it is in no ``state_dict``.

    Attributes:
        config: how to cut the work; None for the default of each call.
        placement: experts in slots; None for the identity.
        replay: forced routing; None to route live.
        recorded: where (ids, weights) of each call go; None when nobody records.
    """

    config: KernelConfig | None = None
    placement: Placement | None = None
    replay: Replay | None = None
    recorded: list[tuple[Tensor, Tensor]] | None = None


class FusedBlock(nn.Module):
    """The part of a swapped block that differs from the class it was swapped in for."""

    family: Family
    replaced: type[nn.Module]
    megakernel: LayerState
    experts: nn.Module

    def forward(self, hidden_states: Tensor) -> Any:
        """Run gate, dispatch, experts, shared ones too, and combine as one launch."""
        state, family = self.megakernel, self.family
        gate: Any = getattr(self, family.gate)
        if self.training and getattr(self, "jitter_noise", 0.0) > 0.0:
            raise ValueError(
                f"router_jitter_noise must be 0 in training, got {self.jitter_noise}: the launch "
                "adds no noise"
            )
        router = family.router(gate)
        out = moe(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            local(gate.weight),
            read_experts(self.experts, read_shared(self, family)),
            router,
            replay=state.replay,
            placement=state.placement if state.replay is None else None,
            config=state.config,
        )
        if state.recorded is not None:
            state.recorded.append((out.expert_of_TK, out.gate_TK))
        if gate._forward_hooks:  # transformers records router_logits by a hook on the gate
            gate(routed=as_router_output(out, hidden_states, router.score))
        y = out.y_TH.view(hidden_states.shape)
        return (y, out.gate_TK) if family.returns_weights else y


def as_router_output(
    out: MoEOutput, hidden_states: Tensor, score: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits, weights, ids) as eager routers do: sigmoid gates work in float32."""
    logits = out.logits_TE if score == "sigmoid" else out.logits_TE.to(hidden_states.dtype)
    return logits, out.gate_TK, out.expert_of_TK.long()


@cache
def fused_class(block_class: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a block of this class becomes."""
    return type(f"Fused{block_class.__name__}", (FusedBlock, block_class), {})


@cache
def tap_class(router_class: type[nn.Module]) -> type[nn.Module]:
    """Return a router that can hand on a result: recorders find it by ``isinstance``."""

    class TapRouter(router_class):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor | None = None, routed: Any = None) -> Any:
            return super().forward(hidden_states) if routed is None else routed

    return TapRouter


def fuse(block: Any, state: LayerState) -> None:
    """Turn a sparse block into one launch, in place; an already fused one gets the new state."""
    if not isinstance(block, FusedBlock):
        family = family_of(block)
        replaced: type[nn.Module] = type(block)
        gate: nn.Module = getattr(block, family.gate)
        gate.__class__ = tap_class(type(gate))  # type: ignore[arg-type]
        block.__class__ = fused_class(replaced)  # type: ignore[arg-type]
        block.family, block.replaced = family, replaced
    block.megakernel = state


def unfuse(block: Any) -> None:
    """Undo :func:`fuse`."""
    if hasattr(block, "replaced"):
        gate = getattr(block, block.family.gate)
        gate.__class__ = type(gate).__mro__[1]
        block.__class__ = block.replaced
        del block.family, block.replaced, block.megakernel


def megakernel_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts as one launch, the gate being outside: transformers' experts interface.

    Args:
        self: the experts module.
        hidden_states: [T, H], dtype of the weights.
        top_k_index: [T, K] integer ids in [0, E).
        top_k_weights: [T, K] float, renormalised and scaled already.

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        ValueError: naming the flag, for experts that the kernel can not compute; when gradients
            are asked for.
    """
    check_experts_module(self)
    state = getattr(self, "megakernel", None) or LayerState()
    ids_TK = top_k_index
    if getattr(self, "_is_expert_parallel", False):  # ids of other ranks are E and more
        ids_TK = ids_TK.masked_fill(ids_TK >= self.num_experts, -1)
    return moe_routed(
        hidden_states,
        ids_TK,
        top_k_weights,
        read_experts(self),
        placement=state.placement,
        config=state.config,
    )
