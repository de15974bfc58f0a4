"""An override of torchtitan's routed experts: dispatch, experts and combine in one launch.

torchtitan routes and hands over ids and scores; one device holds all experts. Gradients reach its
weights, scores and tokens. Shape letters in signatures are torchtitan's: D is our H and F our I.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from megakernel.adapters.modules import local
from megakernel.adapters.weights import pack_gate_up, read_gate_up
from megakernel.api import moe_routed
from megakernel.config import KernelConfig
from megakernel.experts import Experts

LOCAL_DISPATCHER = "LocalTokenDispatcher"


@cache
def routed_experts_class(base: Any) -> Any:
    """Return a subclass of torchtitan's ``RoutedExperts`` that runs as one launch.

    Use its ``Config`` as an override of ``RoutedExperts.Config``. The class has attributes that
    are no configuration of torchtitan: ``kernel_config`` and ``placement``, both None, and
    ``save``, "preactivations", what a forward keeps for its backward.

    Args:
        base: ``torchtitan.models.common.moe.RoutedExperts``. Weights are those of its
            ``inner_experts`` (``w1_EFD``, ``w2_EDF``, ``w3_EFD``) or, later, its grouped linears
            ``w13`` and ``w2``.
    """

    class MegakernelRoutedExperts(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

        kernel_config: KernelConfig | None = None
        placement = None
        save = "preactivations"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            check_routed_experts(self)

        def forward(
            self,
            x_TD: Tensor,
            topk_scores_TK: Tensor,
            topk_expert_ids_TK: Tensor,
            num_local_tokens_per_expert_E: Tensor,
        ) -> Tensor:
            """Return out_TD; the counts are not needed, since the launch counts."""
            return moe_routed(
                x_TD,
                topk_expert_ids_TK,
                topk_scores_TK,
                read_routed_experts(self),
                placement=self.placement,
                config=self.kernel_config,
                save=self.save,
            )

        def pack(self) -> None:
            """Move gate and up weights together, so that calls read them in place."""
            if hasattr(self, "inner_experts"):
                pack_gate_up(self.inner_experts.w1_EFD, self.inner_experts.w3_EFD)

    return MegakernelRoutedExperts


def check_routed_experts(routed_experts: Any) -> None:
    """Raise ValueError for what the kernel does not compute, naming it."""
    dispatcher = routed_experts.token_dispatcher
    if type(dispatcher).__name__ != LOCAL_DISPATCHER:
        raise ValueError(
            f"token_dispatcher must be a {LOCAL_DISPATCHER}, as there is no expert parallelism "
            f"yet, got {type(dispatcher).__name__}"
        )
    if getattr(dispatcher, "score_before_experts", False):  # a field of older versions
        raise ValueError("score_before_experts must be False, got True")
    activation = type(getattr(routed_experts, "activation_fn", None)).__name__
    if activation not in ("NoneType", "SwiGLU"):  # without the field it is SwiGLU
        raise ValueError(f"activation_fn must be SwiGLU, got {activation}")


def read_routed_experts(routed_experts: Any) -> Experts:
    """Return the weights as they are now: in place if stacked or packed, else copied.

    Raises:
        ValueError: for a DTensor.
    """
    if hasattr(routed_experts, "inner_experts"):
        inner = routed_experts.inner_experts
        gate_EFD, up_EFD = local(inner.w1_EFD), local(inner.w3_EFD)
        return Experts(read_gate_up(gate_EFD, up_EFD), local(inner.w2_EDF))
    down_EDF = local(routed_experts.w2.weight)
    gate_up = local(routed_experts.w13.weight)  # [E, 2, F, D] or [E, 2F, D]
    return Experts(gate_up.view(len(down_EDF), -1, down_EDF.shape[1]), down_EDF)
