"""The memory of the Python machine: it knows which task wrote each cell, and who may read it.

A task may read what it wrote itself and what was written by tasks that it has waited for, directly
or through others. That is asked of every cell that is read, so a wait that is too weak shows
even where the tasks happen to run in an order that hides it.
"""

import torch
from torch import Tensor

from megakernel.plan.buffers import Buffers, Rows, Saved, Scratch, Sizes, flatten, unflatten
from megakernel.plan.forward import outputs_of
from megakernel.plan.schedule import Schedule
from megakernel.plan.scratch import Shape, scratch_shapes
from megakernel.plan.spec import KernelSpec

UNWRITTEN = -7  # no task leaves it behind
NOBODY = -1
OWNERS = (("scratch", Scratch()), ("rows", Rows()), ("saved", Saved()))
ADDED = ("gradients.gate_up_E2IH", "gradients.down_EHI")  # what a launch may be told to add to

Index = int | slice | Tensor | list[int] | tuple


class Memory:
    """The tensors of a launch, by dotted name, as the task that runs now sees them.

    Attributes:
        spec: shapes and tiles.
        size: the integers of the launch.
        wide: dtype of all arithmetic between a read and a write.
        exact: whether what is written keeps that dtype, so that nothing is rounded.
        is_added: whether gradients of expert weights are added to what is there.
        device: of all tensors.
        values: every tensor; those that the launch writes start as NaN or ``UNWRITTEN``.
        writer: for each of those, the id of the task that wrote each cell, or ``NOBODY``.
    """

    def __init__(
        self,
        arguments: Buffers,
        schedule: Schedule,
        size: Sizes,
        wide: torch.dtype,
        exact: bool = False,
        is_added: bool = False,
    ) -> None:
        """Take over inputs as they are, and make outputs and scratch anew."""
        self.spec: KernelSpec = schedule.spec
        self.size, self.wide, self.exact, self.is_added = size, wide, exact, is_added
        self.values = flatten(arguments)
        tokens = arguments.y_TH if arguments.x_TH is None else arguments.x_TH
        assert tokens is not None
        self.device = tokens.device
        self.writer: dict[str, Tensor] = {}
        for name, (shape, dtype) in self._shapes(schedule, tokens.dtype).items():
            self._make(name, shape, wide if exact and dtype.is_floating_point else dtype)
        if "saved.sigmoid_T" in self.writer:  # a forward keeps it where it works with it
            for tensors in (self.values, self.writer):
                tensors["scratch.sigmoid_T"] = tensors["saved.sigmoid_T"]
        self.begin(NOBODY, 0)

    def _shapes(
        self, schedule: Schedule, dtype: torch.dtype
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return shape and dtype of all that the launch writes, by dotted name."""
        written = outputs_of(self.spec.stages, self.spec.route) & self.values.keys()
        shapes: dict[str, tuple[Shape, torch.dtype]] = {
            name: (self.values[name].shape, self.values[name].dtype) for name in written
        }
        for name, kind in scratch_shapes(schedule, dtype).items():
            owner = next((own for own, record in OWNERS if name in record._fields), None)
            if owner is not None:
                shapes[f"{owner}.{name}"] = kind
        return shapes

    def _make(self, name: str, shape: Shape, dtype: torch.dtype) -> None:
        """Make a tensor that the launch writes; what is added to keeps what it holds."""
        if self.keeps(name):
            self.values[name] = self.values[name].to(dtype, copy=True)
        else:
            fill = torch.nan if dtype.is_floating_point else UNWRITTEN
            self.values[name] = torch.full(shape, fill, dtype=dtype, device=self.device)
        self.writer[name] = torch.full(shape, NOBODY, dtype=torch.int64, device=self.device)

    def begin(self, task_id: int, seen: int) -> None:
        """Make a task the one that reads and writes.

        Args:
            task_id: of the task.
            seen: bit n says that task n came before it, because of waits.
        """
        self.task_id, self.seen = task_id, seen

    def __contains__(self, name: str) -> bool:
        """Whether the launch has a tensor."""
        return name in self.values

    def read(self, name: str, at: Index = ()) -> Tensor:
        """Return cells as ``wide`` floats or int64.

        Raises:
            RuntimeError: if one was not written, or by a task that this one did not wait for.
        """
        if name in self.writer:
            for writer in self.writer[name][at].unique().tolist():
                self._check(writer, f"reads {name}{_index(at)}")
        cells = self.values[name][at]
        return cells.to(self.wide if cells.is_floating_point() else torch.int64)

    def write(
        self, name: str, at: Index, values: Tensor | int | float, again: bool = False
    ) -> None:
        """Round values to the buffer's dtype and store them.

        Raises:
            RuntimeError: if a cell was written before, unless ``again``, which asks that whoever
                wrote it came before.
        """
        writers = self.writer[name][at].unique().tolist()
        for writer in writers if again else set(writers) - {NOBODY}:
            self._check(writer, f"writes {name}{_index(at)} again")
            if not again:
                raise RuntimeError(f"task {self.task_id} writes {name}{_index(at)} twice")
        self.values[name][at] = torch.as_tensor(values).to(self.values[name])
        self.writer[name][at] = self.task_id

    def before(self, name: str, at: Index) -> Tensor:
        """Return cells of an output as they were ahead of the launch."""
        assert bool((self.writer[name][at] == NOBODY).all())
        return self.values[name][at].to(self.wide)

    def rounded_as(self, name: str, values: Tensor) -> Tensor:
        """Return values rounded to the dtype of a tensor, for a product in that dtype."""
        return values if self.exact else values.to(self.values[name].dtype).to(self.wide)

    def _check(self, writer: int, deed: str) -> None:
        if writer == NOBODY:
            raise RuntimeError(f"task {self.task_id} {deed}, which nobody wrote")
        if writer != self.task_id and not self.seen >> writer & 1:
            raise RuntimeError(f"task {self.task_id} {deed} without waiting for task {writer}")

    def written(self, name: str) -> Tensor:
        """Return which cells of a tensor hold a result, were it that of an earlier launch."""
        written = self.writer[name] != NOBODY
        return torch.ones_like(written) if self.keeps(name) else written

    def keeps(self, name: str) -> bool:
        """Whether a launch leaves in a tensor what it does not write over."""
        return self.is_added and name in ADDED

    def buffers(self) -> Buffers:
        """Return all tensors, in the record of a launch."""
        return unflatten(self.values)


def tokens_of(m: Memory, tile: int, height: int) -> range:
    """Return the tokens of a tile."""
    return range(tile * height, min((tile + 1) * height, m.size.num_tokens))


def columns_of(first: int, last: int, width: int, end: int) -> slice:
    """Return the columns of blocks from the first to before the last, none past the end."""
    return slice(min(first * width, end), min(last * width, end))


def span(values: range) -> slice:
    """Return a range as an index."""
    return slice(values.start, values.stop)


def _index(at: Index) -> str:
    parts = at if isinstance(at, tuple) else (at,)
    return "[" + ", ".join(map(str, parts)) + "]" if parts else ""
