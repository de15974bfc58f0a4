"""The demo's training step: forward and backward of some micro-batches, whoever computes them.

The gradient of a step is the mean of its micro-batches' gradients. No plan may change a bit of it,
so the step is made without one, under one and under another.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
Placements = Sequence[Placement] | None  # of a micro-batch's layers


@dataclass(frozen=True)
class Trained:
    """One micro-batch, forward and backward.

    Attributes:
        loss: as computed.
        gradients: of every parameter, by its name.
        launches: (of the forward, of the backward) of each layer.
        seconds: of the wall clock.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    launches: list[tuple[int, int]]
    seconds: float


@dataclass(frozen=True)
class Way:
    """A training step by one of the ways to compute it.

    Attributes:
        name: who computed it, under which plan.
        loss: mean over the micro-batches.
        gradients: the same.
        launches: of each micro-batch, see :class:`Trained`.
        seconds: of the wall clock, in all.
    """

    name: str
    loss: Tensor
    gradients: dict[str, Tensor]
    launches: list[list[tuple[int, int]]]
    seconds: float


def train_on(model: DemoModel, batch: MicroBatch, layers: Sequence[MoELayer]) -> Trained:
    """Run a micro-batch forward and backward through the given layers."""
    start = time.perf_counter()
    counters = [TrainedLayer(layer) for layer in layers]
    loss = policy_loss(model(batch.byte_GS[:, :-1], counters).logits_GSU, batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return Trained(
        loss.detach(),
        dict(zip(names, gradients, strict=True)),
        [(len(counter.forward), len(counter.backward)) for counter in counters],
        time.perf_counter() - start,
    )


def train_in_kernel(model: DemoModel, batch: MicroBatch, placements: Placements) -> Trained:
    """Do so in the megakernel, the recorded routing replayed under a plan or none."""
    return train_on(model, batch, megakernel_layers(model, batch.expert_of_TLK, placements))


def train_in_reference(name: str, model: DemoModel, batches: Sequence[MicroBatch]) -> Way:
    """Make a step in plain PyTorch, in the model's dtype, with the recorded experts."""
    layers = [reference_layers(model, batch.expert_of_TLK) for batch in batches]
    return gather(name, [train_on(model, *given) for given in zip(batches, layers, strict=True)])


def train_all_ways(
    model: DemoModel,
    batches: Sequence[MicroBatch],
    placements_of_way: Mapping[str, Sequence[Placements]],
    num_processes: int,
) -> list[Way]:
    """Make the same step in the megakernel under each plan.

    Args:
        model: float32, asking for gradients; left as it is.
        batches: micro-batches of the step.
        placements_of_way: for each way, the placements of each micro-batch.
        num_processes: that share the work; 1 for this one alone.
    """
    num_ways = len(placements_of_way)
    placements = [placed for of_batches in placements_of_way.values() for placed in of_batches]
    jobs = [model] * len(placements), list(batches) * num_ways, placements
    with (
        mapper(num_processes) as spread,
        progress_bar(
            spread(train_in_kernel, *jobs),
            total=len(placements), desc="training step", unit="micro-batch",
        ) as done,
    ):  # fmt: skip
        trained = list(done)
    size = len(batches)
    return [
        gather(name, trained[place * size : (place + 1) * size])
        for place, name in enumerate(placements_of_way)
    ]


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


def gather(name: str, trained: Sequence[Trained]) -> Way:
    """Return the step that some micro-batches are."""
    gradients = {
        key: torch.stack([one.gradients[key] for one in trained]).mean(0)
        for key in trained[0].gradients
    }
    return Way(
        name,
        torch.stack([one.loss for one in trained]).mean(),
        gradients,
        [one.launches for one in trained],
        sum(one.seconds for one in trained),
    )


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


def same_gradients(one: Way, other: Way) -> bool:
    """Whether two steps have the same bits in loss and gradients; NaN is equal to nothing."""
    pairs = [(one.gradients[name], other.gradients[name]) for name in one.gradients]
    return all(torch.equal(*pair) for pair in [(one.loss, other.loss), *pairs])


def find_step_failures(truth: Way, eager: Way, ways: Sequence[Way]) -> list[str]:
    """Return what a step should have shown and did not.

    Args:
        truth: in float64.
        eager: plain PyTorch in the dtype of the ways.
        ways: the megakernel's, the first of them without a plan.
    """
    limits = {kind: MOST_TIMES_EAGER_ERROR * off for kind, off in errors(eager, truth).items()}
    failures = [
        f"{way.name}: error {off:.1e} of the gradient of {kind} is over {limits[kind]:.1e}"
        for way in ways
        for kind, off in errors(way, truth).items()
        if not off <= limits[kind]
    ]
    failures += [
        f"{way.name}: layer {layer} took {launches} launches, forward and backward"
        for way in ways
        for of_layers in way.launches
        for layer, launches in enumerate(of_layers)
        if launches != (1, 1)
    ]
    first, *others = ways
    failures += [
        f"{way.name}: the plan changed the bits of the gradients"
        for way in others
        if not same_gradients(first, way)
    ]
    return failures


def take_step(model: DemoModel, way: Way, batches: Sequence[MicroBatch]) -> Tensor:
    """Let AdamW change the model by a step's gradients; return the new loss, by the reference."""
    for name, parameter in model.named_parameters():
        parameter.grad = way.gradients[name].clone()
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE).step()
    return train_in_reference("after", model, batches).loss
