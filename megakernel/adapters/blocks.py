"""A transformers sparse block as one launch: subclasses that keep parameters, keys and hooks."""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from megakernel.adapters.families import Family, check_shared, family_of, read_shared
from megakernel.adapters.modules import check_experts_module, local, read_experts, unwrap
from megakernel.adapters.state import LayerState
from megakernel.api import MoEOutput, moe, moe_routed
from megakernel.experts import Experts


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
        check_own(gate, family.gate)
        if self.training and getattr(self, "jitter_noise", 0.0) > 0.0:
            raise ValueError(
                f"router_jitter_noise must be 0 in training, got {self.jitter_noise}: the launch "
                "adds no noise"
            )
        router, replay = family.router(gate), state.choose_replay()
        out = moe(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            local(gate.weight),
            self.read_experts(),
            router,
            replay=replay,
            placement=state.placement if replay is None else None,
            config=state.config,
            save=state.save,
        )
        state.record(out.expert_of_TK, out.gate_TK)
        if gate._forward_hooks:  # transformers records router_logits by a hook on the gate
            routed = as_router_output(out, hidden_states, router.score)
            gate(tap=lambda _: routed)
        y = out.y_TH.view(hidden_states.shape)
        return (y, out.gate_TK) if family.returns_weights else y

    def read_experts(self) -> Experts:
        """Return the weights as they are now, also those of a wrapper around the experts.

        peft puts LoRA on parameters by a wrapper that changes them while it calls the module
        inside, so the module is asked for them in such a call.

        Raises:
            ValueError: for experts or shared experts that were replaced or wrapped otherwise.
        """
        check_shared(self, self.family)
        check_own(unwrap(self.experts), "experts")
        shared = read_shared(self, self.family)

        def read(experts: Any) -> Experts:
            return read_experts(experts, shared)

        is_wrapped = unwrap(self.experts) is not self.experts
        return self.experts(None, tap=read) if is_wrapped else read(self.experts)


def check_own(module: Any, name: str) -> None:
    """Raise ValueError unless a module is the one that the block was fused with."""
    if not hasattr(type(module), "is_tap"):
        raise ValueError(
            f"fuse_gate must be False with another {name} than the model's own, "
            f"got {type(module).__name__}"
        )


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
def tap_class(module_class: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a gate or of experts that a call can ask for something else.

    What looks for the module by ``isinstance`` or by name still finds it.
    """

    class Tap(module_class):  # type: ignore[misc, valid-type]
        is_tap = True

        def forward(
            self, *arguments: Any, tap: Callable[[Any], Any] | None = None, **options: Any
        ) -> Any:
            return super().forward(*arguments, **options) if tap is None else tap(self)

    Tap.__name__ = module_class.__name__
    return Tap


def fuse(block: Any, state: LayerState) -> None:
    """Turn a sparse block into one launch, in place; an already fused one gets the new state."""
    if not isinstance(block, FusedBlock):
        family = family_of(block)
        replaced: type[nn.Module] = type(block)
        for module in (getattr(block, family.gate), unwrap(block.experts)):
            module.__class__ = tap_class(type(module))  # type: ignore[arg-type]
        block.__class__ = fused_class(replaced)  # type: ignore[arg-type]
        block.family, block.replaced = family, replaced
    block.megakernel = state


def unfuse(block: Any) -> None:
    """Undo :func:`fuse`."""
    if hasattr(block, "replaced"):
        for module in (getattr(block, block.family.gate), unwrap(block.experts)):
            module.__class__ = type(module).__mro__[1]
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
        ValueError: naming the flag, for experts that the kernel can not compute.
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
        save=state.save,
    )
