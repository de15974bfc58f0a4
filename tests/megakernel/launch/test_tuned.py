"""Which config a call gets that names none: the table's, the shipped one, or the device's."""

from dataclasses import replace

import pytest
import torch

from megakernel.config import FLOAT32, INTERPRETER, SHIPPED, KernelConfig, LayerShape
from megakernel.launch import tuned
from megakernel.launch.tuned import (
    Tuned,
    at_height,
    default_config,
    find_tuned,
    read_table,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QWEN = LayerShape(128, 8, 2048, 768)
WHERE = {"torch": "2.11", "triton": "3.6", "commit": "abc", "date": "2026-01-01"}
SPECIAL = KernelConfig(column_groups=8)


def make_entry(num_tokens: int, config: KernelConfig = SPECIAL, layer: LayerShape = QWEN) -> Tuned:
    return Tuned("NVIDIA H200", layer, num_tokens, config, {"live": 9.5}, {"live": 11.0}, **WHERE)


@pytest.fixture
def on_h200(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H200")


@pytest.mark.parametrize(
    ("tokens", "dtype", "device", "expected"),
    [
        (8192, torch.bfloat16, GPU, SHIPPED["rows128"]),
        (512, torch.float16, GPU, SHIPPED["rows64"]),
        (256, torch.bfloat16, GPU, SHIPPED["rows32"]),
        (64, torch.bfloat16, GPU, SHIPPED["rows16"]),
        (0, torch.bfloat16, GPU, SHIPPED["rows16"]),
        (8192, torch.float32, GPU, FLOAT32),
        (8192, torch.bfloat16, CPU, INTERPRETER),
    ],
    ids=["512 rows per expert", "32 rows", "16 rows", "4 rows", "no token", "no tensor cores",
         "interpreted"],
)  # fmt: skip
def test_without_an_entry_the_default_follows_rows_per_expert(
    tokens, dtype, device, expected, on_h200, monkeypatch
):
    monkeypatch.setattr(tuned, "TABLE", ())
    assert default_config(QWEN, tokens, dtype, device) == expected


@pytest.mark.parametrize(
    ("num_tokens", "found"),
    [(1024, 1024), (4000, 1024), (4200, 16384), (65536, 16384), (256, 1024), (255, None),
     (65537, None), (1, None)],
)  # fmt: skip
def test_the_nearest_entry_serves_up_to_four_times_more_or_fewer_tokens(num_tokens, found):
    table = [make_entry(T, KernelConfig(num_workers=T)) for T in (16384, 1024)]
    config = find_tuned(table, "NVIDIA H200", QWEN, num_tokens)
    assert (config and config.num_workers) == found


@pytest.mark.parametrize(
    ("gpu", "layer"),
    [("NVIDIA H100", QWEN), ("NVIDIA H200", replace(QWEN, num_experts=16))],
    ids=["another GPU", "a rank's share of the experts"],
)
def test_an_entry_serves_only_its_gpu_and_layer(gpu, layer):
    assert find_tuned([make_entry(1024)], gpu, layer, 1024) is None


def test_a_call_takes_the_tables_config(on_h200, monkeypatch):
    monkeypatch.setattr(tuned, "TABLE", (make_entry(8192),))
    assert default_config(QWEN, 8192, torch.bfloat16, GPU) == SPECIAL
    assert default_config(QWEN, 8192, torch.float32, GPU) == FLOAT32
    assert default_config(QWEN, 64, torch.bfloat16, GPU) == SHIPPED["rows16"]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_the_default_can_be_chosen_while_torch_compile_traces(on_h200, monkeypatch, dynamic):
    torch._dynamo.reset()
    monkeypatch.setattr(tuned, "TABLE", (make_entry(8192),))

    def groups(x_T: torch.Tensor) -> torch.Tensor:
        return x_T.new_ones(()) * default_config(QWEN, len(x_T), torch.bfloat16, GPU).column_groups

    traced = torch.compile(groups, fullgraph=True, backend="eager", dynamic=dynamic)
    for num_tokens in (8192, 3000, 64, 70_000, 8191):
        expected = default_config(QWEN, num_tokens, torch.bfloat16, GPU).column_groups
        assert traced(torch.ones(num_tokens)) == expected


@pytest.mark.parametrize(
    "text",
    [
        '[{"gpu": "x"}]',
        '[{"layer": {}, "config": {}}]',
        '[{"config": {"block_rows": 3}}]',
        "[{",
        "",
    ],
    ids=["no layer", "no sizes", "illegal config", "cut off", "empty"],
)
def test_a_broken_table_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"tuned\.json(: entry 0 is no tuned config| must be JSON)"
    ):
        read_table(path)


@pytest.mark.parametrize(
    ("config", "rows", "expected"),
    [
        (SHIPPED["rows16"], 16, SHIPPED["rows16"]),
        (SHIPPED["rows16"], 128, SHIPPED["rows128"]),
        (SPECIAL, 64, SHIPPED["rows64"]),
        (SPECIAL, 256, replace(SPECIAL, block_rows=256)),
        (FLOAT32, 128, replace(FLOAT32, block_rows=128)),
        (INTERPRETER, 16, replace(INTERPRETER, block_rows=16)),
    ],
    ids=["its own", "tiles that would not fit", "tuned", "no shipped height", "float32",
         "interpreted"],
)  # fmt: skip
def test_a_replay_of_one_height_gets_tiles_that_fit_it(config, rows, expected):
    assert at_height(config, rows) == expected
