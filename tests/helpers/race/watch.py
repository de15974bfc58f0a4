"""Watch one launch of any interpreted kernel, and refuse what is left to luck in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.errors import InterpreterError

from tests.helpers.race.check import Check
from tests.helpers.race.events import LOAD, RaceError
from tests.helpers.race.grid import programs_run_by
from tests.helpers.race.memory import Memory, Region, poisoned_allocations, regions_of
from tests.helpers.race.record import Recorder


@dataclass
class Watch:
    """Runs the programs as the interpreter does, under a recorder; keeps their arguments."""

    recorder: Recorder
    regions: list[Region] = field(default_factory=list)

    def prepare(self, arguments: dict[str, Any]) -> None:
        """Keep every tensor, and let nothing beyond them be touched."""
        for name, argument in arguments.items():
            self.regions += regions_of(name, argument)
        memory = Memory(self.regions, 1)
        self.recorder.is_inside = lambda *access: not memory.outside(*access).size

    def run(self, program: Callable[[], None]) -> None:
        """Run one program."""
        with self.recorder.recording():
            program()


def watch(
    call: Callable[[], Any],
    recorder: Recorder,
    scratch: Callable[[], list[Tensor]] = list,
) -> tuple[Any, Check]:
    """Return what ``call`` returns, which makes one launch, and the check of that launch.

    Tensors that ``call`` allocates without a value are the launch's outputs: it has to write all
    of them.

    Args:
        call: makes one launch, on the CPU.
        recorder: a new one.
        scratch: returns tensors that hold no value before the launch and need none after it.
    """
    watching = Watch(recorder)
    with poisoned_allocations() as made, programs_run_by(watching):
        result = run(call, recorder)
    for region in watching.regions:
        region.unfilled = any(holds(tensor, region) for tensor in [*made, *scratch()])
    memory = Memory(watching.regions, min(event.size for event in recorder.events))
    check = Check(memory, recorder.events, recorder.names)
    check.findings += unwritten_outputs(check, scratch())
    return result, check


def run(call: Callable[[], Any], recorder: Recorder) -> Any:
    """Make the launch.

    Raises:
        RaceError: if it was about to touch what is no tensor of it.
    """
    try:
        return call()
    except InterpreterError as error:
        if recorder.outside is None:
            raise
        raise RaceError([recorder.outside]) from error


def holds(tensor: Tensor, region: Region) -> bool:
    """Whether a region lies in a tensor's memory."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() <= region.start < storage.data_ptr() + storage.nbytes()


def unwritten_outputs(check: Check, scratch: list[Tensor]) -> list[str]:
    """Name the outputs of which the launch left an element without a value."""
    written = np.zeros(check.memory.num_units, bool)
    for event, units in zip(check.events, check.touched, strict=True):
        if event.kind != LOAD:
            written[units] = True
    findings = []
    for region, first, end in check.memory.spans():
        is_output = region.unfilled and not any(holds(tensor, region) for tensor in scratch)
        if is_output and not written[first:end].all():
            place = first + int(written[first:end].argmin())
            findings.append(f"nobody wrote {check.memory.describe(place)}")
    return findings
