"""Under CUDA graphs, torch.compile and several streams: one launch is all they have to carry."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import megakernel
from megakernel import MoEOutput, Placement, moe, moe_routed, prepare_replay
from megakernel.config import ROWS16, ROWS64
from tests.gpu.layers import keep_busy, make_layer
from tests.helpers.compare import assert_same_bits
from tests.helpers.inputs import Inputs

# The warnings of torch's own machinery are not ours to fix.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

QWEN = "Qwen3-30B-A3B"


def layer(inputs: Inputs, x_TH: Tensor, **options: object) -> MoEOutput:
    """Run the layer on other tokens than its own, as low tiles unless told otherwise."""
    options.setdefault("config", ROWS16)
    return moe(x_TH, inputs.router_EH, inputs.experts, inputs.router, **options)  # type: ignore


def capture(call: Callable[[], MoEOutput]) -> tuple[torch.cuda.CUDAGraph, MoEOutput]:
    """Warm the call up, then record it; the output is refilled by every replay of the graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def assert_same_output(*, actual: MoEOutput, expected: MoEOutput) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(actual=got, expected=want)


def draws_like(x_TH: Tensor, count: int) -> list[Tensor]:
    """Draw tokens that are routed differently each time, some of them all alike."""
    return [torch.randn_like(x_TH) for _ in range(count)] + [x_TH[:1].expand_as(x_TH).clone()]


def test_a_graph_replays_with_changed_routing(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 64, cuda)
    x_TH = inputs.x_TH.clone()
    graph, out = capture(lambda: layer(inputs, x_TH))
    for tokens_TH in draws_like(x_TH, 3):
        x_TH.copy_(tokens_TH)
        graph.replay()
        assert_same_output(actual=out, expected=layer(inputs, tokens_TH))


def test_two_layers_in_one_graph(cuda: torch.device) -> None:
    first, second = make_layer(QWEN, 64, cuda), make_layer(QWEN, 64, cuda)
    x_TH = first.x_TH.clone()

    def both(x_TH: Tensor) -> MoEOutput:
        return layer(second, layer(first, x_TH).y_TH)

    graph, out = capture(lambda: both(x_TH))
    for tokens_TH in draws_like(x_TH, 3):
        x_TH.copy_(tokens_TH)
        graph.replay()
        assert_same_output(actual=out, expected=both(tokens_TH))


def test_graphs_of_several_sizes_take_turns_with_eager_calls(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 128, cuda)
    x_of_size = {size: inputs.x_TH[:size].clone() for size in (8, 128, 32)}
    captured = {
        size: capture(lambda x_TH=x_TH: layer(inputs, x_TH)) for size, x_TH in x_of_size.items()
    }
    for _ in range(2):
        for size, x_TH in x_of_size.items():
            x_TH.copy_(torch.randn_like(x_TH))
            graph, out = captured[size]
            expected = layer(inputs, x_TH.clone())
            graph.replay()
            assert_same_output(actual=out, expected=expected)


def test_a_graph_survives_larger_eager_calls(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 1024, cuda)
    x_TH = inputs.x_TH[:16].clone()
    graph, out = capture(lambda: layer(inputs, x_TH))
    expected = layer(inputs, x_TH)
    layer(inputs, inputs.x_TH, config=ROWS64)  # grows the scratch of eager calls
    graph.replay()
    assert_same_output(actual=out, expected=expected)


def test_a_graph_of_a_replay_keeps_the_ids_and_weighs_live(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 64, cuda)
    experts = torch.cat([torch.randperm(inputs.case.E), torch.tensor([0, 1, 0, -1])]).to(cuda)
    placement = Placement(experts)
    ids_TK = layer(inputs, inputs.x_TH).expert_of_TK
    replay = prepare_replay(ids_TK, inputs.case.E, placement, ROWS16)
    x_TH = inputs.x_TH.clone()
    graph, out = capture(lambda: layer(inputs, x_TH, replay=replay))
    for tokens_TH in draws_like(x_TH, 2):
        x_TH.copy_(tokens_TH)
        graph.replay()
        assert_same_output(actual=out, expected=layer(inputs, tokens_TH, replay=replay))
        assert torch.equal(out.expert_of_TK, ids_TK)


def test_a_graph_reports_a_bad_id_of_its_replay(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 64, cuda)
    good = layer(inputs, inputs.x_TH)
    ids_TK = good.expert_of_TK.clone()

    def given() -> MoEOutput:
        y_TH = moe_routed(inputs.x_TH, ids_TK, good.gate_TK, inputs.experts, config=ROWS16)
        return good._replace(y_TH=y_TH)  # the rest is not written by the graph

    graph, out = capture(given)
    ids_TK[4, 2] = inputs.case.E
    graph.replay()
    with pytest.raises(ValueError, match=rf"expert_of_TK\[4, 2\].*{inputs.case.E}"):
        megakernel.check()
    ids_TK.copy_(good.expert_of_TK)
    graph.replay()
    megakernel.check()
    assert_same_output(actual=out, expected=good)


def test_capturing_a_cold_layer_is_refused(cuda: torch.device, monkeypatch) -> None:
    monkeypatch.setattr("megakernel.launch.workspace._workspaces", {})
    inputs = make_layer(QWEN, 64, cuda)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(graph):
        layer(inputs, inputs.x_TH)
    assert layer(inputs, inputs.x_TH).y_TH.isfinite().all()


def test_inductor_compiles_the_whole_layer(device: torch.device) -> None:
    inputs = make_layer(QWEN, 64, device)
    placement = Placement(torch.randperm(inputs.case.E).to(device))
    replay = prepare_replay(layer(inputs, inputs.x_TH).expert_of_TK, inputs.case.E, None, ROWS16)

    def block(x_TH: Tensor) -> tuple[MoEOutput, Tensor]:
        live = layer(inputs, x_TH + x_TH, placement=placement)
        return live, layer(inputs, live.y_TH, replay=replay).y_TH

    live, replayed_TH = torch.compile(block, fullgraph=True)(inputs.x_TH)
    expected, expected_TH = block(inputs.x_TH)
    assert_same_output(actual=live, expected=expected)
    assert_same_bits(actual=replayed_TH, expected=expected_TH)


def test_streams_run_side_by_side(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 64, cuda)
    tokens = draws_like(inputs.x_TH, 2)
    expected = [layer(inputs, x_TH) for x_TH in tokens]
    streams = [torch.cuda.Stream() for _ in tokens]
    torch.cuda.synchronize()
    outputs: list[list[MoEOutput]] = [[] for _ in tokens]
    for _ in range(20):
        for stream, x_TH, out in zip(streams, tokens, outputs, strict=True):
            with torch.cuda.stream(stream):
                out.append(layer(inputs, x_TH))
    torch.cuda.synchronize()
    for out, want in zip(outputs, expected, strict=True):
        for got in out:
            assert_same_output(actual=got, expected=want)


def test_the_bits_survive_a_busy_device(cuda: torch.device) -> None:
    """Another stream's kernels take multiprocessors away, so few workers are resident at times."""
    inputs = make_layer(QWEN, 256, cuda)
    expected = layer(inputs, inputs.x_TH)
    busy, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device=cuda, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(busy):
            keep_busy(noise)
        assert_same_bits(actual=layer(inputs, inputs.x_TH).y_TH, expected=expected.y_TH)
    torch.cuda.synchronize()
