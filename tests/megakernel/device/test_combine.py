"""The device function of the combine on its own: addresses past 32 bits."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from megakernel.device.combine import combine_tile
from megakernel.plan.buffers import Buffers, Routing, Rows, Scratch
from megakernel.plan.order import sizes_of
from tests.helpers.far import FAR_ROW, WIDTH, as_row, reserve
from tests.helpers.specs import PLAIN_SPEC


@triton.jit
def combine_kernel(b, C: tl.constexpr):
    combine_tile(0, 0, b, sizes_of(1, 0, 0, 0, True, C), C)


def test_combine_reads_rows_past_2_to_the_31_elements():
    reserved = reserve(FAR_ROW + 1)
    as_row(reserved, FAR_ROW)[:] = torch.arange(float(WIDTH))
    y_TH = torch.zeros(1, WIDTH)
    buffers = Buffers(
        routing=Routing(gate_TK=torch.ones(1, 1)),
        rows=Rows(row_of_TK=torch.tensor([[FAR_ROW]], dtype=torch.int32)),
        scratch=Scratch(y_CH=as_row(reserved, 0)),
        y_TH=y_TH,
    )
    spec = replace(PLAIN_SPEC, hidden=WIDTH, block_h=WIDTH, column_groups=1, top_k=1)
    combine_kernel[(1,)](buffers, C=spec)
    assert torch.equal(y_TH[0], torch.arange(float(WIDTH)))
