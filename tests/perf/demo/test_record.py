"""The recording in the repository is what the command makes, and the planner reads it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from balance import Trace
from balance.__main__ import main as balance
from perf.demo.files import DATA, ROUTING, WEIGHTS
from perf.demo.model import DemoModel, ModelConfig, load_model, save_model
from perf.demo.record import CONFIG, NUM_BATCHES, NUM_RANKS, main, record
from perf.demo.rollout import PROMPT_OF_KIND
from perf.problems.cases import RECORDING

NUM_PROMPTS = len(PROMPT_OF_KIND)


@pytest.fixture(scope="module")
def committed():
    return Trace.load(DATA / ROUTING)


def by_sequence(trace, config):
    """View ids as [micro-batch, sample, position, layer, choice]."""
    shape = (-1, config.samples_per_prompt, config.recorded_bytes)
    return trace.ids_TLK.reshape(*shape, trace.num_layers, trace.top_k)


def test_the_committed_file_has_the_shape_of_the_command(committed):
    assert DATA / ROUTING == RECORDING
    assert (DATA / ROUTING).stat().st_size < 300_000
    assert committed.num_micro_batches == NUM_BATCHES * NUM_PROMPTS
    assert committed.num_source_ranks == NUM_RANKS
    sequences = NUM_BATCHES * NUM_PROMPTS * CONFIG.samples_per_prompt
    assert committed.num_tokens == sequences * CONFIG.recorded_bytes
    assert (committed.num_layers, committed.num_experts, committed.top_k) == (3, 32, 4)


def test_the_committed_file_starts_every_sequence_as_the_model_routes_its_prompt(committed):
    """What is sampled may differ on another kind of processor; what is read may not."""
    model = load_model(DATA / WEIGHTS, "cpu", torch.float64)
    small = replace(CONFIG, samples_per_prompt=1, new_bytes=1)
    made = by_sequence(record(model, small, NUM_BATCHES), small)
    found = by_sequence(committed, CONFIG)[:, :, : CONFIG.prompt_bytes]
    assert (found == made).all()


def test_the_committed_file_is_made_of_different_rollouts(committed):
    first, second = by_sequence(committed, CONFIG)[0, :2, CONFIG.prompt_bytes :]
    assert (first != second).any()


@pytest.mark.slow
def test_the_command_makes_the_committed_batches(committed):
    """On the kind of processor that the file was made on, to the id."""
    model = load_model(DATA / WEIGHTS, "cpu", torch.float64)
    made = record(model, CONFIG, 1)
    agreeing = (committed.ids_TLK[: made.num_tokens] == made.ids_TLK).all((1, 2))
    assert agreeing.mean() > 0.9


def test_the_command_repeats_itself_to_the_byte(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = ModelConfig(2, hidden=16, num_heads=2, num_experts=8, top_k=2, intermediate=8)
    save_model(DemoModel(sizes), tmp_path / WEIGHTS)
    files = [tmp_path / "new" / name for name in ("one.npz", "other.npz")]
    argv = ["--model", str(tmp_path), "--samples", "2", "--new-bytes", "3", "--batches", "2"]
    for file in files:
        assert main([*argv, "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    trace = Trace.load(files[0])
    assert trace.num_tokens == 2 * NUM_PROMPTS * 2 * 34
    assert np.bincount(trace.micro_batch_T).tolist() == [68] * (2 * NUM_PROMPTS)
    assert "816 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["stats", "compare"])
def test_the_planner_reads_the_committed_file(command, capsys):
    assert balance([command, str(DATA / ROUTING)]) == 0
    out = capsys.readouterr().out
    assert "demo model" in out and "24 micro-batches" in out


def test_a_plan_levels_the_committed_file(capsys):
    assert balance(["compare", str(DATA / ROUTING)]) == 0
    lines = capsys.readouterr().out.splitlines()
    imbalance_of = {
        name: float(cells[0])
        for name, *cells in (
            [cell.strip() for cell in line.strip("| ").split("|")]
            for line in lines
            if line.startswith("| ") and "method" not in line
        )
    }
    assert imbalance_of["none (contiguous)"] > 1.5
    assert imbalance_of["this planner"] < 1.01 < imbalance_of["EPLB, oracle per micro-batch"]
