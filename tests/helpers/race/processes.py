"""Run the programs of a launch as real processes over shared memory, with random pauses."""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.race.grid import builder, programs_run_by, replaced
from tests.helpers.race.memory import regions_of

PATIENCE_SECONDS = 30
# Chance of a pause before an operation on memory, and its longest: many short ones shuffle the
# workers, a few long ones let the others run through tasks that depend on the sleeper.
PAUSES = ((0.05, 0.002), (0.01, 0.25))
MEMORY_OPERATIONS = (
    "create_masked_load",
    "create_masked_store",
    "create_atomic_rmw",
    "create_atomic_cas",
)


class StuckError(RuntimeError):
    """A worker that did not finish in time, or failed."""


@dataclass
class Processes:
    """Forks one process for each program, once all of them are known.

    The interpreter's atomics are the machine's, so the processes meet in shared memory as thread
    blocks meet in the GPU's.

    Attributes:
        seed: of the pauses.
    """

    seed: int
    programs: list[tuple[tuple[int, int, int], Callable[[], None]]] = field(default_factory=list)

    def prepare(self, arguments: dict[str, Any]) -> None:
        """Move every tensor of the launch to shared memory, in place."""
        for name, argument in arguments.items():
            for region in regions_of(name, argument):
                region.tensor.untyped_storage().share_memory_()

    def run(self, program: Callable[[], None]) -> None:
        """Keep a program; with the last one, run them all."""
        self.programs.append((builder.grid_idx, program))
        if len(self.programs) == builder.grid_dim[0]:
            self._run_all()

    def _run_all(self) -> None:
        fork = multiprocessing.get_context("fork")
        processes = [
            fork.Process(target=self._run_one, args=(index, program), daemon=True)
            for index, program in self.programs
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [process for process in processes if process.is_alive()]
        for process in stuck:
            process.kill()
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            raise StuckError(f"{len(stuck)} workers did not finish, exit codes {failed}")

    def _run_one(self, index: tuple[int, int, int], program: Callable[[], None]) -> None:
        builder.set_grid_idx(*index)
        draw = random.Random(f"{self.seed} {index}")

        def pausing(operation: Callable[..., Any]) -> Callable[..., Any]:
            def pause_first(*args: Any, **named: Any) -> Any:
                for chance, longest_seconds in PAUSES:
                    if draw.random() < chance:
                        time.sleep(draw.random() * longest_seconds)
                return operation(*args, **named)

            return pause_first

        hooks = {name: pausing(getattr(builder, name)) for name in MEMORY_OPERATIONS}
        with replaced(hooks):
            program()


@contextmanager
def as_processes(seed: int) -> Iterator[None]:
    """Run the one launch made inside as processes."""
    with programs_run_by(Processes(seed)):
        yield
