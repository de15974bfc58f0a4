"""A run from its first step to its archive; this process never touches the GPU."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perf.gpu.archive import pack
from perf.gpu.journal import Journal
from perf.gpu.process import Child, Setting
from perf.gpu.steps import Outcome, Plan, Step

# Kept for the archive and the last words; of that the alarm leaves the second part.
CLOSING_S, LAST_WORDS_S = 14.0, 9.0
LEAST_S = 4.0  # a step with less is not started
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)


class Stopped(BaseException):
    """The run was told to end; not an Exception, so that nobody takes it for a failure."""


class Runner:
    """Runs the steps of a plan, one after another, and keeps what became of them."""

    def __init__(self, plan: Plan, setting: Setting, journal: Journal) -> None:
        """Start nothing yet."""
        self.plan, self.setting, self.journal = plan, setting, journal
        self.end = journal.began + plan.seconds - CLOSING_S
        self.beside: list[Child] = []
        self.ready: dict[str, Child] = {}
        self.verdicts: dict[str, str] = {}
        self.stopped_by = ""

    def run(self) -> None:
        """Run every step that is due."""
        for place, step in enumerate(self.plan.steps):
            if step.waits and not step.beside and not self.stopped_by:
                self.join()
            if reason := self.why_skipped(step):
                self.close(Outcome(step.name, "skipped", text=reason), step)
                continue
            child = self.ready.pop(step.name, None) or Child(step, self.setting)
            self.ready[step.name] = child  # so that it is ended whatever happens
            child.go()
            if step.beside:
                self.beside.append(child)
                continue
            self.start_next(self.plan.steps[place + 1 :])
            self.close(child.wait(self.end), step)
        if not self.stopped_by:
            self.join()

    def join(self) -> None:
        """Wait for the steps that run beside one another."""
        while self.beside:
            child = self.beside.pop(0)
            self.close(child.wait(self.end), child.step)

    def start_next(self, steps: tuple[Step, ...]) -> None:
        """Let the next step import meanwhile, unless it is one that may well not run."""
        for step in steps:
            if not step.explains:
                if step.name not in self.ready:
                    self.ready[step.name] = Child(step, self.setting)
                return

    def why_skipped(self, step: Step) -> str:
        """Return why a step does not run, or nothing."""
        if step.explains:
            bad = self.verdicts.get(step.explains) in ("failed", "died", "hung")
            return "" if bad else f"{step.explains} needs no explanation"
        if self.stopped_by:
            return f"{self.stopped_by} went wrong"
        left = self.end - time.monotonic()
        return f"{left:.0f} s are left" if left < LEAST_S else ""

    def close(self, outcome: Outcome, step: Step) -> None:
        """Keep an outcome, and let a bad one end the run where the step says so."""
        child = self.ready.pop(step.name, None)
        if child is not None and outcome.verdict == "skipped":
            child.kill()  # it was started early, and waits
        self.verdicts[step.name] = outcome.verdict
        if step.explains and outcome.verdict == "skipped" and not self.stopped_by:
            return
        if outcome.is_bad and step.stops and not self.stopped_by:
            self.stopped_by = step.name
        self.journal.add(outcome)

    def interrupt(self, why: str) -> None:
        """End every process that is still there; what has begun is kept with its last words.

        Args:
            why: what ended the run from outside; "" where a step did, which nothing beside it
                has to answer for.
        """
        for child in self.ready.values():
            child.kill()
            seconds = time.monotonic() - child.started
            if child.has_begun and why:
                self.journal.add(child.outcome(f"stopped: {why}", seconds))
            elif child.has_begun:
                text = f"{self.stopped_by} went wrong"
                self.journal.add(Outcome(child.step.name, "skipped", seconds, text))
        self.ready.clear()
        self.beside.clear()


@contextmanager
def signals_stop(seconds: float) -> Iterator[None]:
    """Raise Stopped, once, on a signal that asks to end, and when the time is up."""

    def stop(number: int, frame: object) -> None:
        ignore_signals()
        raise Stopped("time is up" if number == signal.SIGALRM else signal.Signals(number).name)

    before = {one: signal.signal(one, stop) for one in STOPPING}
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in before.items():
            signal.signal(one, handler)


def ignore_signals() -> None:
    """Let nothing but a kill disturb what follows: the archive is on its way."""
    for one in STOPPING:
        signal.signal(one, signal.SIG_IGN)


def run_plan(plan: Plan, setting: Setting, out: Path) -> int:
    """Run a plan; leave its log, its verdict and its archive, however it ends.

    Args:
        plan: what to run.
        setting: where.
        out: folder of the three files.

    Returns:
        0 when everything passed.
    """
    journal = Journal(out, plan.name)
    runner = Runner(plan, setting, journal)
    why = ""
    with signals_stop(plan.seconds - LAST_WORDS_S):
        try:
            runner.run()
            ignore_signals()
        except Stopped as stopped:
            why = str(stopped)
        except Exception as error:  # ours: what was found until here is still worth its time
            why = f"{type(error).__name__}: {error}"
        runner.interrupt(why)
        return close(plan, setting, journal, why)


def close(plan: Plan, setting: Setting, journal: Journal, why_stopped: str) -> int:
    """Write verdict and archive, and print the verdict last; return the exit status."""
    lines = journal.write_verdict(why_stopped)
    others = (journal.log, journal.verdict_path)
    archive = journal.out / f"{plan.name}.tgz"
    left_out = pack(archive, setting.work, setting.cache, others)
    if left_out:
        journal.say(f"not packed, for its size: {len(left_out)} folders, {left_out[0]} first")
    journal.say(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")
    journal.print_last([*lines[1:], lines[0]])
    return 0 if lines[0].startswith("PASSED") else 1
