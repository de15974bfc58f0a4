"""A step's process: started early, let go, watched, and ended with all its children."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from perf.gpu.child import NOTES, REPORT
from perf.gpu.steps import Outcome, Step
from perf.sources import ROOT

LOOK_S = 0.05
# A process that the driver holds may outlive its kill: nobody waits longer for it.
MOST_DYING_S = 5.0
TAIL_LINES, STACK_LINES, LINE_LETTERS = 15, 6, 200


@dataclass(frozen=True)
class Setting:
    """Where a run's processes work and how.

    Attributes:
        work: folder of the run.
        cache: of Triton, at the same path in every run that shall find what it holds.
        rehearse: whether tiny shapes run on the CPU.
        faults: planted ones, by the name of the step.
    """

    work: Path
    cache: Path
    rehearse: bool = False
    faults: dict[str, str] = field(default_factory=dict)

    def environment(self, step: Step) -> dict[str, str]:
        """Return what a step's process finds in its environment."""
        mine = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",  # a stack when it is aborted
            "TQDM_DISABLE": "1",
            "TRITON_CACHE_DIR": str(self.cache),
        }
        environment = {name: text for name, text in os.environ.items() if name not in mine}
        environment.pop("TRITON_INTERPRET", None)
        if self.rehearse and step.interprets:
            mine["TRITON_INTERPRET"] = "1"
        return environment | mine

    def command(self, step: Step, folder: Path) -> list[str]:
        """Return the command line of a step's process."""
        command = [sys.executable, "-m", "perf.gpu.child", str(folder), "--work", str(self.work)]
        if self.rehearse:
            command.append("--rehearse")
        if fault := self.faults.get(step.name):
            command += ["--fault", fault]
        return [*command, step.call, *step.arguments]


class Child:
    """A process that has imported what its step needs, and waits to be let go."""

    def __init__(self, step: Step, setting: Setting) -> None:
        """Start it in a session of its own, so that its children can be ended with it."""
        self.step = step
        self.folder = setting.work / "steps" / step.name
        self.folder.mkdir(parents=True)
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                setting.command(step, self.folder),
                cwd=ROOT,
                env=setting.environment(step),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        self.stdin = self.process.stdin
        self.started = self.spoke = time.monotonic()
        self.spoken_bytes = 0
        self.has_begun = False

    def go(self) -> None:
        """Let the step begin; its time counts from now."""
        self.has_begun = True
        self.started = self.spoke = time.monotonic()
        with suppress(OSError):  # it has ended already, which its outcome will say
            self.stdin.write(b"go\n")
            self.stdin.flush()

    def wait(self, end: float) -> Outcome:
        """Wait until it ends, is silent or late; whatever it started ends with it.

        Args:
            end: ``time.monotonic()`` until which it may run, whatever its own limit is.
        """
        end = min(end, self.started + self.step.limit_s)
        reason = ""
        while self.process.poll() is None and not reason:
            time.sleep(LOOK_S)
            reason = self.why_too_long(end)
        seconds = time.monotonic() - self.started
        if reason:
            self.abort()
        self.kill()
        return self.outcome(reason, seconds)

    def why_too_long(self, end: float) -> str:
        """Return why the process must end now, or nothing."""
        now, written = time.monotonic(), self.log.stat().st_size
        if written != self.spoken_bytes:
            self.spoke, self.spoken_bytes = now, written
        if now > end:
            return f"not done after {now - self.started:.0f} s"
        if now - self.spoke > self.step.silence_s:
            return f"silent for {self.step.silence_s:.0f} s"
        return ""

    def abort(self) -> None:
        """Ask for the stack of every thread, which says where it hangs."""
        self.process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)

    def kill(self) -> None:
        """End the process and all of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(MOST_DYING_S)
        with suppress(OSError):
            self.stdin.close()

    def outcome(self, too_long: str, seconds: float) -> Outcome:
        """Say what became of the step, by its report, else by the end of its log."""
        name, path = self.step.name, self.folder / REPORT
        if too_long:
            return Outcome(name, "hung", seconds, f"{too_long}: {self.last_words()}")
        if not path.exists():
            status = self.process.returncode
            return Outcome(name, "died", seconds, f"exit status {status}: {self.last_words()}")
        report = json.loads(path.read_text())
        verdict = "passed" if report["ok"] else "failed"
        return Outcome(name, verdict, seconds, report["text"], report.get("details"))

    def last_words(self) -> str:
        """Return the most telling line, then the end of the log, the stack, and the notes."""
        notes = self.folder / NOTES
        noted = notes.read_text().splitlines() if notes.exists() else []
        ends, stack = tail(self.log), stack_in(self.log)
        telling = [*noted[-1:], *stack[:1], *ends[-1:], "no word"][0]
        return "\n".join([telling, *ends, *stack, *noted])


def tail(log: Path) -> list[str]:
    """Return the last lines of a log, long ones cut."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return [line[:LINE_LETTERS] for line in lines]


def stack_in(log: Path) -> list[str]:
    """Return where the main thread was when its process was aborted, innermost call first."""
    _, found, stack = log.read_text(errors="replace").rpartition("\nCurrent thread")
    return [line.strip() for line in stack.splitlines()[1 : 1 + STACK_LINES]] if found else []
