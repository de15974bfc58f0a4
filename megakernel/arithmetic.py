"""Device functions of numbers: sums of products and rounding, the same interpreted or compiled."""

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
