"""The fences are put where they belong, into our kernel alone, and Triton's hook is given back."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import triton
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from megakernel.config import ROWS64
from megakernel.launch.fences import (
    FENCE,
    FencedFunction,
    add_fences,
    fence_compilations,
    find_unfenced,
    needs_fences,
)
from megakernel.tools.compile_cases import CompileCase
from megakernel.tools.models import MODELS

PRODUCT = "wgmma.fence.sync.aligned;"
PTX = f"bar.sync 0;\n\t{PRODUCT}\n"
FENCED_PTX = f"bar.sync 0;\n\t{FENCE}\n\t{PRODUCT}\n"
ARGUMENTS = ("options", "language", 90)


@pytest.mark.parametrize(
    ("version", "needed"),
    [
        ("3.6.0", True),
        ("3.6.0+git9844da95", True),
        ("3.7", True),
        ("3.7.0", True),
        ("2.9.1", True),
        ("3.7.1", False),
        ("3.7.10", False),
        ("3.8.0", False),
        ("3.10.0", False),
        ("4.0", False),
    ],
)
def test_triton_before_3_7_1_needs_fences(version: str, needed: bool) -> None:
    assert needs_fences(version) == needed


def test_a_version_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"version must start with two numbers.*got 'main'"):
        needs_fences("main")


@pytest.mark.parametrize(
    ("between", "is_fenced"),
    [
        pytest.param([], True, id="right above"),
        pytest.param(["add.s32 %r1, %r2, 4;", "$L__tmp59:"], True, id="addresses between"),
        pytest.param(["bar.sync 0;"], True, id="each thread behind its own writes"),
        pytest.param(["cp.async.wait_group 2;"], False, id="rows arrive after it"),
        pytest.param(["@%p1 cp.async.cg.shared.global [%r1], [%rd2], 16;"], False, id="guarded"),
        pytest.param(["st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5};"], False, id="a store"),
        pytest.param(["st.volatile.shared.b32 [%r1], %r2;"], False, id="a volatile store"),
        pytest.param(["wgmma.commit_group.sync.aligned;"], False, id="of the products before"),
        pytest.param(["$L__BB0_7:"], False, id="jumped past"),
    ],
)
def test_a_fence_counts_until_something_is_written(between: list[str], is_fenced: bool) -> None:
    ptx = "\n".join([FENCE, *between, PRODUCT, "ret;"])
    assert find_unfenced(ptx) == ([] if is_fenced else [len(between) + 1])
    mended = add_fences(ptx).splitlines()
    assert [line.strip() for line in mended].count(FENCE) == (1 if is_fenced else 2)
    assert mended[mended.index(PRODUCT) - 1].strip() == FENCE or is_fenced
    assert [line for line in mended if line.strip() != FENCE] == [*between, PRODUCT, "ret;"]


def test_every_group_of_products_gets_its_own_fence_once() -> None:
    ptx = PTX + PTX
    assert find_unfenced(ptx) == [1, 3]
    assert add_fences(ptx) == FENCED_PTX + FENCED_PTX
    assert add_fences(add_fences(ptx)) == add_fences(ptx)


def body() -> None:
    """No kernel at all."""


def compile_to_ptx(source: Any, **options: Any) -> str:
    """As much of triton.compile as has to do with stages."""
    stages = {"ptx": lambda source, metadata: PTX}
    if knobs.runtime.add_stages_inspection_hook is not None:
        knobs.runtime.add_stages_inspection_hook("backend", stages, *ARGUMENTS)
    return stages["ptx"](source, {})


def make_kernel(compile: Callable[..., str] = compile_to_ptx) -> FencedFunction:
    kernel = FencedFunction(body)
    kernel.compile = compile
    return kernel


def make_source(fenced: bool = True) -> SimpleNamespace:
    spec = CompileCase("rows64", ROWS64, MODELS["OLMoE"], "given").spec
    return SimpleNamespace(constants={(0,): 5, (1,): replace(spec, fenced=fenced)})


@pytest.fixture(autouse=True)
def hook_is_given_back() -> Iterator[None]:
    assert knobs.runtime.add_stages_inspection_hook is None
    yield
    assert knobs.runtime.add_stages_inspection_hook is None


def test_a_kernel_is_fenced_if_its_spec_says_so() -> None:
    kernel = make_kernel()
    assert kernel.compile(make_source()) == FENCED_PTX
    assert kernel.compile(make_source(fenced=False)) == PTX
    assert compile_to_ptx(None) == PTX, "another kernel, afterwards"


def test_the_hook_is_given_back_when_a_compilation_fails() -> None:
    def fail(source: Any) -> str:
        assert knobs.runtime.add_stages_inspection_hook is not None
        raise RuntimeError("ptxas")

    with pytest.raises(RuntimeError, match="ptxas"):
        make_kernel(fail).compile(make_source())
    assert knobs.runtime.add_stages_inspection_hook is None


def test_a_hook_of_others_is_asked_first_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def theirs(*arguments: Any) -> tuple[str, str] | None:
        asked.append(arguments)
        if not arguments:
            return "key", "hash"
        arguments[1]["ptx"] = lambda source, metadata: f"// theirs\n{PTX}"
        return None

    def compile_with_a_key(source: Any) -> str:
        assert knobs.runtime.add_stages_inspection_hook() == ("key", "hash")
        return compile_to_ptx(source)

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", theirs)
    assert make_kernel(compile_with_a_key).compile(make_source()) == f"// theirs\n{FENCED_PTX}"
    assert knobs.runtime.add_stages_inspection_hook is theirs
    assert [len(arguments) for arguments in asked] == [0, 5]
    assert asked[1][0] == "backend" and asked[1][2:] == ARGUMENTS
    monkeypatch.undo()


def test_without_a_hook_of_others_the_key_stays_as_it_was() -> None:
    def compile_with_a_key(source: Any) -> str:
        return "".join(knobs.runtime.add_stages_inspection_hook())

    assert make_kernel(compile_with_a_key).compile(make_source()) == ""


def test_a_hook_that_others_set_meanwhile_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_hook(source: Any) -> str:
        knobs.runtime.add_stages_inspection_hook = print
        return PTX

    make_kernel(set_hook).compile(make_source())
    assert knobs.runtime.add_stages_inspection_hook is print
    knobs.runtime.add_stages_inspection_hook = None


def test_kernels_of_other_threads_pass_unchanged() -> None:
    def compile_beside(source: Any) -> str:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(compile_to_ptx, None).result() == PTX
        return compile_to_ptx(source)

    assert make_kernel(compile_beside).compile(make_source()) == FENCED_PTX


def test_the_hook_stays_until_the_last_thread_is_done() -> None:
    """The first to come is the first to go; the other asks for its stages after that."""
    both_inside, first_left = Event(), Event()

    def compile_first(source: Any) -> str:
        assert both_inside.wait(10)
        return compile_to_ptx(source)

    def compile_last(source: Any) -> str:
        both_inside.set()
        assert first_left.wait(10)
        return compile_to_ptx(source)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(make_kernel(compile_first).compile, make_source())
        last = pool.submit(make_kernel(compile_last).compile, make_source())
        assert first.result() == FENCED_PTX
        first_left.set()
        assert last.result() == FENCED_PTX


def test_triton_may_assign_its_compiler_again() -> None:
    """create_binder does, once for every device."""
    kernel = make_kernel()
    kernel.compile = lambda source: compile_to_ptx(source) + "ret;"
    assert kernel.compile(make_source()) == FENCED_PTX + "ret;"


@pytest.mark.parametrize(
    ("version", "kind"),
    [("3.6.0", FencedFunction), ("3.7.0", FencedFunction), ("3.7.1", JITFunction)],
)
def test_a_kernel_is_changed_in_place_where_triton_needs_it(version: str, kind: type) -> None:
    kernel = JITFunction(body)
    fence_compilations(kernel, version)
    assert type(kernel) is kind


def test_an_interpreted_kernel_stays_as_it_is() -> None:
    kernel = InterpretedFunction(body)
    fence_compilations(kernel, "3.6.0")
    assert type(kernel) is InterpretedFunction


def test_specs_ask_for_fences_where_this_triton_needs_them() -> None:
    spec = CompileCase("rows64", ROWS64, MODELS["OLMoE"], "given").spec
    assert spec.fenced == needs_fences(triton.__version__)
