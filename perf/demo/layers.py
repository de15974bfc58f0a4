"""Who may compute the demo model's MoE layers: the reference, or the megakernel, watched."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

import megakernel
import reference
from perf.demo.model import MoELayer, MoEWeights
from perf.measuring.launches import count_launches

WARM_UPS = 10
REPEATS = 50


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
        self.replay = None
        if expert_of_TK is not None:
            ids_TK = expert_of_TK.int().contiguous()
            self.replay = megakernel.prepare_replay(ids_TK, num_experts, placement)

    def __call__(self, x_TH: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        experts = megakernel.Experts(weights.gate_up_E2IH, weights.down_EHI)
        output = megakernel.moe(
            x_TH,
            weights.router_weight_EH,
            experts,
            self.router,
            replay=self.replay,
            placement=self.placement,
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


def watch(layers: Iterable[MoELayer], on_done: Callable[[], object]) -> list[WatchedLayer]:
    """Return the layers with their launches counted; ``on_done`` is called after each call."""
    return [WatchedLayer(layer, on_done) for layer in layers]


def _event_us(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3
