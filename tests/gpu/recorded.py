"""What the GPU's tests and the ladder will launch, found by running their bodies without a GPU.

Each module is read again with its checks taken out: an ``assert`` is evaluated and forgotten, what
computes a truth returns zeros, and what a graph, a stream or a profiler would do is done at once.
So every call of the layer is made, and written down by :mod:`perf.gpu.recording`.
"""

import ast
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor

from megakernel.launch.call import Call
from perf.gpu.child import Context
from perf.gpu.plans import BACKWARD_LADDER, LADDER
from perf.gpu.recording import recording, untouched
from perf.gpu.testing import DESELECTED

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def like_tokens(inputs: Any, *others: object) -> Tensor:
    """Return zeros of the shape of a layer's output."""
    return torch.zeros_like(inputs.x_TH)


def draw_nothing(*shape: int, std: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return tokens or weights that take no memory."""
    return untouched(*shape, dtype=dtype)


def full_of_nothing(tensor: Tensor, value: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return what takes no memory, in the shape of a tensor."""
    return untouched(*tensor.shape, dtype=dtype or tensor.dtype)


def leaves_without_copies(inputs: Any) -> dict[str, Tensor]:
    """Return a layer's tensors, asking for gradients, as the GPU's tests of training name them."""
    experts = inputs.experts
    tensors = {
        "x": inputs.x_TH, "router": inputs.router_EH, "gate_up": experts.gate_up_E2IH,
        "down": experts.down_EHI,
    }  # fmt: skip
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


# What is looked up where it is defined: truths, comparisons, and what only a GPU has.
STUBS: dict[str, Any] = {
    "tests.gpu.layers.draw": draw_nothing,
    "tests.gpu.layers.eager_rows": like_tokens,
    "tests.gpu.layers.truth_of_tokens": lambda inputs, out, tokens: inputs.x_TH[tokens],
    "tests.gpu.layers.worst_row_error": lambda **tensors: 0.0,
    "tests.gpu.layers.keep_busy": lambda noise: None,
    "tests.gpu.checks.assert_gate_is_right": lambda inputs, out: None,
    "tests.gpu.checks.assert_within": lambda *given: 0.0,
    "tests.gpu.checks.fail": lambda text: None,
    "tests.gpu.gradients.assert_right": lambda *given: 0.0,
    "tests.gpu.gradients.assert_same_gradients": lambda *given: None,
    "tests.gpu.gradients.compare_buffers": lambda *given: None,
    "tests.helpers.compare.relative_error": lambda **tensors: 0.0,
    "tests.helpers.compare.assert_same_bits": lambda **tensors: None,
    "tests.helpers.inputs.eager": like_tokens,
    "tests.helpers.inputs.truth": lambda inputs, ids_TK, renormalize=True: inputs.x_TH,
    "tests.helpers.inputs.poison_scratch": lambda: None,
    "torch.full_like": full_of_nothing,
    "torch.compile": lambda function, **options: function,
    "torch.profiler.profile": MagicMock(),
    "torch.cuda.CUDAGraph": MagicMock(),
    "torch.cuda.Stream": MagicMock(),
    "torch.cuda.graph": MagicMock(),
    "torch.cuda.stream": MagicMock(),
    "torch.cuda.current_stream": MagicMock(),
    "torch.cuda.synchronize": MagicMock(),
    "torch.cuda.memory_stats": MagicMock(),
    "torch.cuda.set_sync_debug_mode": MagicMock(),
}
# What is replaced in the module itself, where it has the name.
NAMES: dict[str, Any] = {
    "device_work": lambda call, trace: [call()],
    "leaves_of": leaves_without_copies,
    "subprocess": MagicMock(),
    "pytest": SimpleNamespace(
        raises=lambda *given, **options: contextlib.suppress(Exception),
        skip=pytest.skip,
    ),
}


class Silent(Context):
    """A step's context where nothing runs and nobody listens."""

    @property
    def device(self) -> torch.device:
        """Where the stand-ins lie."""
        return CPU

    def say(self, text: str) -> None:
        """Print nothing."""


class WithoutChecks(ast.NodeTransformer):
    """Keep what an assertion computes, and forget whether it holds."""

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        """Turn an assertion into the expression that it is about."""
        return ast.copy_location(ast.Expr(node.test), node)


@dataclass
class Recorded:
    """What was heard.

    Attributes:
        calls: of the layer, in order.
        errors: of bodies that ended early, by the name of the test.
        bodies: how many were run.
    """

    calls: list[Call] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    bodies: int = 0

    def run(self, name: str, body: Callable[[], object]) -> None:
        """Run one body; one that ends early is named, and what it called counts."""
        self.bodies += 1
        torch.manual_seed(0)
        try:
            body()
        except pytest.skip.Exception:
            return
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def listening() -> Iterator[Recorded]:
    """Yield a record of all calls that modules loaded in the block make."""
    with contextlib.ExitStack() as stack, recording() as calls:
        for name, value in STUBS.items():
            stack.enter_context(patch(name, value))
        yield Recorded(calls)


def load(path: Path) -> ModuleType:
    """Return a module without its checks, of its own: the one that others import stays whole."""
    tree = ast.fix_missing_locations(WithoutChecks().visit(ast.parse(path.read_text())))
    module = ModuleType(f"{path.stem}_without_checks")
    module.__file__ = str(path)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    for name in NAMES.keys() & module.__dict__.keys():
        setattr(module, name, NAMES[name])
    return module


def record_tests(paths: Sequence[Path] | None = None) -> Recorded:
    """Run the bodies of the GPU's tests, without those that its run leaves out.

    Args:
        paths: of test modules; None for all of this folder.
    """
    with listening() as recorded:
        for path in paths or sorted(HERE.glob("test_gpu_*.py")):
            tests = {name: one for name, one in vars(load(path)).items() if is_selected(name)}
            for name, function in tests.items():
                run_all(recorded, name, function)
    return recorded


def is_selected(name: str) -> bool:
    """Whether a name of a module is a test that the run on a GPU does not leave out."""
    return name.startswith("test_") and name not in DESELECTED


def run_all(recorded: Recorded, name: str, function: Callable[..., object]) -> None:
    """Run a test once for each set of its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        known = {"device": CPU, "cuda": CPU, "tmp_path": Path(folder), "monkeypatch": MagicMock()}
        wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
        for place, chosen in enumerate(parameters_of(function)):
            given = {key: value for key, value in (known | chosen).items() if key in wanted}
            recorded.run(f"{name} {place}", lambda given=given: function(**given))


def parameters_of(function: Callable[..., object]) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each of a test's cases, slow ones left out."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    if any(mark.name == "slow" for mark in getattr(function, "pytestmark", [])):
        return
    for chosen in itertools.product(*(list(cases_of(mark)) for mark in marks)):
        yield {name: value for case in chosen for name, value in case.items()}


def cases_of(mark: pytest.Mark) -> Iterator[dict[str, Any]]:
    """Yield the values of one ``parametrize`` by name."""
    names, values = mark.args[:2]
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    for value in values:
        marks = getattr(value, "marks", ())
        if any(mark.name == "slow" for mark in marks):
            continue
        parts = value.values if hasattr(value, "marks") else value if len(names) > 1 else [value]
        yield dict(zip(names, parts, strict=True))


def record_ladder() -> Recorded:
    """Run the rungs of both ladders that every run climbs."""
    with listening() as recorded, tempfile.TemporaryDirectory() as folder:
        modules = {"tests.gpu.ladder": load(HERE / "ladder.py")}
        modules["tests.gpu.backward_ladder"] = load(HERE / "backward_ladder.py")
        # One launch says what all would; nobody wrote what would be compared.
        replaced = {"program": load(HERE / "smallest.py"), "REPEATS": 1, "count_different": zero}
        for module in modules.values():
            vars(module).update(replaced)
        context = Silent(Path(folder), Path(folder))
        for step in (*LADDER, *BACKWARD_LADDER):
            if not step.explains:
                place, _, name = step.call.partition(":")
                function = getattr(modules[place], name)
                recorded.run(step.name, lambda step=step, f=function: f(context, *step.arguments))
    return recorded


def zero(*given: object) -> Tensor:
    """Return a count of nothing."""
    return torch.zeros(1, dtype=torch.int64)


def calls_of_tests() -> list[Call]:
    """Return the calls of the GPU's tests."""
    return record_tests().calls


def calls_of_ladder() -> list[Call]:
    """Return the calls of the ladder."""
    return record_ladder().calls
