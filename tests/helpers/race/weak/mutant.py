"""What a weakness of the kernel is: a change of its text, and what must be said about it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.helpers.race.weak.mutate import mutated

# A function's dotted name, a text that it holds once, and what takes the text's place.
Edit = tuple[str, str, str]

ORDER = "megakernel.plan.order"
KERNEL = "megakernel.device.kernel.moe_kernel"
QUEUE = "megakernel.device.queue"
ROUTE = "megakernel.device.route"
DISPATCH = "megakernel.device.dispatch"
FFN = "megakernel.device.ffn"
COMBINE = "megakernel.device.combine"

UNSURE = "no wait is sure to see its signal"
EARLY = "its signal comes too early"
STALLS = "waited for counter"
UNWRITTEN = "which nobody has written"


@dataclass(frozen=True)
class Mutant:
    """One weakness, and what must notice it.

    Attributes:
        name: what is weakened; the test that kills it is ``test_mutant_is_refused[name]``.
        finding: what is said about it, a regular expression.
        edits: of device functions.
        launch: the watched launch that shows it, see launches.py.
        tasks_per_worker: 1, unless it takes a worker's second task to show; None for no limit.
        polls_fail: whether every wait has to poll twice.
        sampled: whether ``make test`` runs it.
    """

    name: str
    finding: str
    edits: tuple[Edit, ...]
    launch: str = "live"
    tasks_per_worker: int | None = 1
    polls_fail: bool = False
    sampled: bool = False

    @property
    def places(self) -> list[str]:
        """The functions it changes, each once, without the name of the package."""
        names = [place.removeprefix("megakernel.") for place, _, _ in self.edits]
        return list(dict.fromkeys(names))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Weaken the kernel inside a ``with``."""
        with ExitStack() as stack:
            for place, old, new in self.edits:
                stack.enter_context(mutated(place, old, new))
            yield


def edited(name: str, finding: str, place: str, old: str, new: str, **more: object) -> Mutant:
    """Make a mutant of one edit."""
    return Mutant(name, finding, ((place, old, new),), **more)  # type: ignore[arg-type]


def weak(name: str, old: str, new: str, reads: str, **more: object) -> Mutant:
    """Change what a task waits for; it then reads something that may not be there yet."""
    finding = f"reads .*{reads}.*{UNSURE}"
    return edited(name, finding, f"{ORDER}.wait_of", old, new, **more)
