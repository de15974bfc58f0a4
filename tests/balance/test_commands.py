"""The commands, end to end on small traces."""

import base64
import io
import json
import sys

import numpy as np
import pytest

from balance import formats
from balance.__main__ import main
from balance.baselines import BASELINES
from balance.compare.report import OURS
from balance.plan import Plan
from balance.recorded.synthetic import SyntheticConfig, make_trace
from balance.trace import Trace
from tests.balance.recorded_trace import recording_path


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    config = SyntheticConfig(
        16, 2, 2, num_micro_batches=3, tokens_per_micro_batch=400, num_ranks=4
    )
    make_trace(config).save(path)
    return str(path)


@pytest.fixture(scope="module")
def vllm_path(tmp_path_factory):
    """Three vLLM completions of 9 tokens; layer 0 is dense."""
    path = tmp_path_factory.mktemp("recording") / "vllm.jsonl"
    lines = []
    for seed in range(3):
        ids_TLK = (
            np.random.default_rng(seed).random((8, 3, 6)).argsort(-1)[..., :2].astype(np.uint8)
        )
        ids_TLK[:, 0] = 0
        buffer = io.BytesIO()
        np.save(buffer, ids_TLK)
        payload = base64.b64encode(buffer.getvalue()).decode()
        lines.append(json.dumps({"choices": [{"routed_experts": payload}]}))
    path.write_text("\n".join(lines))
    return str(path)


RECORDING = ["--num-experts", "6", "--moe-layers", "1", "2"]


def run_json(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_stats(capsys, trace_path, tmp_path):
    picture = tmp_path / "stats.png"
    assert main(["stats", trace_path, "--at", "2", "4", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("synthetic 16 experts") and "Gini" in text
    assert picture.stat().st_size > 0
    figures = run_json(capsys, "stats", trace_path, "--at", "2", "4")
    assert [at["num_ranks"] for at in figures["ranks"]] == [2, 4]


def test_compare_holds_every_baseline_ours_and_the_bound(capsys, trace_path, tmp_path):
    picture = tmp_path / "compare.png"
    options = ["--ranks", "4", "--nodes", "2", "--cross-node-copies", "1", "--tile", "16"]
    assert main(["compare", trace_path, *options, "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    names = [*BASELINES, OURS, "lower bound of any plan"]
    assert all(f"| {name} |" in text for name in names)
    assert picture.stat().st_size > 0
    figures = run_json(capsys, "compare", trace_path, *options)
    assert [method["name"] for method in figures["methods"]] == names
    assert figures["topology"]["num_nodes"] == 2
    assert figures["plan"]["gap_avg"] >= 0


def test_plan_writes_what_plan_loads(capsys, trace_path, tmp_path):
    out, picture = tmp_path / "plan.npz", tmp_path / "plan.png"
    files = ["--out", str(out), "--plot", str(picture)]
    assert main(["plan", trace_path, "--ranks", "4", *files]) == 0
    assert "imbalance_avg" in capsys.readouterr().out
    assert picture.stat().st_size > 0
    trace = Trace.load(trace_path)
    plan = Plan.load(out, trace)
    assert plan.slot_of_TK(2, 1).shape == (len(trace.rows_of(2)), 2)
    kept = run_json(
        capsys, "plan", trace_path, "--ranks", "4", "--previous", str(out), "--no-reorder"
    )
    assert kept["moves_avg"] == 0


def test_planner_options_reach_the_planner(capsys, trace_path):
    options = ["--ranks", "4", "--min-tokens-per-replica", "100000"]
    assert run_json(capsys, "plan", trace_path, *options)["copies_avg"] == 0


def test_convert_packs_a_recording(capsys, vllm_path, tmp_path):
    out = tmp_path / "trace.npz"
    packing = ["--ranks", "2", "--tokens-per-micro-batch", "9", "--pack", "given"]
    assert main(["convert", vllm_path, *RECORDING, *packing, "--out", str(out)]) == 0
    assert "27 tokens, 3 micro-batches, 2 layers, top-2 of 6" in capsys.readouterr().out
    trace = Trace.load(out)
    assert trace.loads().sum() == 3 * 8 * 2 * 2, "the last token of a sequence was not routed"
    assert trace.num_source_ranks <= 2


def test_convert_keeps_sequences(vllm_path, tmp_path):
    out = tmp_path / "routes.npz"
    assert main(["convert", vllm_path, *RECORDING, "--unpacked", "--out", str(out)]) == 0
    assert formats.read(out).sequence_start.tolist() == [0, 9, 18, 27]


def test_recordings_are_packed_on_the_fly(capsys, vllm_path):
    figures = run_json(
        capsys, "stats", vllm_path, *RECORDING, "--at", "2", "--tokens-per-micro-batch", "9"
    )
    assert figures["num_micro_batches"] == 3
    assert figures["num_masked_rows"] == 3
    assert figures["label"] == "vllm.jsonl, shuffled"


def test_synthetic_needs_no_file(capsys):
    sizes = ["--num-experts", "8", "--top-k", "2", "--num-layers", "1"]
    small = ["--tokens-per-micro-batch", "64", "--at", "4", "--pack", "domain"]
    figures = run_json(capsys, "stats", "synthetic", *sizes, *small)
    assert figures["label"] == "synthetic 8 experts top-2, domain, seed 0"
    assert figures["num_micro_batches"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "missing.npz"], "FileNotFoundError"),
        (["stats", "missing.txt"], "path must be recorded routing"),
        (["stats", "RECORDING"], "num_experts must be given for format vllm"),
        (["stats", "RECORDING", "--num-experts", "6"], r"all 0 in a layer, got layers [0]"),
        (["compare", "TRACE", "--ranks", "4", "--nodes", "3"], "--nodes must divide the 4 ranks"),
        (["compare", "TRACE", "--ranks", "1"], "num_ranks must be at least"),
        (["plan", "TRACE", "--ranks", "4", "--tolerance", "-1"], "tolerance must be finite"),
        (["convert", "TRACE", "--unpacked", "--out", "x"], "--unpacked needs a recording"),
    ],
    ids=[
        "no-file",
        "unknown-kind",
        "experts-unknown",
        "dense-layer",
        "uneven-nodes",
        "too-few-ranks",
        "bad-tolerance",
        "packed-already",
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, trace_path, vllm_path, arguments, message):
    paths = {"TRACE": trace_path, "RECORDING": vllm_path}
    assert main([paths.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "domain"])
def test_table_on_recorded_routing(capsys, order):
    figures = run_json(capsys, "compare", str(recording_path()), "--pack", order)
    average = {method["name"]: method["imbalance_avg"] for method in figures["methods"]}
    assert average[OURS] <= 1.01
    assert 1.40 < average["none (contiguous)"] < 1.66
    assert 1.20 < average["EPLB, oracle per batch"] < 1.32
    assert average[OURS] == min(average[name] for name in (*BASELINES, OURS))


INSTALL = 'pip install "moe-megakernel[perf]"'


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("matplotlib", ["stats", "TRACE", "--plot", "x.png"]),
        ("matplotlib", ["plan", "TRACE", "--ranks", "4", "--plot", "x.png"]),
        ("scipy", ["compare", "TRACE", "--ranks", "4"]),
    ],
)
def test_a_missing_package_is_one_line_before_any_work(
    capsys, monkeypatch, trace_path, package, arguments
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([trace_path if argument == "TRACE" else argument for argument in arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert package in error and INSTALL in error


def test_without_tqdm_one_line_stands_for_the_bar(capsys, monkeypatch, trace_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["stats", trace_path, "--at", "2"]) == 0
    assert capsys.readouterr().err == "", "a single file has no bar"
    assert main(["compare", trace_path, "--ranks", "4"]) == 0
    out, error = capsys.readouterr()
    assert OURS in out
    assert error.count("\n") == 1 and INSTALL in error
    assert main(["compare", trace_path, "--ranks", "4", "--json"]) == 0
    assert capsys.readouterr().err == "", "JSON has no bar either"
