"""What a run says as it goes: a log of JSON lines, few printed lines, and a verdict."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from perf.gpu.steps import Outcome

# Of what a run prints, the verdict, which comes last, is not counted.
MOST_LINES, VERDICT_LINES, LINE_LETTERS = 150, 25, 160
SHOWN_LINES = 12  # of what a failed step has to say


class Journal:
    """The log of a run, on disk and on the screen."""

    def __init__(self, out: Path, name: str) -> None:
        """Begin the log.

        Args:
            out: folder for the log and the verdict.
            name: of the run.
        """
        self.name, self.out = name, out
        self.log, self.verdict_path = out / f"{name}.log", out / f"{name}.verdict.txt"
        self.began = time.monotonic()
        self.printed = 0
        self.outcomes: list[Outcome] = []
        self.log.write_text("")

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome: a line of the log at once, and a few on the screen."""
        self.outcomes.append(outcome)
        line = {"at_s": round(self.seconds, 1), "step": outcome.step, "verdict": outcome.verdict,
                "seconds": round(outcome.seconds, 1), "text": outcome.text,
                "details": outcome.details}  # fmt: skip
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        shown = outcome.text.splitlines() or [""]
        head = f"[{self.seconds:5.1f} s] {outcome.verdict:7} {outcome.step}"
        self.say(f"{head}, {outcome.seconds:.1f} s: {shown[0]}")
        for text in shown[1:][-SHOWN_LINES:] if outcome.is_bad else shown[1:3]:
            self.say(f"    {text}")

    def say(self, text: str) -> None:
        """Print a line, unless there were too many."""
        self.printed += 1
        if self.printed <= MOST_LINES - VERDICT_LINES:
            print(text[:LINE_LETTERS], flush=True)

    def write_verdict(self, why_stopped: str = "") -> list[str]:
        """Write the verdict and return its lines.

        Args:
            why_stopped: what ended the run from outside; "" for nothing.
        """
        bad = [outcome for outcome in self.outcomes if outcome.is_bad]
        skipped = [outcome.step for outcome in self.outcomes if outcome.verdict == "skipped"]
        passed = sum(outcome.verdict == "passed" for outcome in self.outcomes)
        good = not bad and not why_stopped and not skipped
        word = "PASSED" if good else "FAILED" if bad or why_stopped else "INCOMPLETE"
        lines = [f"{word} {self.name}: {passed} steps passed in {self.seconds:.0f} s"]
        lines += [f"stopped: {why_stopped}"] * bool(why_stopped)
        lines += [f"{one.verdict} {one.step}: {first_of(one.text)}" for one in bad]
        lines += [f"skipped: {', '.join(skipped)}"] * bool(skipped)
        lines = [line[: 3 * LINE_LETTERS] for line in lines[: VERDICT_LINES - 2]]
        self.verdict_path.write_text("\n".join(lines) + "\n")
        return lines

    def print_last(self, lines: Iterable[str]) -> None:
        """Print the end of the run, which no earlier line can crowd out."""
        for line in lines:
            print(line, flush=True)


def first_of(text: str) -> str:
    """Return the first line of a text that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no word")
