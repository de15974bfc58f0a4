"""Steps of AdamW on the demo's model: eager's losses within noise, and no bit from the plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from balance import Topology, Trace, make_plan
from megakernel import Placement
from perf.demo.layers import MegakernelLayer, ReferenceLayer
from perf.demo.model import DemoModel, ModelConfig, MoELayer
from perf.demo.train import TrainConfig, make_optimizer, next_byte_loss
from tests.helpers.compare import assert_same_bits

LayersOfStep = Callable[[int], Sequence[MoELayer]]
SEQUENCES, LENGTH = 2, 8
NUM_TOKENS = SEQUENCES * LENGTH


@dataclass(frozen=True)
class Length:
    """How long a run is, and of which model."""

    steps: int
    model: ModelConfig

    def __str__(self) -> str:
        return f"{self.steps} steps"


SIZES = {"hidden": 32, "num_heads": 2, "top_k": 2, "intermediate": 16}
SHORT = Length(3, ModelConfig(num_layers=1, num_experts=3, **SIZES))
LONG = Length(30, ModelConfig(num_layers=2, num_experts=6, **SIZES))
LENGTHS = pytest.mark.parametrize(
    "length", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=str
)


@dataclass(frozen=True)
class Run:
    """Losses of the steps, and the weights after the last."""

    losses: Tensor
    weights: dict[str, Tensor]


def move_by_one_rounding(model: DemoModel, generator: torch.Generator) -> None:
    """Move each weight to the next float32 above or below."""
    for weight in model.parameters():
        up = torch.rand(weight.shape, generator=generator) < 0.5
        weight.data = torch.nextafter(weight.data, torch.where(up, torch.inf, -torch.inf))


def train(length: Length, layers_of_step: LayersOfStep, seed: int | None = None) -> Run:
    """Take steps of AdamW as the demo's training does, on random bytes, from the same weights.

    Args:
        length: how many, and of which model.
        layers_of_step: who computes its sparse layers.
        seed: how each step moves each weight by one rounding; None for not at all.
    """
    torch.manual_seed(0)
    model, losses = DemoModel(length.model), []
    optimizer = make_optimizer(model, TrainConfig())
    texts, moves = (torch.Generator().manual_seed(number) for number in (5, seed or 0))
    for step in range(length.steps):
        if seed is not None:
            move_by_one_rounding(model, moves)
        byte_GS = torch.randint(256, (SEQUENCES, LENGTH + 1), generator=texts)
        loss = next_byte_loss(model, byte_GS, layers_of_step(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return Run(torch.stack(losses), dict(model.state_dict()))


@LENGTHS
def test_losses_differ_from_eagers_by_no_more_than_roundings_of_its_weights(
    length: Length,
) -> None:
    """The layer rounds otherwise than eager at each step, so eager's weights are moved at each."""
    config = length.model
    eager = [ReferenceLayer(config.top_k)] * config.num_layers
    fused = [MegakernelLayer(config.top_k, config.num_experts)] * config.num_layers
    expected = train(length, lambda _: eager)
    moved = [train(length, lambda _: eager, seed).losses for seed in range(5)]
    noise = max(float((losses - expected.losses).abs().max()) for losses in moved)
    actual = train(length, lambda _: fused)
    assert float((actual.losses - expected.losses).abs().max()) <= noise
    assert float((expected.losses - expected.losses[0]).abs().max()) > 1000 * noise


@LENGTHS
def test_no_plan_changes_a_bit_of_training_under_replay(length: Length) -> None:
    """Neither of a loss nor of a weight, when each step has a routing and a plan of its own."""
    ids_STLK = draw_ids(length)
    topologies = [None, Topology(1, 1, 2), Topology(1, 3, 1)]
    live, *planned = (
        train(length, lambda step, t=topology: replayed(length.model, ids_STLK[step], t))
        for topology in topologies
    )
    assert len(set(live.losses.tolist())) == length.steps
    for run in planned:
        assert_same_bits(actual=run.losses, expected=live.losses)
        for name, weight in live.weights.items():
            assert_same_bits(actual=run.weights[name], expected=weight)


def draw_ids(length: Length) -> Tensor:
    """Draw what a rollout recorded for each step; the first expert is the favourite."""
    config = length.model
    shape = (length.steps, NUM_TOKENS, config.num_layers, config.num_experts)
    likely = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    likely[..., 0] += 0.5
    return likely.topk(config.top_k).indices


def replayed(
    config: ModelConfig, ids_TLK: Tensor, topology: Topology | None
) -> list[MegakernelLayer]:
    """Return layers that are forced to recorded ids, as a plan for these ids places them."""
    placements: list[Placement | None] = [None] * config.num_layers
    if topology is not None:
        ranks_T = torch.arange(NUM_TOKENS) % topology.num_ranks
        micro_batch_T = torch.zeros_like(ranks_T)
        arrays = (tensor.numpy() for tensor in (ids_TLK, micro_batch_T, ranks_T))
        plan = make_plan(Trace(*arrays, config.num_experts), topology)
        placements = [
            Placement.from_plan(plan, 0, layer, torch.device("cpu"))
            for layer in range(config.num_layers)
        ]
        assert all(p.num_slots > config.num_experts for p in placements if p is not None)
    return [
        MegakernelLayer(config.top_k, config.num_experts, ids_TLK[:, layer], placement)
        for layer, placement in enumerate(placements)
    ]
