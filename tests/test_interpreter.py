"""The faster interpreter is the one that runs, and computes and refuses what Triton's own does."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from tests.helpers.interpreter import PatchedOnce, check_known, make_fast


@triton.jit
def add_scaled(x, y, scale):
    return x + twice(y, scale)


@triton.jit
def twice(y, scale):
    return tl.where(y > 0, y * scale, 2 * scale)


@triton.jit
def sum_kernel(x_ptr, y_ptr, size, SCALE: tl.constexpr):
    offsets = tl.arange(0, 16)
    inside = offsets < size
    x = tl.load(x_ptr + offsets, mask=inside, other=0)
    # The nested functions again, with other arguments.
    y = add_scaled(add_scaled(x, x, SCALE), tl.sum(x, 0), tl.full((), 3, tl.int32))
    tl.store(y_ptr + offsets, y, mask=inside)


@triton.jit
def double_kernel(x_ptr, y_ptr):
    offsets = tl.arange(0, 2)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x + x)


pytestmark = pytest.mark.skipif(
    not isinstance(sum_kernel, InterpretedFunction), reason="kernels are compiled in this run"
)


def launch(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    sum_kernel[(1,)](x, y, len(x), 5)
    return y


def test_it_is_active_and_patches_once_per_launch() -> None:
    made = make_fast()
    assert interpreter._patch_lang == made.patch_once
    launches, patches = made.launches, made.patches
    for _ in range(3):
        launch(torch.arange(9, dtype=torch.int32))
    assert made.launches - launches == 3
    # Once for what the kernel sees, once more for what tl.sum sees: triton.language.core.
    assert made.patches - patches == 6


def test_nested_functions_give_the_bits_of_the_unchanged_interpreter() -> None:
    made, x = make_fast(), torch.randn(13)
    fast = launch(x)
    made.uninstall()
    try:
        slow = launch(x)
    finally:
        made.install()
    assert torch.equal(fast.view(torch.int32), slow.view(torch.int32))


def test_the_language_is_given_back_after_a_launch_that_ends_well_or_badly() -> None:
    members = [(tl, name) for name in ("load", "range", "reduce", "sum")]
    members += [(tl.core, "load"), (tl.core, "reduce"), (tl.dtype, "to_ir")]
    before = [getattr(owner, name) for owner, name in members]
    launch(torch.arange(9, dtype=torch.int32))
    with pytest.raises(interpreter.InterpreterError):
        sum_kernel[(1,)](torch.ones(2), None, 2, 5)
    assert [getattr(owner, name) for owner, name in members] == before
    assert not hasattr(tl.tensor, "__bool__")


@pytest.mark.parametrize("debug", [False, True])
def test_overflow_is_refused_when_triton_refuses_it(debug, monkeypatch) -> None:
    make_fast()
    options = replace(interpreter.interpreter_builder.options, debug=debug)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    too_large = torch.full((2,), 2**30, dtype=torch.int32)
    refused = pytest.raises(interpreter.InterpreterError, match="int32 overflow detected")
    with refused if debug else nullcontext():
        double_kernel[(1,)](too_large, torch.empty_like(too_large))


def test_a_launch_inside_a_launch_is_refused() -> None:
    made = PatchedOnce(interpreter)
    made.execute = lambda grid: made.launch(grid)
    with pytest.raises(RuntimeError, match="a launch inside a launch"):
        made.launch(None)


def test_an_interpreter_with_another_inside_is_refused_by_name() -> None:
    changed = SimpleNamespace(_patch_lang=None, GridExecutor=None, _get_np_dtype=None)
    message = f"triton {triton.__version__} has no interpreter_semantic, binary_op_sanitize"
    with pytest.raises(RuntimeError, match=message):
        check_known(changed)
