"""A trained MoE language model rolls out, and its recorded routing drives the training side.

Rollouts run in bfloat16 and record which experts every byte chose. A plan places experts from that
record. The training-side forward then runs in float32 with the recorded choices forced, its MoE
layers computed by the megakernel, and is compared with a float64 reference.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from balance import Topology, make_plan
from balance.measures.load import imbalance
from perf.demo import report
from perf.demo.compare import find_failures, forward_all_ways, measure_drift, rank_loads
from perf.demo.files import CARD, DATA, WEIGHTS
from perf.demo.model import load_model
from perf.demo.picture import draw
from perf.demo.rollout import PROMPT_OF_KIND, RolloutConfig, roll_out

KINDS = list(PROMPT_OF_KIND)
VIRTUAL_RANKS = 8


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

    worst = int(imbalance(before_BLR).max(-1).argmax())
    forwards = forward_all_ways(model, oracle, rollouts, plan, worst)
    report.show_forwards(KINDS[worst], forwards)
    draw(arguments.out, KINDS, load_BLE, before_BLR[worst], after_BLR[worst], worst)
    print(f"\nwrote {arguments.out} after {time.perf_counter() - start:.0f} s")

    failures = find_failures(forwards)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0
