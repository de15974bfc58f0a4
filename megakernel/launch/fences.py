"""Fences that Triton before 3.7.1 leaves out, added to the kernel while it compiles.

Rows reach shared memory by cp.async, which belongs to the generic proxy; wgmma reads them through
the async proxy. Between the two the memory model asks for a proxy fence. Triton 3.7.1 and later
emit it; for older ones it is added to the PTX, in a stage of their compiler. Such a stage is not
in the cache key of Triton 3.6, but the spec is: ``KernelSpec.fenced``.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

from triton import knobs
from triton.runtime.jit import JITFunction

from megakernel.plan.spec import KernelSpec

FIRST_FENCED = (3, 7, 1)
FENCE = "fence.proxy.async.shared::cta;"
PRODUCT = "wgmma.fence."  # opens every group of products that Triton emits
# What is written below a fence, or arrives there, has not passed it; nor has what came by a jump.
# A barrier may stand between: then each thread's fence is behind its own writes.
WRITE = re.compile(
    r"\$L__BB\w+:|(@!?%?\w+\s+)?(st\.[\w.]*shared|stmatrix|atom\.|red\.|cp\.async|wgmma\.)"
)


def needs_fences(version: str) -> bool:
    """Say whether a version of Triton leaves the fences out.

    Args:
        version: as ``triton.__version__`` has it, ``"3.7.0"`` or ``"3.6.0+git1234"``.

    Raises:
        ValueError: it does not start with a major and a minor number.
    """
    return numbers_of(version) < FIRST_FENCED


def numbers_of(version: str) -> tuple[int, ...]:
    """Return the three numbers that a version starts with, the last 0 where it has two.

    Raises:
        ValueError: it does not start with a major and a minor number.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if numbers is None:
        raise ValueError(f"version must start with two numbers, as 3.7.1 does, got {version!r}")
    return tuple(int(number or 0) for number in numbers.groups())


def find_unfenced(ptx: str) -> list[int]:
    """Return the places of the lines that open a group of products without a fence above."""
    unfenced, is_fenced = [], False
    for place, line in enumerate(map(str.strip, ptx.splitlines())):
        if line.startswith(PRODUCT) and not is_fenced:
            unfenced.append(place)
        is_fenced = line == FENCE or (is_fenced and not WRITE.match(line))
    return unfenced


def add_fences(ptx: str) -> str:
    """Return the PTX with a fence above each group of products that has none."""
    lines = ptx.splitlines(keepends=True)
    for place in reversed(find_unfenced(ptx)):
        lines.insert(place, f"\t{FENCE}\n")
    return "".join(lines)


class FenceStage:
    """Triton's one stage hook while fenced kernels compile.

    Whoever had set a hook is asked first, and has it back once the last compilation is done.
    Threads may compile at the same time: those of other kernels pass unchanged.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._threads: list[int] = []
        self._theirs: Any = None

    @contextmanager
    def set(self) -> Iterator[None]:
        """Let kernels that this thread compiles inside have the fences."""
        thread = get_ident()
        with self._lock:
            self._threads.append(thread)
            if knobs.runtime.add_stages_inspection_hook is not self:
                self._theirs = knobs.runtime.add_stages_inspection_hook
                knobs.runtime.add_stages_inspection_hook = self
        try:
            yield
        finally:
            with self._lock:
                self._threads.remove(thread)
                if not self._threads and knobs.runtime.add_stages_inspection_hook is self:
                    knobs.runtime.add_stages_inspection_hook = self._theirs

    def __call__(self, *arguments: Any) -> Any:
        """Do as Triton asks: name a cache key when there are no arguments, else add a stage."""
        key = self._theirs(*arguments) if self._theirs is not None else None
        if not arguments:
            return ("", "") if key is None else key
        stages = arguments[1]  # of backend, stages, options, language, capability
        if get_ident() in self._threads:
            make_ptx = stages["ptx"]
            stages["ptx"] = lambda source, metadata: add_fences(make_ptx(source, metadata))
        return None


FENCE_STAGE = FenceStage()  # Triton has one hook


class FencedFunction(JITFunction):
    """A kernel whose compilations pass the fences' stage, if its spec says so.

    They do wherever they are asked for: by a launch, a warm-up, or a thread of Triton's pool. A
    launch of what is compiled costs nothing more.
    """

    @property
    def compile(self) -> Any:
        """Triton's compiler, which create_binder assigns."""
        return self._compile_fenced

    @compile.setter
    def compile(self, compile: Any) -> None:
        self._compile = compile

    def _compile_fenced(self, source: Any, **options: Any) -> Any:
        specs = [one for one in source.constants.values() if isinstance(one, KernelSpec)]
        if not any(spec.fenced for spec in specs):
            return self._compile(source, **options)
        with FENCE_STAGE.set():
            return self._compile(source, **options)


def fence_compilations(kernel: object, version: str) -> None:
    """Turn a kernel into a :class:`FencedFunction` where Triton needs it.

    Args:
        kernel: decorated by ``triton.jit``. An interpreted one stays as it is.
        version: of Triton.
    """
    if type(kernel) is JITFunction and needs_fences(version):
        # In place: whoever imports the kernel shall compile it with its fences.
        kernel.__class__ = FencedFunction
