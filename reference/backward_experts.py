"""What one expert's derivative is for one token, by hand."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from reference.experts import ACTIVATIONS, SWIGLU, ExpertKind, between_products


class ExpertGradients(NamedTuple):
    """What one token's output asks of the expert that served it."""

    x_H: Tensor
    gate: Tensor  # of the weight of the choice, a scalar
    gate_up_2IH: Tensor
    down_HI: Tensor
    gate_up_bias_2I: Tensor
    down_bias_H: Tensor


def expert_backward(
    x_H: Tensor,
    gate: Tensor,
    dy_H: Tensor,
    gate_up_2IH: Tensor,
    down_HI: Tensor,
    gate_up_bias_2I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    kind: ExpertKind = SWIGLU,
) -> ExpertGradients:
    """Return the gradients of y = gate · (down · h(z) + down_bias), z = gate_up · x + bias.

    With q = dy · down, before the weight is applied::

        dgate = <q, h> + <dy, down_bias>          dz = (gate · q) · dh/dz
        ddown = dy ⊗ (gate · h)                   dgate_up = dz ⊗ x
        ddown_bias = gate · dy                    dgate_up_bias = dz
                                                  dx = dz · gate_up
    """
    z_2I = gate_up_2IH @ x_H
    if gate_up_bias_2I is not None:
        z_2I = z_2I + gate_up_bias_2I
    h_I = between_products(z_2I[None], kind)[0]
    q_I = dy_H @ down_HI
    dgate = q_I @ h_I
    if down_bias_H is not None:
        dgate = dgate + dy_H @ down_bias_H
    dz_2I = between_products_backward(z_2I, gate * q_I, kind)
    return ExpertGradients(
        x_H=dz_2I @ gate_up_2IH,
        gate=dgate,
        gate_up_2IH=torch.outer(dz_2I, x_H),
        down_HI=torch.outer(dy_H, gate * h_I),
        gate_up_bias_2I=dz_2I,
        down_bias_H=gate * dy_H,
    )


def between_products_backward(z_2I: Tensor, dh_I: Tensor, kind: ExpertKind) -> Tensor:
    """Return dz of h = a(g) · u: dg = dh · u · a'(g) and du = dh · a(g), where z holds g and u.

    Without a gate: dz = dh · a'(z). Rows lie as ``kind`` says, those of dz like those of z.
    """
    if not kind.has_gate:
        return dh_I * slope(z_2I, kind.activation)
    g_I, u_I = (z_2I[::2], z_2I[1::2]) if kind.interleaved else z_2I.chunk(2)
    if kind.activation == "clamped_swiglu":
        dg_I, du_I = clamped_backward(g_I, u_I, dh_I, kind.limit)
    else:
        dg_I = dh_I * u_I * slope(g_I, kind.activation)
        du_I = dh_I * ACTIVATIONS[kind.activation](g_I)
    return torch.stack([dg_I, du_I], 1).flatten() if kind.interleaved else torch.cat([dg_I, du_I])


def clamped_backward(
    g_I: Tensor, u_I: Tensor, dh_I: Tensor, limit: float
) -> tuple[Tensor, Tensor]:
    """Return dg and du of h = (u + 1) · g · s, with s = sigmoid(1.702 g) and both clamped.

    dg = dh · (u + 1) · (s + 1.702 g · s · (1 - s)) and du = dh · g · s. A value past its limit
    is a constant and gets zero; one that lies on the limit still counts as inside.
    """
    low_I, mid_I = g_I.clamp(max=limit), u_I.clamp(-limit, limit)
    s_I = torch.sigmoid(1.702 * low_I)
    dg_I = dh_I * (mid_I + 1) * (s_I + 1.702 * low_I * s_I * (1 - s_I))
    du_I = dh_I * low_I * s_I
    return dg_I.masked_fill(g_I > limit, 0.0), du_I.masked_fill(u_I.abs() > limit, 0.0)


def slope(z_I: Tensor, activation: str) -> Tensor:
    """Return the derivative of an activation without a limit.

    ========= =====================================================================================
    silu      s + z · s · (1 - s), s = sigmoid(z)
    gelu      Φ(z) + z · φ(z), the normal distribution's and its density
    gelu_tanh (1 + t) / 2 + z / 2 · (1 - t²) · v', t = tanh(v), v = sqrt(2/π) · (z + 0.044715 z³)
    relu      1 where z > 0, else 0; at 0 as well
    relu2     2 · relu(z)
    ========= =====================================================================================
    """
    if activation == "silu":
        s_I = torch.sigmoid(z_I)
        return s_I + z_I * s_I * (1 - s_I)
    if activation == "gelu":
        density_I = torch.exp(-z_I.square() / 2) / math.sqrt(2 * math.pi)
        return (1 + torch.erf(z_I / math.sqrt(2))) / 2 + z_I * density_I
    if activation == "gelu_tanh":
        root = math.sqrt(2 / math.pi)
        t_I = torch.tanh(root * (z_I + 0.044715 * z_I**3))
        dv_I = root * (1 + 3 * 0.044715 * z_I.square())
        return (1 + t_I) / 2 + z_I / 2 * (1 - t_I.square()) * dv_I
    if activation == "relu":
        return (z_I > 0).to(z_I.dtype)
    if activation == "relu2":
        return 2 * torch.relu(z_I)
    raise ValueError(f"activation must be one of {[*ACTIVATIONS]}, got {activation!r}")
