"""The gradients of the layer, one assignment at a time and by hand: slow, and true by reading."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.backward_experts import expert_backward
from reference.backward_router import SOFTMAX, RouterKind, logits_of, route_backward
from reference.experts import SWIGLU, ExpertKind
from reference.moe import at
from reference.router import weigh


class Layer(NamedTuple):
    """The tensors of a layer, or the gradient of each in its place; None where there is none."""

    x_TH: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor
    gate_up_bias_E2I: Tensor | None = None
    down_bias_EH: Tensor | None = None
    gate_TK: Tensor | None = None  # weight of each choice, where the routing is given
    router_weight_EH: Tensor | None = None  # where it is not
    router_bias_E: Tensor | None = None  # added to the logits
    shared_gate_JH: Tensor | None = None
    shared_up_JH: Tensor | None = None
    shared_down_HJ: Tensor | None = None
    token_gate_1H: Tensor | None = None


def layer_backward(
    layer: Layer,
    expert_of_TK: Tensor,
    dy_TH: Tensor,
    *,
    served_TK: Tensor | None = None,
    dgate_TK: Tensor | None = None,
    dlogits_TE: Tensor | None = None,
    kind: ExpertKind = SWIGLU,
    router: RouterKind = SOFTMAX,
) -> Layer:
    """Return the gradient of each tensor of the layer, in float64.

    Args:
        layer: any floating dtype, with a router's weight or with the weights of the choices.
        expert_of_TK: integer ids that the weights were computed over, before any was dropped; -1
            for no expert.
        dy_TH: gradient of the output.
        served_TK: the same with -1 where a choice was dropped, over capacity or by a draw; None
            if none was.
        dgate_TK: gradient of the router's weights of the choices, beside what y asks of them;
            None for zero. With a router alone, as is the next.
        dlogits_TE: gradient of the logits; None for zero.
        kind: what lies between the products.
        router: how logits become weights.
    """
    layer = Layer._make(None if value is None else value.double() for value in layer)
    dy_TH, served_TK = dy_TH.double(), expert_of_TK if served_TK is None else served_TK
    gate_TK = weights_of(layer, expert_of_TK, router)
    gradients = experts_backward(layer, served_TK, gate_TK, dy_TH, kind)
    if layer.shared_up_JH is not None:
        gradients = add_shared(gradients, layer, dy_TH, kind)
    if layer.router_weight_EH is None:
        return gradients
    add(gradients.gate_TK, ..., 0.0 if dgate_TK is None else dgate_TK.double())
    ids = expert_of_TK, served_TK
    return add_router(gradients, layer, *ids, dlogits_TE, router)


def weights_of(layer: Layer, expert_of_TK: Tensor, router: RouterKind) -> Tensor:
    """Return the weight of each choice: the given one, or what the router says of these ids."""
    if layer.gate_TK is not None:
        return layer.gate_TK
    assert layer.router_weight_EH is not None
    logits_TE = logits_of(layer.x_TH, layer.router_weight_EH, layer.router_bias_E)
    return weigh(
        logits_TE, expert_of_TK, router.renormalize, kind=router.score, scale=router.scale
    )


def experts_backward(
    layer: Layer, served_TK: Tensor, gate_TK: Tensor, dy_TH: Tensor, kind: ExpertKind
) -> Layer:
    """Return the gradients of y[t] = sum over k of gate[t, k] · expert(x[t], id[t, k]).

    A token's dx is the sum over its choices, an expert's gradients the sum over the choices that
    it serves. An expert without any gets zeros, and so does the weight of a choice that nobody
    serves.
    """
    gradients = zeros_like(layer)._replace(gate_TK=torch.zeros_like(gate_TK))
    for token, choice in (served_TK >= 0).nonzero().tolist():
        expert = int(served_TK[token, choice])
        weights = layer.gate_up_E2IH[expert], layer.down_EHI[expert]
        biases = at(layer.gate_up_bias_E2I, expert), at(layer.down_bias_EH, expert)
        gate = gate_TK[token, choice]
        one = expert_backward(layer.x_TH[token], gate, dy_TH[token], *weights, *biases, kind)
        add(gradients.x_TH, token, one.x_H)
        add(gradients.gate_TK, (token, choice), one.gate)
        add(gradients.gate_up_E2IH, expert, one.gate_up_2IH)
        add(gradients.down_EHI, expert, one.down_HI)
        add(gradients.gate_up_bias_E2I, expert, one.gate_up_bias_2I)
        add(gradients.down_bias_EH, expert, one.down_bias_H)
    return gradients


def add_shared(gradients: Layer, layer: Layer, dy_TH: Tensor, kind: ExpertKind) -> Layer:
    """Return the gradients with those of the expert that serves every token.

    Its weight is 1, or s = sigmoid(v · x) with the token gate v. With ds as for any choice,
    dv = sum over t of ds · s · (1 - s) · x, and dx has ds · s · (1 - s) · v beside the expert's.
    """
    gate_JH, up_JH, down_HJ = layer.shared_gate_JH, layer.shared_up_JH, layer.shared_down_HJ
    v_1H = layer.token_gate_1H
    assert up_JH is not None and down_HJ is not None
    rows = up_JH if gate_JH is None else torch.cat([gate_JH, up_JH])
    drows = torch.zeros_like(rows)
    plain = ExpertKind(kind.activation, kind.has_gate, False, kind.limit)
    for token, (x_H, dy_H) in enumerate(zip(layer.x_TH, dy_TH, strict=True)):
        weight = x_H.new_ones(()) if v_1H is None else torch.sigmoid(v_1H[0] @ x_H)
        one = expert_backward(x_H, weight, dy_H, rows, down_HJ, kind=plain)
        add(gradients.x_TH, token, one.x_H)
        add(drows, ..., one.gate_up_2IH)
        add(gradients.shared_down_HJ, ..., one.down_HI)
        if v_1H is not None:
            dlogit = one.gate * weight * (1 - weight)
            add(gradients.x_TH, token, dlogit * v_1H[0])
            add(gradients.token_gate_1H, 0, dlogit * x_H)
    dgate_JH = None if gate_JH is None else drows[: len(up_JH)]
    return gradients._replace(shared_gate_JH=dgate_JH, shared_up_JH=drows[-len(up_JH) :])


def add_router(
    gradients: Layer,
    layer: Layer,
    expert_of_TK: Tensor,
    served_TK: Tensor,
    dlogits_TE: Tensor | None,
    kind: RouterKind,
) -> Layer:
    """Return the gradients with those of the router, in the place of those of its weights."""
    assert layer.router_weight_EH is not None and gradients.gate_TK is not None
    of_router = route_backward(
        layer.x_TH, layer.router_weight_EH, layer.router_bias_E, expert_of_TK, gradients.gate_TK,
        served_TK=served_TK, dlogits_TE=dlogits_TE, kind=kind,
    )  # fmt: skip
    return gradients._replace(
        x_TH=gradients.x_TH + of_router.x_TH,
        gate_TK=None,
        router_weight_EH=of_router.weight_EH,
        router_bias_E=None if layer.router_bias_E is None else of_router.bias_E,
    )


def add(total: Tensor | None, place: Any, part: Tensor | float) -> None:
    """Add to one place of a gradient, unless there is none."""
    if total is not None:
        total[place] += part


def zeros_like(layer: Layer) -> Layer:
    """Return zeros in the place of each tensor that is there."""
    return Layer._make(None if value is None else torch.zeros_like(value) for value in layer)
