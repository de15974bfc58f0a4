"""Training on a GPU in all dialects, under other plans, in a graph and under torch.compile."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megakernel import Experts, KernelConfig, Placement, moe, prepare_replay
from megakernel.config import ROWS64, ROWS128
from tests.gpu.checks import fitting
from tests.gpu.layers import make_layer
from tests.helpers.compare import assert_same_bits
from tests.helpers.dialects import Dialect
from tests.helpers.gradients import LAYERS, make_problem
from tests.helpers.inputs import Inputs
from tests.helpers.training import errors_beyond, train

# The warnings of torch's own machinery are not ours to fix.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

QWEN = "Qwen3-30B-A3B"
NAMES = {"live", "replay", "gpt-oss", "deepseek", "shared-live", "bfloat16", "float16"}


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return the layer's tensors, asking for gradients."""
    experts = inputs.experts
    tensors = {
        "x": inputs.x_TH, "router": inputs.router_EH, "gate_up": experts.gate_up_E2IH,
        "down": experts.down_EHI,
    }  # fmt: skip
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def step(inputs: Inputs, leaves: dict[str, Tensor], **options: object) -> Tensor:
    """Run the layer on the leaves, and a backward of ones; return y."""
    options.setdefault("config", fitting(ROWS128))
    experts = replace(inputs.experts, gate_up_E2IH=leaves["gate_up"], down_EHI=leaves["down"])
    out = moe(leaves["x"], leaves["router"], experts, inputs.router, **options)  # type: ignore
    out.y_TH.backward(torch.ones_like(out.y_TH))
    return out.y_TH


def gradients(inputs: Inputs, **options: object) -> list[Tensor]:
    """Return all gradients of one step."""
    leaves = leaves_of(inputs)
    step(inputs, leaves, **options)
    return [leaf.grad for leaf in leaves.values() if leaf.grad is not None]


@pytest.mark.parametrize(
    "dialect", [d for d in LAYERS if d.name in NAMES], ids=lambda dialect: dialect.name
)
def test_gradients_are_as_near_as_eagers(dialect: Dialect, device: torch.device) -> None:
    problem = make_problem(dialect)
    assert errors_beyond(problem, train(problem, dialect, device=device), dialect.dtype) == {}


@pytest.mark.parametrize("config", [ROWS64, ROWS128], ids=["rows64", "rows128"])
def test_bits_of_gradients_do_not_depend_on_the_plan(
    config: KernelConfig, device: torch.device
) -> None:
    config = fitting(config)
    inputs = make_layer(QWEN, 512, device)
    expected = gradients(inputs, config=config)
    num_experts = inputs.experts.num_experts
    copies = torch.cat([torch.arange(num_experts), torch.arange(8)]).to(device)
    placement = Placement(copies)
    ids_TK = moe(inputs.x_TH, inputs.router_EH, inputs.experts, inputs.router).expert_of_TK
    replay = prepare_replay(ids_TK, num_experts, placement, config)
    plans = (
        {},
        {"config": replace(config, num_workers=17)},
        {"save": "nothing"},
        {"placement": placement},
        {"replay": replay},
    )
    for plan in plans:
        for got, want in zip(
            gradients(inputs, **({"config": config} | plan)), expected, strict=True
        ):
            assert_same_bits(actual=got, expected=want)


def test_a_graph_of_a_whole_step_replays_with_changed_tokens(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 256, cuda)
    leaves = leaves_of(inputs)

    def clear() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    capture = whole_step(lambda: step(inputs, leaves), clear)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            leaves["x"].copy_(torch.randn_like(leaves["x"]))
        capture.replay()
        got = [leaf.grad.clone() for leaf in leaves.values() if leaf.grad is not None]
        expected = gradients(replace(inputs, x_TH=leaves["x"].detach()))
        for own, want in zip(got, expected, strict=True):
            assert_same_bits(actual=own, expected=want)


def whole_step(run: Callable[[], Tensor], clear: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Warm a step up on a stream of its own, then record it, gradients in the graph's memory."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        clear()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def test_torch_compile_takes_forward_and_backward(cuda: torch.device) -> None:
    inputs = make_layer(QWEN, 64, cuda)
    expected = gradients(inputs)
    leaves = leaves_of(inputs)

    def layer(x_TH: Tensor, router_EH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe(x_TH, router_EH, Experts(gate_up, down), inputs.router, config=ROWS128).y_TH

    y_TH = torch.compile(layer, fullgraph=True)(*leaves.values())
    y_TH.backward(torch.ones_like(y_TH))
    for leaf, want in zip(leaves.values(), expected, strict=True):
        assert leaf.grad is not None
        assert_same_bits(actual=leaf.grad, expected=want)
