"""The demo's training step: forward and backward of some micro-batches, whoever computes them.

The gradient of a step is the mean of its micro-batches' gradients. No plan may change a bit of it,
so a micro-batch is trained again without one and under another.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from megakernel import Placement
from perf.demo.compare import MOST_TIMES_EAGER_ERROR, megakernel_layers, reference_layers
from perf.demo.layers import TrainedLayer
from perf.demo.model import DemoModel, MoELayer
from perf.demo.policy import MicroBatch, policy_loss
from perf.extras import progress_bar

KINDS = ("router_weight", "gate_up", "down", "all others")
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Trained:
    """One micro-batch, forward and backward.

    Attributes:
        name: who computed it, under which plan.
        loss: as computed.
        gradients: of every parameter, by its name.
        launches: (of the forward, of the backward) of each layer.
        seconds: of the wall clock.
    """

    name: str
    loss: Tensor
    gradients: dict[str, Tensor]
    launches: list[tuple[int, int]]
    seconds: float


@dataclass(frozen=True)
class Way:
    """A training step by one of the ways to compute it.

    Attributes:
        name: who computed it.
        loss: mean over the micro-batches.
        gradients: the same.
        parts: the micro-batches.
    """

    name: str
    loss: Tensor
    gradients: dict[str, Tensor]
    parts: list[Trained]


@dataclass(frozen=True)
class Job:
    """A micro-batch to train in the megakernel, the recorded routing replayed.

    Attributes:
        name: of the plan.
        batch: the micro-batch.
        placements: of each layer under the plan; None without one.
    """

    name: str
    batch: MicroBatch
    placements: Sequence[Placement] | None


def train_on(
    name: str, model: DemoModel, batch: MicroBatch, layers: Sequence[MoELayer]
) -> Trained:
    """Run a micro-batch forward and backward through the given layers."""
    start = time.perf_counter()
    counters = [TrainedLayer(layer) for layer in layers]
    loss = policy_loss(model(batch.byte_GS[:, :-1], counters).logits_GSU, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return Trained(
        name,
        loss.detach(),
        dict(zip(names, gradients, strict=True)),
        [(len(counter.forward), len(counter.backward)) for counter in counters],
        time.perf_counter() - start,
    )


def train_in_kernel(model: DemoModel, job: Job) -> Trained:
    """Do so in the megakernel."""
    layers = megakernel_layers(model, job.batch.expert_of_TLK, job.placements)
    return train_on(job.name, model, job.batch, layers)


def train_in_reference(name: str, model: DemoModel, batches: Sequence[MicroBatch]) -> Way:
    """Make a step in plain PyTorch, in the model's dtype, with the recorded experts."""
    parts = [
        train_on(name, model, batch, reference_layers(model, batch.expert_of_TLK))
        for batch in batches
    ]
    return gather(name, parts)


def train_all(model: DemoModel, jobs: Sequence[Job], num_processes: int) -> list[Trained]:
    """Train in the megakernel, with a bar of progress.

    Args:
        model: float32, asking for gradients; left as it is.
        jobs: what to train.
        num_processes: that share the work; 1 for this one alone.
    """
    with (
        mapper(num_processes) as spread,
        progress_bar(
            spread(train_in_kernel, [model] * len(jobs), jobs),
            total=len(jobs), desc="training step", unit="micro-batch",
        ) as done,
    ):  # fmt: skip
        return list(done)


@contextmanager
def mapper(num_processes: int) -> Iterator[Callable[..., Iterable[Trained]]]:
    """Yield a ``map``: this process's own, or one whose calls are spread over new processes.

    The interpreter runs on one core, and micro-batches do not wait for one another.
    """
    if num_processes == 1:
        yield map
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, torch.set_num_threads, (1,)) as pool:
        yield pool.map


def gather(name: str, parts: Sequence[Trained]) -> Way:
    """Return the step that some micro-batches are."""
    gradients = {
        key: torch.stack([part.gradients[key] for part in parts]).mean(0)
        for key in parts[0].gradients
    }
    return Way(name, torch.stack([part.loss for part in parts]).mean(), gradients, list(parts))


def errors(way: Way, truth: Way) -> dict[str, float]:
    """Return |gradient - truth| / |truth| for each of ``KINDS``, over all parameters of a kind.

    "all others" are reached through the gradient of the layers' inputs alone.
    """
    found = {}
    for kind in KINDS:
        names = [name for name in truth.gradients if kind_of(name) == kind]
        ours, true = (
            torch.cat([one.gradients[name].double().flatten() for name in names])
            for one in (way, truth)
        )
        off, size = (ours - true).norm().item(), true.norm().item()
        found[kind] = off / size if size > 0 else off
    return found


def kind_of(name: str) -> str:
    """Return which of ``KINDS`` a parameter belongs to."""
    *_, last = name.split(".")
    return next((kind for kind in KINDS if last.startswith(kind)), KINDS[-1])


def same_gradients(one: Trained, other: Trained) -> bool:
    """Whether loss and gradients have the same bits; NaN is equal to nothing."""
    pairs = [(one.gradients[name], other.gradients[name]) for name in one.gradients]
    return all(torch.equal(*pair) for pair in [(one.loss, other.loss), *pairs])


def find_step_failures(truth: Way, eager: Way, ours: Way, again: Sequence[Trained]) -> list[str]:
    """Return what a step should have shown and did not.

    Args:
        truth: in float64.
        eager: plain PyTorch in the dtype of ours.
        ours: the megakernel's.
        again: our first micro-batch without a plan, or under others.
    """
    limits = {kind: MOST_TIMES_EAGER_ERROR * off for kind, off in errors(eager, truth).items()}
    failures = [
        f"{ours.name}: error {off:.1e} of the gradient of {kind} is over {limits[kind]:.1e}"
        for kind, off in errors(ours, truth).items()
        if not off <= limits[kind]
    ]
    failures += [
        f"{part.name}: layer {layer} took {launches} launches, forward and backward"
        for part in (*ours.parts, *again)
        for layer, launches in enumerate(part.launches)
        if launches != (1, 1)
    ]
    failures += [
        f"{part.name}: other bits of the gradients than {ours.parts[0].name}"
        for part in again
        if not same_gradients(ours.parts[0], part)
    ]
    return failures


def take_step(model: DemoModel, way: Way, batches: Sequence[MicroBatch]) -> Tensor:
    """Let AdamW change the model by a step's gradients; return the new loss, by the reference."""
    for name, parameter in model.named_parameters():
        parameter.grad = way.gradients[name].clone()
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE).step()
    return train_in_reference("after", model, batches).loss
