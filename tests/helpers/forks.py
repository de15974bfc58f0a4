"""Forks while another thread launches: ``python -m tests.helpers.forks``.

For a process of its own: it interprets kernels. A child that finds the launch taken waits until
its patience ends. Exits with 0 if every child made its own call, with the bits of its parent.
"""

import os
import signal
import sys
import threading

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from megakernel import Experts, Router, moe
from tests.helpers.interpreter import make_fast
from tests.helpers.threads import SMALL, E, H, I, K, T

FORKS = 2
PATIENCE_SECONDS = 100


def main() -> int:
    """Launch in a thread without end, and fork meanwhile."""
    torch.set_num_threads(1)
    make_fast()
    x_TH, router_EH = torch.randn(T, H), torch.randn(E, H)
    experts = Experts(torch.randn(E, 2 * I, H), torch.randn(E, H, I))

    def call() -> Tensor:
        return moe(x_TH, router_EH, experts, Router(K), config=SMALL).y_TH

    expected, over = call(), threading.Event()

    def launch_on_and_on() -> None:
        while not over.is_set():
            call()

    other = threading.Thread(target=launch_on_and_on)
    other.start()
    codes = []
    for _ in range(FORKS):
        child = os.fork()
        if not child:
            signal.alarm(PATIENCE_SECONDS)  # which ends it
            os._exit(not torch.equal(call(), expected))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    over.set()
    other.join()
    print(codes)
    return any(codes)


if __name__ == "__main__":
    sys.exit(main())
