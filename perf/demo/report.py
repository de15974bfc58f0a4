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
from perf.demo.rollout import Rollouts
from perf.demo.step import LEARNING_RATE, Trained, Way, errors, same_gradients


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


def show_step(kinds: Sequence[str], truth: Way, eager: Way, ours: Way) -> None:
    """Print how a training step's gradients compare with float64, and what it launched.

    Args:
        kinds: names of the micro-batches.
        truth, eager, ours: the step in float64, in plain PyTorch, in the megakernel.
    """
    named = ", ".join(f"“{kind}”" for kind in kinds)
    on_gpu = truth.loss.is_cuda
    print(f"\n5. Training step under replay, micro-batches {named}, forward and backward, float32")
    print("   policy gradient, advantages within a prompt; reward: share of different bytes")
    print("   |gradient - float64's| / |float64's| of each kind of weight, and launches:")
    kinds_of_weight = [kind.replace("_weight", "") for kind in errors(truth, truth)]
    counted = "launches" if on_gpu else "Triton launches"
    _print_cells("", [*kinds_of_weight, f"{counted}, by layer, forward + backward"])
    for way in (eager, ours):
        off = [f"{error:.1e}" for error in errors(way, truth).values()]
        _print_cells(way.name, [*off, " | ".join(map(_launches_of, way.parts))])


def show_bits(kind: str, ours: Trained, again: Sequence[Trained]) -> None:
    """Print whether a micro-batch has the same gradients under other plans."""
    print(f"   “{kind}” again, gradients of all parameters beside those under the {ours.name}:")
    for part in again:
        bits = "the same bits" if same_gradients(ours, part) else "DIFFERENT bits"
        print(f"   {part.name:30}{bits:24}{_launches_of(part)}")


def show_update(before: Tensor, after: Tensor) -> None:
    """Print the loss before and after the optimizer's step."""
    print(f"   AdamW, learning rate {LEARNING_RATE}: loss {before:.4f} -> {after:.4f}")


def _launches_of(part: Trained) -> str:
    return " ".join(f"{forward}+{backward}" for forward, backward in part.launches)


def _print_cells(name: str, cells: Sequence[str]) -> None:
    *narrow, wide = cells
    print(f"   {name:30}{''.join(f'{cell:12}' for cell in narrow)}{wide}")


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
