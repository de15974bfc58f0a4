"""A backend of the shape that Megatron-Core builds in place of dispatch, experts and combine.

Megatron routes; this class takes its dense probabilities and map. One device holds all experts.
Gradients reach the parameters of the expert modules, the probabilities and the tokens; with
``gradient_accumulation_fusion`` those of expert weights go straight into ``param.main_grad``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megakernel.adapters.main_grad import ParametersMainGrad, WithPlaceholder, main_grad_of
from megakernel.adapters.modules import local
from megakernel.adapters.weights import in_place, pack_stacked, read_stacked
from megakernel.api import moe_routed
from megakernel.config import KernelConfig
from megakernel.experts import Experts
from megakernel.placement import Placement

LINEARS = ("linear_fc1", "linear_fc2")

# Fields of TransformerConfig, with the only value this kernel computes.
FIELDS = {
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "moe_mlp_glu_interleave_size": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_shared_expert_overlap": False,
    "expert_tensor_parallel_size": 1,
    "fp8": None,
    "fp4": None,
}


class MegatronMegakernel(nn.Module):
    """Routed and shared experts of one Megatron-Core MoE layer, the routed ones in one launch.

    Has the arguments of Megatron-Core's ``build_megakernel_backend`` and the ``forward`` of its
    ``MegakernelBackend``. Parameters stay with the expert modules and appear in no ``state_dict``
    of this class. They are read in place when an expert's weights follow those of the expert
    before (``moe_single_grouped_weight``, or after :meth:`pack`), and copied at each call if not.

    Args:
        config: a TransformerConfig, or anything with the fields it is asked for.
        ep_group: unused; there is one rank.
        routed_experts: module with ``linear_fc1`` and ``linear_fc2`` (TEGroupedMLP) or
            ``local_experts`` (SequentialMLP).
        shared_experts: called beside the launch by PyTorch; None for none.
        num_local_experts: E.
        top_k: most experts of a token, K; None for ``config.moe_router_topk``.
        kernel_config: how to cut the work; None for the default of each call.
        placement: experts in slots; None for the identity.
        save: "preactivations" or "nothing", what the forward keeps for the backward.

    Raises:
        ValueError: naming the field of ``config`` that the kernel can not compute.
    """

    def __init__(
        self,
        config: Any,
        ep_group: Any,
        routed_experts: nn.Module,
        shared_experts: nn.Module | None,
        num_local_experts: int,
        *,
        top_k: int | None = None,
        kernel_config: KernelConfig | None = None,
        placement: Placement | None = None,
        save: str = "preactivations",
    ) -> None:
        super().__init__()
        check_fields(config, num_local_experts)
        self.fuses_gradients = bool(getattr(config, "gradient_accumulation_fusion", False))
        self.top_k = config.moe_router_topk if top_k is None else top_k
        self.num_experts = num_local_experts
        self.kernel_config = kernel_config
        self.placement = placement
        self.save = save
        # In a tuple, which registers nothing: the layer that owns them saves and moves them.
        self.owned_elsewhere = (routed_experts, shared_experts)

    def forward(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        """Run the experts that Megatron's router has chosen.

        Args:
            hidden_states: [.., H], dtype of the weights; T tokens.
            probs: [T, E] float routing weights.
            routing_map: [T, E] bool, at most K experts per token.

        Returns:
            [.., H], shared experts added.

        Raises:
            ValueError: on a bad shape; for a token with more than K experts (on a GPU by the next
                call, since looking would synchronise); where gradients can not be fused, naming
                the linear.
        """
        routed_experts, shared_experts = self.owned_elsewhere
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        expert_of_TK, gate_TK = compact(probs, routing_map, self.top_k)
        y_TH = moe_routed(
            x_TH,
            expert_of_TK,
            gate_TK,
            self.read_experts(routed_experts),
            placement=self.placement,
            config=self.kernel_config,
            save=self.save,
        )
        y = y_TH.view(hidden_states.shape)
        return y if shared_experts is None else y + shared_experts(hidden_states)

    def read_experts(self, routed_experts: Any) -> Experts:
        """Return the weights as they are now, and where their gradients go."""
        both = [parameters_of(routed_experts, linear, self.num_experts) for linear in LINEARS]
        gate_up, down = map(read_weight, both)
        trained = {parameter.requires_grad for parameters in both for parameter in parameters}
        if not (self.fuses_gradients and torch.is_grad_enabled() and True in trained):
            return Experts(gate_up, down)
        if False in trained:
            raise ValueError(
                "requires_grad must be the same for all expert weights with "
                "gradient_accumulation_fusion, got True for some"
            )
        buffers = [main_grad_of(linear, p) for linear, p in zip(LINEARS, both, strict=True)]
        main_grad = ParametersMainGrad([*both[0], *both[1]], *buffers)
        gate_up, down = map(WithPlaceholder.apply, (gate_up, down))
        return Experts(gate_up, down, main_grad=main_grad)

    def pack(self) -> None:
        """Move each linear's expert weights into one block, so that calls read them in place.

        Call it before Megatron's DDP or an optimizer flattens the parameters.
        """
        for linear in LINEARS:
            parameters = parameters_of(self.owned_elsewhere[0], linear, self.num_experts)
            if len(parameters) > 1:
                pack_stacked(parameters)


def check_fields(config: Any, num_local_experts: int) -> None:
    """Raise ValueError on a configuration that the kernel does not compute, naming the field."""
    for name, computed in FIELDS.items():
        value = getattr(config, name, computed)  # fields come and go between versions
        if value != computed:
            raise ValueError(f"{name} must be {computed!r}, got {value!r}")
    if getattr(config.activation_func, "__name__", "") != "silu":
        raise ValueError(f"activation_func must be silu, got {config.activation_func!r}")
    if num_local_experts != config.num_moe_experts:
        raise ValueError(
            f"num_local_experts must be num_moe_experts={config.num_moe_experts}, as there is no "
            f"expert parallelism yet, got {num_local_experts}"
        )


def compact(probs_TE: Tensor, routing_map_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Turn dense routing into a list for each token, without a host synchronisation.

    Args:
        probs_TE: float routing weights.
        routing_map_TE: bool, which experts serve each token.
        top_k: K, most experts of a token.

    Returns:
        expert_of_TK: int64 ids in rising order, then -1. A token with more than K experts gets
            the id E first, which the layer refuses.
        gate_TK: weights of the ids.

    Raises:
        ValueError: on another shape, or a map that is not bool.
    """
    if routing_map_TE.dtype != torch.bool or routing_map_TE.shape != probs_TE.shape:
        raise ValueError(
            f"routing_map must be bool of the shape of probs, {tuple(probs_TE.shape)}, "
            f"got {routing_map_TE.dtype} {tuple(routing_map_TE.shape)}"
        )
    num_experts = probs_TE.shape[1]
    countdown_E = torch.arange(num_experts, 0, -1, device=probs_TE.device)
    best_TK = (routing_map_TE * countdown_E).topk(top_k, dim=1).values
    expert_of_TK = torch.where(best_TK > 0, num_experts - best_TK, -1)
    gate_TK = probs_TE.gather(1, expert_of_TK.clamp(min=0))
    too_many_T = routing_map_TE.sum(1) > top_k
    expert_of_TK[:, 0] = torch.where(too_many_T, num_experts, expert_of_TK[:, 0])
    return expert_of_TK, gate_TK


def parameters_of(routed_experts: Any, linear: str, num_experts: int) -> list[Any]:
    """Return the parameters of one of the experts' linears: one for each expert, or one for all.

    Raises:
        ValueError: when the module holds another number of experts; for a DTensor.
    """
    if hasattr(routed_experts, "local_experts"):  # SequentialMLP
        found = [getattr(e, linear).weight for e in routed_experts.local_experts]
    elif hasattr(getattr(routed_experts, linear), "weight0"):  # TEGroupedMLP
        owner = getattr(routed_experts, linear)
        found = [getattr(owner, f"weight{e}") for e in range(num_experts)]
    else:  # TEGroupedMLP with moe_single_grouped_weight
        found = [getattr(routed_experts, linear).weight]
    held = len(found) if found[0].ndim == 2 else len(found[0])
    if held != num_experts:
        raise ValueError(f"{linear} must hold {num_experts} experts, got {held}")
    return [local(parameter) for parameter in found]


def read_weight(parameters: list[Any]) -> Tensor:
    """Return parameters as one weight [E, X, Y]: in place where they lie in a row, else copied."""
    first = parameters[0]
    if first.ndim == 2:
        return read_stacked(parameters)
    data = getattr(first, "rowwise_data", None)  # where Transformer Engine keeps it
    if data is None:
        return first
    return in_place(data.view(first.shape), lambda gradient: [gradient], parameters)
