"""List the suites, models, scenarios and providers, and what can run here.

The tables are read from the sources that hold them, and the driver is asked for a GPU: the answer
is there before torch would be imported.
"""

import argparse
import ast
import ctypes

from perf.extras import why_missing
from perf.sources import calls_of, first_line, functions_of, parse
from perf.suites.table import SUITES

PROVIDER_MODULES = ("perf.problems.providers", "perf.problems.training", "perf.problems.peers")
SHAPE_MODULES = ("megakernel.tools.models", "perf.problems.cases")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: there is nothing to choose."""


def run(arguments: argparse.Namespace) -> int:
    """Print what there is, and why some of it cannot run here."""
    print("suites")
    for name, suite in SUITES.items():
        where = "needs a GPU" if suite.needs_gpu else "runs anywhere"
        print(f"  {name:10} {suite.about}; {where}")
    print("models")
    for model, E, K, H, I in list_shapes():
        print(f"  {model:20} E {E:>3}  K {K}  H {H}  I {I}")
    print("scenarios")
    for name, about in list_scenarios().items():
        print(f"  {name:14} {about}")
    print("providers")
    for name, reason in list_providers(sees_gpu()).items():
        print(f"  {name:24} {f'skipped: {reason}' if reason else 'ready'}")
    return 0


def list_shapes() -> list[tuple[str, int, int, int, int]]:
    """Return name, E, K, H and I of every model."""
    shapes = (shape for name in SHAPE_MODULES for shape, _ in calls_of(parse(name), "ModelShape"))
    return [(name, E, K, H, I) for name, E, K, H, I, *_ in shapes]


def list_scenarios() -> dict[str, str]:
    """Return the first line of what each scenario says of itself."""
    tree = parse("perf.problems.cases")
    functions = functions_of(tree)
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SCENARIOS"
    )
    assert isinstance(table, ast.Dict)
    return {
        ast.literal_eval(name): first_line(functions[ast.unparse(function)])
        for name, function in zip(table.keys, table.values, strict=True)
        if name is not None
    }


def list_providers(has_gpu: bool) -> dict[str, str | None]:
    """Return why each provider cannot run here, None for one that can."""
    reason_of = {}
    for module_name in PROVIDER_MODULES:
        for (name, _, *rest), options in calls_of(parse(module_name), "Provider"):
            package = rest[0] if rest else options.get("package")
            reason_of[name] = why_missing(package, options.get("needs_gpu", False), has_gpu)
    return reason_of


def sees_gpu() -> bool:
    """Whether the driver counts a GPU; it answers in milliseconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )
