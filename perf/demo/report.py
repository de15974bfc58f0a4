"""What the demo prints: a section per step, so that each claim stands beside its figures."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from balance import Plan
from balance.measures.load import imbalance
from perf.demo.compare import Drift, Forward, same_bits
from perf.demo.policy import MicroBatch
from perf.demo.rollout import Rollouts
from perf.demo.step import LEARNING_RATE, Way, errors, same_gradients


def show_model(card_path: Path, device: str) -> None:
    """Print where this runs, and what the model was trained on and reached."""
    card = json.loads(card_path.read_text())
    losses = ", ".join(f"{k} {v:.2f}" for k, v in card["held_out_loss_nats_per_byte"].items())
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton interpreter"
    print(f"{name} | torch {torch.__version__} | Python {platform.python_version()}")
    print(f"Model: bytes of {card['interpreter']}'s library; held-out nats per byte: {losses}")


def show_rollouts(kinds: Sequence[str], rollouts: Rollouts) -> None:
    """Print the first rollout of every prompt, the generated part after a bar."""
    tokens = rollouts.expert_of_TLK.shape[0]
    print(f"\n1. Rollouts in bfloat16: {len(rollouts.byte_GS)} sequences, {tokens} bytes recorded")
    first = rollouts.config.prompt_bytes
    for prompt, kind in enumerate(kinds):
        sequence = bytes(rollouts.byte_GS[rollouts.micro_batch(prompt)][0].tolist())
        print(f"   {kind:9}  {_readable(sequence[:first])}|{_readable(sequence[first:])}")


def show_drift(drift: Drift) -> None:
    """Print why recorded choices are replayed: what a free router would do instead."""
    print("\n2. Training side in float32, all rollouts, reference layers")
    print(f"   a free router reroutes {drift.rerouted:.1%} of the (byte, layer) pairs")
    print(
        "   log probability of sampled bytes, mean distance to the rollout's: "
        f"{drift.gap_free:.4f} nats with a free router, {drift.gap_replayed:.4f} replayed"
    )


def show_balance(
    kinds: Sequence[str], load_BLE: np.ndarray, before_BLR: np.ndarray, after_BLR: np.ndarray
) -> None:
    """Print max / mean over experts, over ranks as they come, and over ranks as planned."""
    columns = [imbalance(load) for load in (load_BLE, before_BLR, after_BLR)]
    num_ranks = before_BLR.shape[-1]
    print(f"\n3. Recorded load, max / mean by layer (1 is best), and {num_ranks} virtual ranks")
    _print_row("micro-batch", ["over experts", "ranks, in order", "ranks, planned"])
    for kind, *ratios in zip(kinds, *columns, strict=True):
        _print_row(kind, [_listed(ratio_L) for ratio_L in ratios])
    _print_row("mean, worst", [_mean_worst(ratio_BL) for ratio_BL in columns])


def show_plan(plan: Plan) -> None:
    """Print what the plan changes and how close it is to the best possible."""
    figures = plan.summary()
    print(
        f"   the plan, in {figures['plan_seconds'] * 1e3:.0f} ms: {figures['moves_avg']:.0f} home"
        f" moves a layer, {figures['copies_avg']:.1f} copies a micro-batch and layer;"
        f" {figures['gap_avg']:.1%} over the proven lower bound (worst {figures['gap_worst']:.1%})"
    )


def show_forwards(kind: str, forwards: Sequence[Forward]) -> None:
    """Print one row per pass: error against float64, launches, bits, seconds or layer times."""
    tokens = forwards[0].logits_GSU.shape[:2].numel()
    print(f"\n4. Training-side forward of micro-batch “{kind}”, {tokens} tokens, float32")
    counted = "launches" if forwards[0].logits_GSU.is_cuda else "Triton launches"
    print(f"   {'':31}{'error vs float64':18}{counted + ', by layer':27}time")
    for one in forwards:
        launches = " ".join(str(layer.launches) for layer in one.layers)
        print(f"   {one.name:31}{one.relative_error:<18.1e}{launches:27}{_time(one)}")
    if not forwards[0].logits_GSU.is_cuda:
        print("   (the megakernel's seconds are the interpreter's; they say nothing of a GPU)")
    bits = "the same bits" if same_bits(forwards[-2], forwards[-1]) else "DIFFERENT bits"
    print(f"   logits with and without the plan's placement: {bits}")


def show_step(
    kinds: Sequence[str], batches: Sequence[MicroBatch], truth: Way, ways: Sequence[Way]
) -> None:
    """Print one row per way to make a training step: error of gradients, launches, loss.

    Args:
        kinds: names of the micro-batches.
        batches: the micro-batches.
        truth: the step in float64.
        ways: plain PyTorch first, then the megakernel without a plan, then under plans.
    """
    tokens = sum(len(batch.expert_of_TLK) for batch in batches)
    named = ", ".join(f"“{kind}”" for kind in kinds)
    print(f"\n5. Training step under replay: micro-batches {named}, {tokens} tokens, float32")
    print("   policy gradient, advantages within a prompt; reward: share of different bytes")
    print(f"   {'':33}error of the gradient of … vs float64, and launches of all {len(kinds)}")
    kernels = "Triton launches" if not truth.loss.is_cuda else "launches"
    kinds_of_weight = [kind.replace("_weight", "") for kind in errors(truth, truth)]
    _print_cells("", [*kinds_of_weight, f"{kernels}, by layer, forward + backward"])
    for way in ways:
        _print_cells(way.name, [*_errors_of(way, truth), _launches_of(way)])
    if not truth.loss.is_cuda:
        seconds = ", ".join(f"{way.seconds:.0f}" for way in ways[1:])
        print(
            f"   (in the interpreter {seconds} s, shared by processes; they say nothing of a GPU)"
        )
    plain, *planned = ways[1:]
    same = all(same_gradients(plain, way) for way in planned)
    bits = "the same bits" if same else "DIFFERENT bits"
    print(f"   gradients of all parameters without a plan and under both plans: {bits}")


def show_update(before: Tensor, after: Tensor) -> None:
    """Print the loss before and after the optimizer's step."""
    print(f"   AdamW, learning rate {LEARNING_RATE}: loss {before:.4f} -> {after:.4f}")


def _errors_of(way: Way, truth: Way) -> list[str]:
    return [f"{off:.1e}" for off in errors(way, truth).values()]


def _launches_of(way: Way) -> str:
    return " | ".join(" ".join(f"{f}+{b}" for f, b in of_layers) for of_layers in way.launches)


def _print_cells(name: str, cells: Sequence[str]) -> None:
    *narrow, wide = cells
    print(f"   {name:33}{''.join(f'{cell:12}' for cell in narrow)}{wide}")


def _time(one: Forward) -> str:
    if not one.logits_GSU.is_cuda:
        return f"{one.seconds:.2f} s"
    return " ".join(f"{layer.time_us():.0f}" for layer in one.layers) + " us by layer"


def _print_row(name: str, cells: Sequence[str]) -> None:
    print(f"   {name:13}{''.join(f'{cell:22}' for cell in cells)}".rstrip())


def _listed(ratio_L: np.ndarray) -> str:
    return "  ".join(f"{ratio:.2f}" for ratio in ratio_L)


def _mean_worst(ratio_BL: np.ndarray) -> str:
    return f"{ratio_BL.mean():.2f}, {ratio_BL.max():.2f}"


def _readable(text: bytes) -> str:
    return text.decode(errors="replace").replace("\n", "⏎")
