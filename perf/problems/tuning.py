"""Other people's autotuned kernels made ready in seconds: their configs compile side by side.

Liger-Kernel chooses among 104 configs for one forward, moe-ops among 27; compiled one after the
other, and timed for as long as Triton does, they would eat minutes of a GPU. Every config is still
compiled and timed, and the fastest taken.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

# Triton's own are 25 and 100; the kernels here take a millisecond and less.
WARM_UP_MS, TIMED_MS = 5, 20


@contextmanager
def quick_autotuning(device: torch.device) -> Iterator[None]:
    """Let Triton's autotuners inside the block compile on all cores, and time briefly.

    Args:
        device: where the kernels run; the interpreter of a CPU compiles nothing and is left alone.
    """
    if device.type != "cuda":
        yield
        return
    # Here, so that the providers are listed and read where there is no Triton.
    import triton
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def compile_and_run(tuner: Any, *args: Any, **options: Any) -> Any:
        # A config that does not compile is left to the autotuner, which drops it.
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            tuner.warmup(*args, **options)
        return run(tuner, *args, **options)

    brief = staticmethod(partial(triton.testing.do_bench, warmup=WARM_UP_MS, rep=TIMED_MS))
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        patch.object(Autotuner, "run", compile_and_run),
        patch.object(Autotuner, "do_bench", brief),
    ):
        yield
