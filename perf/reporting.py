"""Draw results: latency against T, roofline, skew, makespan, and who does what when.

``python -m perf report RESULTS --out DIR`` draws what the rows allow and writes a table. Timelines
of the workers are the kernel's own where the results hold some, and the simulator's, which say so.
"""

import argparse
import sys
from pathlib import Path

from perf.arguments import count
from perf.problems.cases import SHAPES, Case, make_loads
from perf.results import record, timelines
from perf.results.record import LABEL
from perf.results.report import draw_all
from perf.simulator.predict import predict


def draw_predicted(case: Case, out: Path) -> list[Path]:
    """Draw what the simulator expects of a case, live and replayed; return what was written."""
    load_E, written = make_loads(case), []
    for route in ("live", "replay"):
        prediction = predict(case.model, case.num_tokens, load_E, case.default_config, route)
        title = f"{case.name}, T = {case.num_tokens}, {route}\n{LABEL}"
        saved = timelines.Saved(title, prediction, timelines.PREDICTED)
        path = out / f"timeline_{route}_predicted.png"
        written.append(timelines.plot_timeline(saved, path))
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where results are, where pictures go, and the case of the predicted timeline."""
    parser.add_argument("results", type=Path, nargs="*", help="CSV files or folders of them")
    parser.add_argument("--out", type=Path, default=Path("out/perf"))
    parser.add_argument(
        "--model", choices=SHAPES, default="Qwen3-30B-A3B", help="of the predicted timeline"
    )
    parser.add_argument("--tokens", type=count, default=8192, help="of the predicted timeline")


def run(arguments: argparse.Namespace) -> int:
    """Draw results and timelines, measured and predicted; 2 on files that are not results."""
    folders = [path for path in arguments.results if path.is_dir()]
    try:
        written = draw_all(record.read(arguments.results), arguments.out)
        written += timelines.draw_saved(folders, arguments.out)
    except (ValueError, OSError) as error:
        print(f"perf report: {error}", file=sys.stderr)
        return 2
    case = Case(SHAPES[arguments.model], arguments.tokens, "recorded")
    written += draw_predicted(case, arguments.out)
    for path in written:
        print(path)
    return 0
