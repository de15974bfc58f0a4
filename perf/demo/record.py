"""Record what the demo's model routes while it generates: ``python -m perf.demo.record``.

A minute on one core writes perf/demo/data/routing.npz, a trace that ``python -m balance compare``
reads, several batches of rollouts with a micro-batch per prompt. The model runs in float64 here,
so that rounding, which differs between processors, decides no choice of an expert.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from balance import Trace
from perf.demo.files import DATA, ROUTING, WEIGHTS
from perf.demo.model import DemoModel, load_model
from perf.demo.rollout import RolloutConfig, roll_out

NUM_RANKS = 8
NUM_BATCHES = 4
CONFIG = RolloutConfig(samples_per_prompt=16, new_bytes=97)


def record(model: DemoModel, config: RolloutConfig, num_batches: int) -> Trace:
    """Roll out batches that differ in their seed alone; return the routing of all of them.

    Args:
        model: whose routing, in its own dtype.
        config: of one batch; its seed is the first.
        num_batches: each adds a micro-batch for every prompt.

    Returns:
        A trace of ``num_batches`` times as many micro-batches as there are prompts, sequences
        dealt to ``NUM_RANKS`` ranks in turn.
    """
    traces = [
        roll_out(model, replace(config, seed=config.seed + batch)).trace(
            model.config.num_experts, NUM_RANKS
        )
        for batch in range(num_batches)
    ]
    micro_batches = [
        trace.micro_batch_T + batch * trace.num_micro_batches for batch, trace in enumerate(traces)
    ]
    return Trace(
        # As narrow as ids get: the file is in the repository.
        ids_TLK=np.concatenate([trace.ids_TLK for trace in traces]).astype(np.int8),
        micro_batch_T=np.concatenate(micro_batches),
        source_rank_T=np.concatenate([trace.source_rank_T for trace in traces]),
        num_experts=model.config.num_experts,
        label=f"demo model, {num_batches} batches of rollouts",
    )


def main(argv: list[str] | None = None) -> int:
    """Record and write the file."""
    parser = argparse.ArgumentParser(prog="python -m perf.demo.record", description=__doc__)
    parser.add_argument("--batches", type=int, default=NUM_BATCHES)
    parser.add_argument("--samples", type=int, default=CONFIG.samples_per_prompt)
    parser.add_argument("--new-bytes", type=int, default=CONFIG.new_bytes)
    parser.add_argument("--model", type=Path, default=DATA, help="folder that holds the weights")
    parser.add_argument("--out", type=Path, default=DATA / ROUTING, help="file to write")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # a second thread may change the order of a sum
    model = load_model(arguments.model / WEIGHTS, "cpu", torch.float64)
    config = replace(CONFIG, samples_per_prompt=arguments.samples, new_bytes=arguments.new_bytes)
    trace = record(model, config, arguments.batches)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    trace.save(arguments.out)
    size = arguments.out.stat().st_size
    print(f"wrote {arguments.out}: {trace.num_tokens} tokens, {size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
