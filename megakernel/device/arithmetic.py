"""Device functions of numbers: products, rounding, activations; alike interpreted or compiled."""

import triton
import triton.language as tl


@triton.jit
def dot(left, right, acc, C: tl.constexpr):
    """Return acc + left · right in float32, never in TF32.

    Interpreted, ``tl.dot`` would multiply the raw bits of bfloat16, and its BLAS lets the rounding
    of a row depend on the row's place in the tile; a plain sum does neither.
    """
    if C.interpreted:
        products = left.to(tl.float32)[:, :, None] * right.to(tl.float32)[None, :, :]
        acc = acc + tl.sum(products, 1)
    else:
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def rounded(values, dtype: tl.constexpr, C: tl.constexpr):
    """Round float32 to the nearest value of ``dtype``, ties to even."""
    if C.interpreted and dtype == tl.bfloat16:  # the interpreter's own cast drops the low bits
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        values = tl.where(values == values, nearest, values)
    return values.to(dtype)


@triton.jit
def sigmoid(values):
    """Return 1 / (1 + exp(-values))."""
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def activate(values, C: tl.constexpr):
    """Apply an activation in float32; NaN stays NaN."""
    ACTIVATION: tl.constexpr = C.expert.activation
    if ACTIVATION == "silu":
        result = values / (1.0 + tl.exp(-values))
    elif ACTIVATION == "gelu":
        result = 0.5 * values * (1.0 + tl.math.erf(values * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        result = values * sigmoid(2.0 * inner)
    else:
        tl.static_assert((ACTIVATION == "relu") | (ACTIVATION == "relu2"))
        result = tl.where(values < 0.0, 0.0, values)
        if ACTIVATION == "relu2":
            result = result * result
    return result


@triton.jit
def gated(gate, up, C: tl.constexpr):
    """Return activation(gate) * up, or gpt-oss's (up + 1) * gate * sigmoid(1.702 gate), clamped.

    Comparisons keep NaN, which minimum and maximum would drop.
    """
    if C.expert.activation == "clamped_swiglu":
        limit = C.expert.limit
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        result = (up + 1.0) * (gate * sigmoid(1.702 * gate))
    else:
        result = activate(gate, C) * up
    return result


@triton.jit
def activated(acc, INTERLEAVED: tl.constexpr, C: tl.constexpr):
    """Turn the sums of gate and up, or of up alone, into h, [block_rows, block_i]."""
    if not C.expert.has_gate:
        h = activate(acc, C)
    elif INTERLEAVED:
        gate, up = tl.split(acc.reshape(C.interleaved_halves))
        h = gated(gate, up, C)
    else:
        gate, up = tl.split(tl.permute(acc.reshape(C.stacked_halves), (0, 2, 1)))
        h = gated(gate, up, C)
    return h
