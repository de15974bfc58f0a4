"""What a run consists of: steps, each a process of its own under a hard time limit."""

from dataclasses import dataclass

# A hung kernel cannot be interrupted, only its process killed: nothing that runs on the GPU may be
# silent, or take, longer than this.
MOST_SILENT_S = 40.0


@dataclass(frozen=True)
class Step:
    """One thing to find out.

    Attributes:
        name: in the log; letters, digits and dashes, since a folder is named after it.
        call: ``module:function``, called with a :class:`perf.gpu.child.Context`.
        arguments: text given to the function after the context.
        limit_s: seconds after which its process group is killed.
        silence_s: seconds without a line of output after which it is killed.
        beside: whether the next steps start meanwhile, up to the first that waits.
        waits: whether all steps that run beside must have ended before it starts.
        stops: whether the run ends with its failure.
        explains: the step after whose failure alone it runs; "" for always.
        interprets: whether its kernels are interpreted in a rehearsal.
    """

    name: str
    call: str
    arguments: tuple[str, ...] = ()
    limit_s: float = MOST_SILENT_S
    silence_s: float = MOST_SILENT_S
    beside: bool = False
    waits: bool = True
    stops: bool = True
    explains: str = ""
    interprets: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        step: its name.
        verdict: "passed", "failed" (it says what is wrong), "died" (it ended without a word),
            "hung" (killed at its limit) or "skipped".
        seconds: how long it ran.
        text: what was seen, the most telling line first.
        details: figures, as the step reported them.
    """

    step: str
    verdict: str
    seconds: float = 0.0
    text: str = ""
    details: dict | None = None

    @property
    def is_bad(self) -> bool:
        """Whether something went wrong."""
        return self.verdict in ("failed", "died", "hung")


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        name: the verb.
        seconds: it is over by then, archive included.
        steps: in order.
    """

    name: str
    seconds: float
    steps: tuple[Step, ...]
