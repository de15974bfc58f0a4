"""The demo's comparisons: rollout against training, reference against megakernel, plan or none."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import megakernel
from balance import Plan, Trace
from perf.demo.layers import MegakernelLayer, ReferenceLayer, WatchedLayer, watch
from perf.demo.model import DemoModel, MoELayer
from perf.demo.rollout import Rollouts
from perf.extras import progress_bar

# The kernel may be this much further from float64 than eager PyTorch in the same dtype is.
MOST_TIMES_EAGER_ERROR = 4.0


@dataclass(frozen=True)
class Drift:
    """How far the training side's float32 is from the rollout's bfloat16.

    Attributes:
        rerouted: share of (token, layer) pairs whose set of experts a free router changes.
        gap_free: mean |log p of a sampled byte, training - rollout|, router free, in nats.
        gap_replayed: the same with the recorded experts forced.
    """

    rerouted: float
    gap_free: float
    gap_replayed: float


@dataclass(frozen=True)
class Forward:
    """One training-side forward pass over a micro-batch.

    Attributes:
        name: who computed it, on which route.
        logits_GSU: float32.
        relative_error: max |logit - float64's| / max |float64's logit|, both under this routing.
        seconds: of the wall clock.
        layers: the layers that ran, with their launches counted.
    """

    name: str
    logits_GSU: Tensor
    relative_error: float
    seconds: float
    layers: Sequence[WatchedLayer]


def measure_drift(model: DemoModel, rollouts: Rollouts) -> Drift:
    """Run the training side over all rollouts with the router free and with the ids forced."""
    byte_GS = rollouts.byte_GS[:, :-1]
    free = model(byte_GS, reference_layers(model))
    replayed = model(byte_GS, reference_layers(model, rollouts.expert_of_TLK))
    chosen, recorded = free.expert_of_TLK.sort(-1).values, rollouts.expert_of_TLK.sort(-1).values
    return Drift(
        rerouted=(chosen != recorded).any(-1).double().mean().item(),
        gap_free=logprob_gap(free.logits_GSU, rollouts),
        gap_replayed=logprob_gap(replayed.logits_GSU, rollouts),
    )


def logprob_gap(logits_GSU: Tensor, rollouts: Rollouts) -> float:
    """Mean absolute difference of sampled bytes' log probabilities to the rollout's own."""
    first = rollouts.config.prompt_bytes
    logprob_GSU = logits_GSU[:, first - 1 :].float().log_softmax(-1)
    logprob_GS = logprob_GSU.gather(-1, rollouts.byte_GS[:, first:, None])[..., 0]
    return (logprob_GS - rollouts.sampled_logprob_GS).abs().mean().item()


def rank_loads(trace: Trace, plan: Plan, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Count load_BLR with experts in order over the ranks, and with choices in planned slots."""
    experts_per_rank = trace.num_experts // num_ranks
    shape = (trace.num_micro_batches, trace.num_layers, num_ranks)
    before_BLR, after_BLR = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for batch, layer in np.ndindex(shape[:2]):
        ids_TK = trace.ids_of(batch)[:, layer]
        slots_per_rank = len(plan.expert_of_P(batch, layer)) // num_ranks
        slot_of_TK = np.asarray(plan.slot_of_TK(batch, layer))
        before_BLR[batch, layer] = _count(ids_TK // experts_per_rank, num_ranks)
        after_BLR[batch, layer] = _count(slot_of_TK // slots_per_rank, num_ranks)
    return before_BLR, after_BLR


def forward_all_ways(
    model: DemoModel, oracle: DemoModel, rollouts: Rollouts, plan: Plan, micro_batch: int
) -> list[Forward]:
    """Run one micro-batch through the reference and through the megakernel three times.

    Args:
        model: the training side.
        oracle: the same weights in float64, to compare with.
        rollouts: bytes and recorded routing.
        plan: a plan of that routing.
        micro_batch: which to run.
    """
    byte_GS = rollouts.byte_GS[rollouts.micro_batch(micro_batch), :-1]
    ids_TLK = rollouts.ids_of(micro_batch)
    placement_L = planned_placements(plan, micro_batch, model)
    layers_of_way = {
        "reference, replayed": reference_layers(model, ids_TLK),
        "megakernel, router free": megakernel_layers(model),
        "megakernel, replayed": megakernel_layers(model, ids_TLK),
        "megakernel, replayed, planned": megakernel_layers(model, ids_TLK, placement_L),
    }
    num_calls = len(layers_of_way) * model.config.num_layers
    with progress_bar(total=num_calls, desc="training side", unit="layer") as progress:
        return [
            forward(name, watch(layers, progress.update), model, oracle, byte_GS)
            for name, layers in layers_of_way.items()
        ]


def forward(
    name: str,
    layers: Sequence[WatchedLayer],
    model: DemoModel,
    oracle: DemoModel,
    byte_GS: Tensor,
) -> Forward:
    """Run one way, then float64 over the experts that way used."""
    start = time.perf_counter()
    step = model(byte_GS, layers)
    seconds = time.perf_counter() - start
    truth_GSU = oracle(byte_GS, reference_layers(oracle, step.expert_of_TLK)).logits_GSU
    error = (step.logits_GSU - truth_GSU).abs().max() / truth_GSU.abs().max()
    return Forward(name, step.logits_GSU, error.item(), seconds, layers)


def find_failures(forwards: Sequence[Forward]) -> list[str]:
    """Return what the four passes of :func:`forward_all_ways` should have shown and did not."""
    eager, *kernel = forwards
    limit = MOST_TIMES_EAGER_ERROR * eager.relative_error
    failures = [
        f"{one.name}: error {one.relative_error:.1e} is over {limit:.1e}"
        for one in kernel
        if not one.relative_error <= limit
    ]
    failures += [
        f"{one.name}: layer {layer} took {watched.launches} launches"
        for one in kernel
        for layer, watched in enumerate(one.layers)
        if watched.launches != 1
    ]
    if not same_bits(kernel[1], kernel[2]):
        failures.append("the plan's placement changed the bits of the logits")
    return failures


def same_bits(one: Forward, other: Forward) -> bool:
    """Whether two passes gave equal logits; NaN is equal to nothing."""
    return torch.equal(one.logits_GSU, other.logits_GSU)


def planned_placements(
    plan: Plan, micro_batch: int, model: DemoModel
) -> list[megakernel.Placement]:
    """Hand a plan's maps of all layers to the kernel."""
    return [
        planned_placement(plan, micro_batch, layer, model.embedding_UH.device)
        for layer in range(model.config.num_layers)
    ]


def planned_placement(
    plan: Plan, micro_batch: int, layer: int, device: torch.device
) -> megakernel.Placement:
    """Hand a plan's maps to the kernel."""
    return megakernel.Placement(
        expert_of_P=torch.as_tensor(plan.expert_of_P(micro_batch, layer), device=device),
        slot_of_TK=torch.as_tensor(plan.slot_of_TK(micro_batch, layer), device=device),
    )


def reference_layers(model: DemoModel, ids_TLK: Tensor | None = None) -> list[MoELayer]:
    """One reference layer for each of the model's, with the given ids forced."""
    return [ReferenceLayer(model.config.top_k, ids_TK) for ids_TK in _by_layer(model, ids_TLK)]


def megakernel_layers(
    model: DemoModel,
    ids_TLK: Tensor | None = None,
    placement_L: Sequence[megakernel.Placement] | None = None,
) -> list[MoELayer]:
    """One megakernel layer for each of the model's, its replay tables built."""
    sizes = model.config
    placements: Sequence[megakernel.Placement | None] = placement_L or [None] * sizes.num_layers
    return [
        MegakernelLayer(sizes.top_k, sizes.num_experts, ids_TK, placement)
        for ids_TK, placement in zip(_by_layer(model, ids_TLK), placements, strict=True)
    ]


def _by_layer(model: DemoModel, ids_TLK: Tensor | None) -> Sequence[Tensor | None]:
    return [None] * model.config.num_layers if ids_TLK is None else ids_TLK.unbind(1)


def _count(rank_of_TK: np.ndarray, num_ranks: int) -> np.ndarray:
    return np.bincount(rank_of_TK.ravel(), minlength=num_ranks)
