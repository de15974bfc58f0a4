"""Host-side times by pytest-benchmark: planner, replay tables, everything before a launch.

``pytest tests/perf/suites/test_bench_host.py --benchmark-only --benchmark-autosave`` keeps a run.
"""

from unittest.mock import patch

import pytest
import torch

import megakernel.launch.run
from balance import Topology, make_plan
from balance.recorded.synthetic import SyntheticConfig, make_trace
from megakernel import prepare_replay
from perf.problems.cases import SHAPES, TINY, Case, make_ids
from perf.problems.providers import OURS
from perf.problems.tensors import make_problem
from perf.suites.host import NoKernel

CPU = torch.device("cpu")
ROUNDS = {"rounds": 5, "warmup_rounds": 1}


def test_planner(benchmark):
    trace = make_trace(
        SyntheticConfig(
            num_layers=1, num_micro_batches=4, tokens_per_micro_batch=2048, num_ranks=8
        )
    )
    plan = benchmark.pedantic(make_plan, (trace, Topology(1, 8, 1)), **ROUNDS)
    benchmark.extra_info["trace"] = trace.label
    assert plan.num_micro_batches == 4


@pytest.mark.parametrize("num_tokens", [64, 8192])
def test_prepare_replay(benchmark, num_tokens):
    case = Case(SHAPES["Qwen3-30B-A3B"], num_tokens, "recorded")
    ids_TK = torch.from_numpy(make_ids(case))
    replay = benchmark.pedantic(prepare_replay, (ids_TK, case.model.num_experts), **ROUNDS)
    benchmark.extra_info["case"] = case.name
    assert replay.num_tiles > 0


@pytest.mark.parametrize("provider", OURS, ids=lambda provider: provider.name.replace(" ", "-"))
def test_host_side_of_a_call(benchmark, provider):
    call = provider.prepare(make_problem(Case(TINY, 16), CPU))
    with patch.object(megakernel.launch.run, "moe_kernel", NoKernel()):
        y_TH = benchmark.pedantic(call, rounds=50, warmup_rounds=3)
    assert y_TH.shape == (16, TINY.hidden)
