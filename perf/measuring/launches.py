"""How many launches a call makes, seen from outside: by the profiler, or by the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def count_launches(on_gpu: bool) -> Iterator[list[str]]:
    """Yield a list that holds, after the block, the name of everything launched inside.

    Args:
        on_gpu: True to list every kernel, copy and fill that the profiler saw; False to list every
            run of Triton's interpreter.
    """
    launched: list[str] = []
    if not on_gpu:
        with _record_interpreted(launched):
            yield launched
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield launched
        torch.cuda.synchronize()
    launched += [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


@contextmanager
def _record_interpreted(launched: list[str]) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def record(executor: GridExecutor, *args: Any, **options: Any) -> None:
        launched.append(executor.fn.__name__)
        run(executor, *args, **options)

    with patch.object(GridExecutor, "__call__", record):
        yield
