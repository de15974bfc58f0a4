"""A trained MoE language model rolls out, and its recorded routing drives the training side.

Rollouts run in bfloat16 and record which experts every byte chose. A plan places experts from that
record. The training side then runs in float32 with the recorded choices forced, its MoE layers
computed by the megakernel: a forward, and a training step of a policy gradient, forward and
backward, without a plan and under two. Both are compared with a float64 reference.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from balance import Plan, Topology, make_plan
from balance.measures.load import imbalance
from perf.demo import report
from perf.demo.compare import (
    find_failures,
    forward_all_ways,
    measure_drift,
    planned_placements,
    rank_loads,
)
from perf.demo.files import CARD, DATA, WEIGHTS
from perf.demo.model import DemoModel, load_model
from perf.demo.picture import draw
from perf.demo.policy import micro_batch_of
from perf.demo.rollout import PROMPT_OF_KIND, RolloutConfig, Rollouts, roll_out
from perf.demo.step import find_step_failures, take_step, train_all_ways, train_in_reference

KINDS = list(PROMPT_OF_KIND)
VIRTUAL_RANKS = 8
OTHER_RANKS = 4  # of a second plan, with as many more spare slots
MICRO_BATCHES = 2  # of the training step
MOST_PROCESSES = 4  # each has its own PyTorch in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, how much it rolls out, and where the picture goes."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo.png"),
        help="picture to write (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=DATA,
        help="folder that perf.demo.train wrote (default: the one in the repository)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=RolloutConfig.samples_per_prompt,
        help="rollouts of each prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--new-bytes",
        type=int,
        default=RolloutConfig.new_bytes,
        help="bytes sampled for each rollout (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    parser.add_argument(
        "--processes",
        type=int,
        default=1 if torch.cuda.is_available() else min(os.cpu_count() or 1, MOST_PROCESSES),
        help="that share the training step (default: the cores of a CPU; on a GPU 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and return 0 when every check holds."""
    start = time.perf_counter()
    # Matrices are so small that a second thread costs more than it brings.
    torch.set_num_threads(1)
    config = RolloutConfig(arguments.samples, new_bytes=arguments.new_bytes, seed=arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rollout_model, model, oracle = (
        load_model(arguments.model / WEIGHTS, device, dtype)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    report.show_model(arguments.model / CARD, device)

    rollouts = roll_out(rollout_model, config)
    report.show_rollouts(KINDS, rollouts)
    report.show_drift(measure_drift(model, rollouts))

    trace = rollouts.trace(model.config.num_experts, VIRTUAL_RANKS)
    plan = make_plan(trace, Topology(ranks_per_node=VIRTUAL_RANKS, spare_slots_per_rank=1))
    load_BLE, before_BLR, after_BLR = trace.loads(), *rank_loads(trace, plan, VIRTUAL_RANKS)
    report.show_balance(KINDS, load_BLE, before_BLR, after_BLR)
    report.show_plan(plan)

    worst, *others = imbalance(before_BLR).max(-1).argsort()[::-1].tolist()
    forwards = forward_all_ways(model, oracle, rollouts, plan, worst)
    report.show_forwards(KINDS[worst], forwards)
    failures = find_failures(forwards)

    chosen = [worst, *others][:MICRO_BATCHES]
    failures += train(model, oracle, rollouts, plan, chosen, arguments.processes)
    draw(arguments.out, KINDS, load_BLE, before_BLR[worst], after_BLR[worst], worst)
    print(f"\nwrote {arguments.out} after {time.perf_counter() - start:.0f} s")

    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def train(
    model: DemoModel,
    oracle: DemoModel,
    rollouts: Rollouts,
    plan: Plan,
    chosen: Sequence[int],
    num_processes: int,
) -> list[str]:
    """Make a training step of some micro-batches, show it, and return what went wrong."""
    for one in (model, oracle):
        one.requires_grad_(True)
    trace = rollouts.trace(model.config.num_experts, OTHER_RANKS)
    spare = VIRTUAL_RANKS // OTHER_RANKS
    other = make_plan(trace, Topology(ranks_per_node=OTHER_RANKS, spare_slots_per_rank=spare))
    batches = [micro_batch_of(rollouts, prompt) for prompt in chosen]
    truth = train_in_reference("reference, float64", oracle, batches)
    eager = train_in_reference("reference, float32", model, batches)
    placements_of_way = {"megakernel": [None] * len(chosen)} | {
        f"megakernel, plan for {num_ranks} ranks": [
            planned_placements(one, prompt, model) for prompt in chosen
        ]
        for num_ranks, one in ((VIRTUAL_RANKS, plan), (OTHER_RANKS, other))
    }
    ways = train_all_ways(model, batches, placements_of_way, num_processes)
    report.show_step([KINDS[prompt] for prompt in chosen], batches, truth, [eager, *ways])
    report.show_update(ways[0].loss, take_step(model, ways[0], batches))
    return find_step_failures(truth, eager, ways)
