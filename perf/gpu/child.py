"""The door of a step's process: ``python -m perf.gpu.child FOLDER module:function ...``.

It imports what the step needs and waits for a line on standard input before it calls the function:
imports of the next step hide behind the step before, and the time limit counts the work alone.
"""

import argparse
import ctypes
import json
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPORT, NOTES = "report.json", "notes.txt"
FAULTS = ("hang", "wrong", "compile")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Context:
    """What a step is given.

    Attributes:
        folder: its own; what it leaves there is packed.
        work: of the whole run, for what steps hand to later ones.
        rehearse: whether tiny shapes run on the CPU.
        fault: planted on purpose, one of FAULTS; "" for none.
    """

    folder: Path
    work: Path
    rehearse: bool = False
    fault: str = ""

    @property
    def device(self) -> "torch.device":
        """Where kernels run; with an index, as tensors have it."""
        import torch

        if self.rehearse:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def say(self, text: str) -> None:
        """Print a line at once; the supervisor kills what is silent for too long."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Print what must be heard of even if the step is killed later."""
        self.say(text)
        with (self.folder / NOTES).open("a") as notes:
            notes.write(f"{text}\n")

    def read(self, name: str) -> Any:
        """Return what a step before has kept for later ones, None if it has not."""
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def keep(self, name: str, value: Any) -> None:
        """Keep something, as JSON, for later steps."""
        write_at_once(self.work / f"{name}.json", json.dumps(value))


def write_at_once(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Import, wait for the word, run, report; 1 when the function raised."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.child", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("call")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--fault", choices=FAULTS, default="")
    given = parser.parse_args(argv)
    end_with_the_parent()
    module, _, name = given.call.partition(":")
    function = getattr(import_module(module), name)
    if not sys.stdin.readline():  # the supervisor is gone, or does not want this step
        return 1
    context = Context(given.folder, given.work, given.rehearse, given.fault)
    if given.fault == "hang":
        time.sleep(1e6)
    return run(function, context, given.arguments)


def end_with_the_parent() -> None:
    """Die with the supervisor, and leave no image of a process that holds gigabytes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(function: Callable[..., dict | None], context: Context, arguments: Sequence[str]) -> int:
    """Call a step's function and write what it returned or raised."""
    try:
        details = function(context, *arguments) or {}
        report = {"ok": True, "text": details.pop("text", ""), "details": details}
    except Exception as error:  # whatever it is, the supervisor must hear of it
        traceback.print_exc()
        text = str(error) if isinstance(error, AssertionError) else ""
        report = {"ok": False, "text": text or f"{type(error).__name__}: {error}"}
    write_at_once(context.folder / REPORT, json.dumps(report, default=str))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
