"""The end of a launch alone: what the last worker does with counters and errors.

``python -m tests.helpers.last_worker`` prints its PTX for sm_90, compiled without a GPU. That
process must not interpret kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakernel.device.queue import leave
from megakernel.plan.buffers import Control
from megakernel.plan.order import sizes_of
from megakernel.plan.protocol import Protocol
from megakernel.plan.schedule import Schedule
from tests.helpers.specs import PLAIN_SPEC

SCHEDULE = Schedule(PLAIN_SPEC, num_tokens=40, num_tiles=8)


@triton.jit
def last_worker(control, schedule_id, num_tiles, C: tl.constexpr):
    """Leave, as the only worker of a launch of 40 tokens."""
    size = sizes_of(40, num_tiles, 0, 0, True, C)
    leave(control, 1, schedule_id, size, C)


def make_control(error: Tensor, report: Tensor, device: str = "cpu") -> Control:
    """Return what a launch leaves behind: counters of its work, errors, and a report."""
    words = SCHEDULE.num_counters * PLAIN_SPEC.COUNTER_STRIDE
    counters = torch.zeros(words, dtype=torch.int32, device=device)
    counters[:: PLAIN_SPEC.COUNTER_STRIDE] = 3
    counters[Protocol.EXIT * PLAIN_SPEC.COUNTER_STRIDE] = 0
    return Control(counters, error, report)


def main() -> None:
    """Compile for a GPU that is not here."""
    from megakernel.tools.compile_check import Sm90

    triton.runtime.driver.set_active(Sm90())
    words = torch.empty(Protocol.ERROR_WORDS, dtype=torch.int32, device="meta")
    compiled = last_worker.warmup(
        make_control(words, words, "meta"), 7, 8, C=PLAIN_SPEC, num_warps=4, grid=(1,)
    )
    print(compiled.asm["ptx"])


if __name__ == "__main__":
    main()
