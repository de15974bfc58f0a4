"""The gradients of the layer, by autograd through the reference: what the backward is held to."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import reference
from megakernel import Experts, Router
from reference import ExpertKind, Routing
from tests.helpers.dialects import DIALECTS, Dialect, draw_ids, inputs_of
from tests.helpers.inputs import Inputs

# Eager PyTorch keeps these in their own dtype where that is the wider one.
KEPT_WIDE = (
    "router.weight_EH",
    "router.bias_E",
    "routing.gate_TK",
    "experts.gate_up_bias_E2I",
    "experts.down_bias_EH",
)
LAYERS = [dialect for dialect in DIALECTS if dialect.stages == "layer"]
Gradients = dict[str, Tensor]


class Incoming(NamedTuple):
    """The gradients that come from above: of the output, and of what the router gives away."""

    y_TH: Tensor
    gate_TK: Tensor | None = None
    logits_TE: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """A dialect's inputs, its routing, and the gradients that come from above.

    Attributes:
        inputs: tokens, router weight and experts.
        router: how it chooses and weighs.
        expert_of_TK: integer: the given or replayed ids, or those chosen before any was dropped.
        given_TK: weights of a given routing.
        incoming: of y, in its dtype; of gates and logits float32, None for a given routing.
    """

    inputs: Inputs
    router: Router
    expert_of_TK: Tensor
    given_TK: Tensor | None
    incoming: Incoming

    def gradients(
        self, served_TK: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Gradients:
        """Return what :func:`oracle_moe` or :func:`oracle_routed` says, as the routing is."""
        x_TH, experts, incoming = self.inputs.x_TH, self.inputs.experts, self.incoming
        if self.given_TK is not None:
            routing = self.expert_of_TK, self.given_TK
            return oracle_routed(x_TH, *routing, experts, incoming.y_TH, dtype)
        return oracle_moe(
            x_TH, self.inputs.router_EH, experts, self.router, incoming.y_TH,
            expert_of_TK=self.expert_of_TK, served_TK=served_TK, dgate_TK=incoming.gate_TK,
            dlogits_TE=incoming.logits_TE, dtype=dtype,
        )  # fmt: skip


def make_problem(dialect: Dialect) -> Problem:
    """Return the problem of one of ``LAYERS``, of the tensors that ``make_dialect`` draws."""
    inputs, router, draw = inputs_of(dialect)
    case = inputs.case
    ids_TK = draw_ids(case, dialect.skip).to(dialect.ids_dtype)
    is_given = dialect.route == "given"
    given_TK = draw(dialect.gate_dtype, case.T, case.K) if is_given else None
    if dialect.route == "live":
        ids_TK = chosen_ids(inputs.x_TH, inputs.router_EH, router).int()
    dy_TH = draw(case.dtype, case.T, case.H)
    of_router = [None if is_given else draw(torch.float32, case.T, n) for n in (case.K, case.E)]
    return Problem(inputs, router, ids_TK, given_TK, Incoming(dy_TH, *of_router))


def oracle_moe(
    x_TH: Tensor,
    router_weight_EH: Tensor,
    experts: Experts,
    router: Router,
    dy_TH: Tensor,
    *,
    expert_of_TK: Tensor,
    served_TK: Tensor | None = None,
    dgate_TK: Tensor | None = None,
    dlogits_TE: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Gradients:
    """Return the gradients of a layer with its router, for ids that are given.

    Args:
        x_TH: tokens, any floating dtype.
        router_weight_EH: router.
        experts: weights and what they compute.
        router: how it weighs; choosing and dropping are skipped.
        dy_TH: gradient of the output.
        expert_of_TK: integer ids that the weights are computed over: the replayed ones, or those
            chosen before any was dropped (``chosen_ids``).
        served_TK: the same with -1 where a choice was dropped; None if none was.
        dgate_TK: gradient of the weights; None for zero.
        dlogits_TE: gradient of the logits; None for zero.
        dtype: of the computation: float64 for the truth, that of the tokens for eager's own error.

    Returns:
        gradients by name, as "experts.down_EHI", of each tensor that is there; zeros where nothing
        depends on it.
    """
    tensors = {"x_TH": x_TH, "router.weight_EH": router_weight_EH, "router.bias_E": router.bias_E}
    leaves = make_leaves(tensors | tensors_of(experts), dtype)
    routing = weigh_chosen(leaves, router, expert_of_TK)
    served_TK = expert_of_TK if served_TK is None else served_TK
    gate_TK = routing.gate_TK.masked_fill(served_TK < 0, 0.0)
    y_TH = forward(leaves, experts, served_TK, gate_TK)
    outputs = Incoming(y_TH, gate_TK, routing.logits_TE)
    return gradients_of(outputs, leaves, Incoming(dy_TH, dgate_TK, dlogits_TE))


def oracle_routed(
    x_TH: Tensor,
    expert_of_TK: Tensor,
    gate_TK: Tensor,
    experts: Experts,
    dy_TH: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Gradients:
    """Return the gradients of a layer whose routing is given, that of its weights among them."""
    tensors = {"x_TH": x_TH, "routing.gate_TK": gate_TK}
    leaves = make_leaves(tensors | tensors_of(experts), dtype)
    y_TH = forward(leaves, experts, expert_of_TK, leaves["routing.gate_TK"])
    return gradients_of(Incoming(y_TH), leaves, Incoming(dy_TH))


def chosen_ids(x_TH: Tensor, router_weight_EH: Tensor, router: Router) -> Tensor:
    """Return the ids that a router chooses before it drops any, by float64 logits."""
    logits_TE = x_TH.double() @ router_weight_EH.double().T
    if router.bias_E is not None:
        logits_TE = logits_TE + router.bias_E.double()
    return reference.choose(
        logits_TE, router.top_k, kind=router.score, correction_bias_E=router.correction_bias_E,
        num_groups=router.num_groups, top_groups=router.top_groups,
    )  # fmt: skip


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    """Return the norm of the difference over that of the oracle; where that is zero, the first."""
    oracle = oracle.double()
    difference, size = float((ours.double() - oracle).norm()), float(oracle.norm())
    return difference / size if size > 0 else difference


def tensors_of(experts: Experts) -> dict[str, Tensor | None]:
    """Return the tensors of the experts by the names that their gradients have."""
    shared = experts.shared
    names = ("gate_up_E2IH", "down_EHI", "gate_up_bias_E2I", "down_bias_EH")
    shared_names = ("gate_JH", "up_JH", "down_HJ", "token_gate_1H")
    return {f"experts.{name}": getattr(experts, name) for name in names} | {
        f"shared.{name}": getattr(shared, name, None) for name in shared_names
    }


def make_leaves(tensors: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies that ask for a gradient, in the dtype, of those tensors that are there."""
    given = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    return {
        name: tensor.to(
            torch.promote_types(tensor.dtype, dtype) if name in KEPT_WIDE else dtype, copy=True
        ).requires_grad_()
        for name, tensor in given.items()
    }


def weigh_chosen(leaves: dict[str, Tensor], router: Router, expert_of_TK: Tensor) -> Routing:
    """Return the logits, and the weights of given ids."""
    return reference.route(
        leaves["x_TH"], leaves["router.weight_EH"], router.top_k,
        renormalize=router.renormalize, expert_of_TK=expert_of_TK, kind=router.score,
        bias_E=leaves.get("router.bias_E"), scale=router.scale,
    )  # fmt: skip


def forward(
    leaves: dict[str, Tensor], experts: Experts, served_TK: Tensor, gate_TK: Tensor
) -> Tensor:
    """Return y_TH: the routed experts' and the shared one's."""
    kind = ExpertKind(
        experts.activation, bool(experts.has_gate), bool(experts.interleaved), experts.limit
    )
    y_TH = reference.moe_by_expert(
        leaves["x_TH"], served_TK, gate_TK,
        leaves["experts.gate_up_E2IH"], leaves["experts.down_EHI"],
        gate_up_bias_E2I=leaves.get("experts.gate_up_bias_E2I"),
        down_bias_EH=leaves.get("experts.down_bias_EH"), kind=kind,
    )  # fmt: skip
    if experts.shared is None:
        return y_TH
    return y_TH + reference.shared_ffn(
        leaves["x_TH"], leaves.get("shared.gate_JH"), leaves["shared.up_JH"],
        leaves["shared.down_HJ"], leaves.get("shared.token_gate_1H"), kind,
    )  # fmt: skip


def gradients_of(outputs: Incoming, leaves: dict[str, Tensor], incoming: Incoming) -> Gradients:
    """Return the gradient of each leaf; an output without one, or unasked for, counts as zero."""
    pairs = [
        (output, gradient.to(output))
        for output, gradient in zip(outputs, incoming, strict=True)
        if gradient is not None and output is not None and output.requires_grad
    ]
    found = torch.autograd.grad(
        [output for output, _ in pairs], list(leaves.values()),
        [gradient for _, gradient in pairs], allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return dict(zip(leaves, found, strict=True))
