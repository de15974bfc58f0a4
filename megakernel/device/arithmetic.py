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
        # And it spoils denormals, which the low bits would make of a zero with a sign.
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        values = tl.where(values == values, nearest, values)
    return values.to(dtype)


@triton.jit
def sigmoid(values):
    """Return 1 / (1 + exp(-values))."""
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def quick_sigmoid(values, C: tl.constexpr):
    """Return sigmoid(values), for bfloat16 tokens by one approximate tanh if the config allows.

    sigmoid(v) = 1/2 + tanh(v / 2) / 2, and tanh.approx is off by at most 2^-11 of its value (PTX
    ISA), so this by at most 2^-12.
    """
    if C.quick_sigmoid:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * values], tl.float32, is_pure=True, pack=1
        )
        result = 0.5 + 0.5 * tanh
    else:
        result = sigmoid(values)
    return result


@triton.jit
def activate(values, C: tl.constexpr):
    """Apply an activation in float32; NaN stays NaN."""
    ACTIVATION: tl.constexpr = C.expert.activation
    if ACTIVATION == "silu" and C.quick_sigmoid:
        result = values * quick_sigmoid(values, C)
    elif ACTIVATION == "silu":
        result = values / (1.0 + tl.exp(-values))
    elif ACTIVATION == "gelu":
        result = 0.5 * values * (1.0 + tl.math.erf(values * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        result = values * quick_sigmoid(2.0 * inner, C)
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
        result = (up + 1.0) * (gate * quick_sigmoid(1.702 * gate, C))
    else:
        result = activate(gate, C) * up
    return result


@triton.jit
def halves_of(acc, W: tl.constexpr, C: tl.constexpr):
    """Return gate and up, [tile_rows of W, block_i] each, of their sums; twice up without gate."""
    if not C.expert.has_gate:
        gate, up = acc, acc
    elif W.stacked == 1:  # gate and up take turns
        gate, up = tl.split(acc.reshape(W.interleaved_halves))
    else:
        gate, up = tl.split(tl.permute(acc.reshape(W.stacked_halves), (0, 2, 1)))
    return gate, up


@triton.jit
def halved(values):
    """Return the left and the right half of the columns of a tile."""
    halves = values.reshape((values.shape[0], 2, values.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def activated(gate, up, C: tl.constexpr):
    """Return h from gate and up, or from up alone."""
    if C.expert.has_gate:  # noqa: SIM108  (known when compiling)
        h = gated(gate, up, C)
    else:
        h = activate(up, C)
    return h
