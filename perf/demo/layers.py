"""Who may compute the demo model's MoE layers: the reference, or the megakernel, watched."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

import megakernel
import reference
from megakernel.config import INTERPRETER
from perf.demo.model import MoELayer, MoEWeights
from perf.measuring.launches import count_launches

Answer = TypeVar("Answer")
WARM_UPS = 10
REPEATS = 50
# The interpreter pays per task: tiles as tall as a micro-batch's busy experts make the fewest.
ON_CPU = replace(
    INTERPRETER, block_rows=128, block_h=128, step=64, column_groups=1, block_tokens=64,
    select_tokens=64, combine_tokens=64,
)  # fmt: skip


class ReferenceLayer:
    """The layer in plain PyTorch, in the dtype of its input, with or without given ids."""

    def __init__(self, top_k: int, expert_of_TK: Tensor | None = None) -> None:
        self.top_k = top_k
        self.replayed_TK = expert_of_TK

    def __call__(self, x_TH: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        routing = reference.route(
            x_TH, weights.router_weight_EH, self.top_k, expert_of_TK=self.replayed_TK
        )
        y_TH = reference.moe_by_expert(
            x_TH, routing.expert_of_TK, routing.gate_TK, weights.gate_up_E2IH, weights.down_EHI
        )
        return y_TH, routing.expert_of_TK


class MegakernelLayer:
    """The layer in one launch; replay tables are built here, ahead of the step."""

    def __init__(
        self,
        top_k: int,
        num_experts: int,
        expert_of_TK: Tensor | None = None,
        placement: megakernel.Placement | None = None,
    ) -> None:
        self.router = megakernel.Router(top_k)
        self.placement = placement
        self.config = None if torch.cuda.is_available() else ON_CPU
        self.replay = None
        if expert_of_TK is not None:
            ids_TK = expert_of_TK.int().contiguous()
            self.replay = megakernel.prepare_replay(ids_TK, num_experts, placement, self.config)

    def __call__(self, x_TH: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        experts = megakernel.Experts(weights.gate_up_E2IH, weights.down_EHI)
        output = megakernel.moe(
            x_TH,
            weights.router_weight_EH,
            experts,
            self.router,
            replay=self.replay,
            placement=self.placement,
            config=self.config,
        )
        # As they are: a cast to int64 would be a second launch.
        return output.y_TH, output.expert_of_TK


@dataclass
class WatchedLayer:
    """A layer that counts the launches of its latest call, and can repeat and time that call.

    Attributes:
        layer: who computes.
        on_done: called after each call, for a progress bar.
        launches: of the latest call.
        call: repeats it.
    """

    layer: MoELayer
    on_done: Callable[[], object]
    launches: int = 0
    call: Callable[[], object] = field(default=lambda: None)

    def __call__(self, x_TH: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        self.call = lambda: self.layer(x_TH, weights)
        if x_TH.is_cuda:
            self.call()  # the first call of a shape compiles and allocates
        with count_launches(x_TH.is_cuda) as counted:
            answer = self.layer(x_TH, weights)
        self.launches = len(counted)
        self.on_done()
        return answer

    def time_us(self) -> float:
        """Median device time of the latest call, by CUDA events around single calls."""
        for _ in range(WARM_UPS):
            self.call()
        return median(_event_us(self.call) for _ in range(REPEATS))


@dataclass
class TrainedLayer:
    """A layer that counts the launches of its forward and of its backward, each by itself.

    Attributes:
        layer: who computes.
        forward, backward: names of what the latest of each launched.
    """

    layer: MoELayer
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)

    def __call__(self, x_TH: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        return _Counted.apply(self, x_TH, *weights)


class _Counted(torch.autograd.Function):
    """The layer as an autograd graph of its own, so that nothing else is in what is counted."""

    @staticmethod
    def forward(
        ctx: Any, counter: TrainedLayer, x_TH: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in (x_TH, *weights)]

        def call() -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                return counter.layer(inputs[0], MoEWeights(*inputs[1:]))

        (y_TH, expert_of_TK), counter.forward = _counted(call, x_TH.is_cuda)
        ctx.counter, ctx.inputs, ctx.y_TH = counter, inputs, y_TH
        ctx.mark_non_differentiable(expert_of_TK)
        return y_TH.detach(), expert_of_TK

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(ctx.y_TH, ctx.inputs, dy_TH, retain_graph=dy_TH.is_cuda)

        gradients, ctx.counter.backward = _counted(call, dy_TH.is_cuda)
        return None, *gradients


def watch(layers: Iterable[MoELayer], on_done: Callable[[], object]) -> list[WatchedLayer]:
    """Return the layers with their launches counted; ``on_done`` is called after each call."""
    return [WatchedLayer(layer, on_done) for layer in layers]


def _counted(call: Callable[[], Answer], on_gpu: bool) -> tuple[Answer, list[str]]:
    """Call, and return what that gave and what it launched."""
    if on_gpu:
        call()  # the first call of a shape compiles and allocates
    with count_launches(on_gpu) as launched:
        answer = call()
    return answer, launched


def _event_us(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3
