"""Gradients of weights, and the rows they are made of, where those lie past 2^31 elements."""

import torch
import triton
import triton.language as tl

from megakernel.autograd import backward_call, differentiable_of, kept_of
from megakernel.device.backward import load_halves
from megakernel.device.ffn import store_halves
from megakernel.device.gradients import rows_product, store_gradient
from megakernel.launch.call import make_spec
from tests.helpers.cases import SHAPES
from tests.helpers.far import FAR_ROW, WIDTH, as_row, reserve
from tests.helpers.inputs import make_inputs
from tests.helpers.specs import live_call

CALL = live_call(make_inputs(SHAPES[0]))
BACKWARD = backward_call(
    kept_of(CALL.buffers), CALL.rule, None, [*differentiable_of(CALL)], (None, None, None)
)
SPEC = make_spec(BACKWARD)  # z is as wide as a far row: I = 32, gate and up
NUM_ROWS = 3


@triton.jit
def rows_kernel(z, first_row, num_rows, gate, x, out, C: tl.constexpr):
    """Store rows of z far away, load them again, and multiply them with tokens."""
    W: tl.constexpr = C.gate_up
    ordinal = tl.arange(0, C.block_rows)
    row, inside = first_row + ordinal, ordinal < num_rows
    place = gate + ordinal[:, None] * C.intermediate + tl.arange(0, C.intermediate)[None, :]
    values = tl.load(place)
    store_halves(z, row, ordinal < C.block_rows, 0, values, 2.0 * values, W, C)
    own, up = load_halves(z, row, inside, 0, C.intermediate, W, C)
    tl.store(place, up - own)
    column = tl.arange(0, C.block_i)
    rows = (first_row, num_rows)
    acc = rows_product(z, column, column < C.z_width, C.z_width, x, 0, rows, None, C)
    exists = column < C.z_width
    store_gradient(out, (first_row + column).to(tl.int64) * C.hidden, exists, 0, 1, acc, 0, C)


def test_rows_and_gradients_past_2_to_the_31_elements():
    reserved, far = reserve(FAR_ROW + 64), reserve(FAR_ROW + 64)
    generator = torch.Generator().manual_seed(0)
    gate = torch.randint(-3, 4, (16, 32), generator=generator).float()
    gate[NUM_ROWS:] = 0
    x_TH = torch.randint(-3, 4, (16, 64), generator=generator).float()
    expected, kept = gate.T @ x_TH, gate.clone()
    rows_kernel[(1,)](as_row(reserved, 0), FAR_ROW, NUM_ROWS, gate, x_TH, as_row(far, 0), C=SPEC)
    assert torch.equal(gate, kept)  # 2 g - g
    for row in range(NUM_ROWS):
        stored = as_row(reserved, FAR_ROW + row)
        assert torch.equal(stored, torch.cat([kept[row], 2 * kept[row]]))
    for i in range(32):
        assert torch.equal(as_row(far, FAR_ROW + i)[: SPEC.block_h], expected[i, : SPEC.block_h])
    assert SPEC.z_width == SPEC.hidden == WIDTH
