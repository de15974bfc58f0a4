"""The faster interpreter is the one that runs, and computes and refuses what Triton's own does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from tests.helpers.interpreter import PatchedOnce, check_known, check_overflow, make_fast


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
    before = tl.load, tl.core.load, tl.range, tl.tensor.__bool__, tl.core.reduce
    launch(torch.arange(9, dtype=torch.int32))
    with pytest.raises(interpreter.InterpreterError, match="int32 overflow detected"):
        launch(torch.full((2,), 2**30, dtype=torch.int32))
    assert before == (tl.load, tl.core.load, tl.range, tl.tensor.__bool__, tl.core.reduce)


NUMPY_OF = {tl.int32: np.int32, tl.uint32: np.uint32, tl.int16: np.int16, tl.int64: np.int64}


def refusal_of(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except AssertionError as refusal:
        return str(refusal)
    return None


@given(
    st.sampled_from(list(NUMPY_OF)),
    st.sampled_from(["add", "sub", "mul"]),
    st.lists(st.tuples(st.integers(), st.integers()), min_size=1, max_size=4),
)
def test_overflow_is_refused_exactly_where_triton_refuses_it(scalar, name, pairs) -> None:
    semantic = interpreter.interpreter_semantic
    low, high = np.iinfo(NUMPY_OF[scalar]).min, np.iinfo(NUMPY_OF[scalar]).max
    values = np.clip(np.array(pairs, dtype=object), low, high).astype(NUMPY_OF[scalar])
    ty = tl.block_type(scalar, [len(pairs)])
    lhs, rhs = (
        tl.tensor(interpreter.TensorHandle(column.copy(), scalar), ty) for column in values.T
    )
    ours, theirs = (
        refusal_of(check, semantic, lhs, rhs, getattr(semantic, name))
        for check in (check_overflow, type(semantic).binary_op_sanitize_overflow_impl)
    )
    assert ours == theirs


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
