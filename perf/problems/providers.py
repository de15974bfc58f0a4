"""Who computes the layer: ours on three routes, eager PyTorch, grouped GEMMs.

A provider is prepared for a problem and returns a call without arguments, which is what gets
timed. Every provider's call includes the router except ``ours given``, whose routing is given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor
from torch.nn.functional import silu

import megakernel
import reference
from perf import extras
from perf.problems.tensors import Problem

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation of the layer.

    Attributes:
        name: in results.
        prepare: makes the call for a problem.
        package: what must be importable, None for what is always there.
        needs_gpu: whether it cannot run on a CPU.
        capturable: whether a CUDA graph can hold the call; False where it synchronises.
        is_ours: whether its failure is ours.
        has_router: whether the call computes the router.
        trains: whether the call's output can be differentiated.
        main_grad: how a training step of ours keeps gradients of expert weights: "" in their own
            dtype, "overwritten" or "added" in float32 buffers.
    """

    name: str
    prepare: Callable[[Problem], Call]
    package: str | None = None
    needs_gpu: bool = False
    capturable: bool = True
    is_ours: bool = False
    has_router: bool = True
    trains: bool = False
    main_grad: str = ""

    @property
    def label(self) -> str:
        """Name in results: other people's layers with the version of their package."""
        return f"{self.name} {version_of(self.package)}".strip() if self.package else self.name

    def why_missing(self, device: torch.device) -> str | None:
        """Return why this provider cannot run here, or None."""
        return extras.why_missing(self.package, self.needs_gpu, device.type == "cuda")


@cache
def version_of(package: str) -> str:
    """Return the version of what a module was installed from, "" where nothing says so."""
    try:
        return metadata.version(metadata.packages_distributions().get(package, [package])[0])
    except metadata.PackageNotFoundError:
        return ""


def experts_of(problem: Problem) -> megakernel.Experts:
    """Return the experts as our layer takes them."""
    return megakernel.Experts(problem.gate_up_E2IH, problem.down_EHI, main_grad=problem.main_grad)


def live_output(
    problem: Problem, save: str = "preactivations"
) -> Callable[[], megakernel.MoEOutput]:
    """Return the call on the live route, all its outputs included."""
    layer = problem.x_TH, problem.router_EH, experts_of(problem)
    router = megakernel.Router(problem.top_k)
    return lambda: megakernel.moe(*layer, router, save=save)


def replay_output(problem: Problem) -> Callable[[], megakernel.MoEOutput]:
    """Return the call on the replay route, its row tables built here, ahead."""
    experts = experts_of(problem)
    router = megakernel.Router(problem.top_k)
    replay = megakernel.prepare_replay(problem.expert_of_TK, experts.num_experts, experts=experts)
    return lambda: megakernel.moe(problem.x_TH, problem.router_EH, experts, router, replay=replay)


def ours_live(problem: Problem, save: str = "preactivations") -> Call:
    """Router, dispatch, FFN and combine in one launch."""
    call = live_output(problem, save)
    return lambda: call().y_TH


def ours_replay(problem: Problem) -> Call:
    """The same with known ids; the router still weighs them."""
    call = replay_output(problem)
    return lambda: call().y_TH


def ours_given(problem: Problem) -> Call:
    """Ids and weights are given; no router."""
    experts = megakernel.Experts(problem.gate_up_E2IH, problem.down_EHI)
    return lambda: megakernel.moe_routed(
        problem.x_TH, problem.expert_of_TK, problem.gate_TK, experts
    )


def configured_call(
    problem: Problem, route: str, config: megakernel.KernelConfig, save: str = "preactivations"
) -> Call:
    """Return our call with a config, on the live or the replay route."""
    experts = experts_of(problem)
    replay = None
    if route == "replay":
        replay = megakernel.prepare_replay(
            problem.expert_of_TK, experts.num_experts, config=config
        )
    router = megakernel.Router(problem.top_k)
    return lambda: (
        megakernel.moe(
            problem.x_TH,
            problem.router_EH,
            experts,
            router,
            replay=replay,
            config=config,
            save=save,
        ).y_TH
    )


def eager(problem: Problem) -> Call:
    """The loop over experts of the reference, its router included."""
    return lambda: reference.moe(
        problem.x_TH,
        problem.router_EH,
        problem.gate_up_E2IH,
        problem.down_EHI,
        problem.top_k,
    )


def torch_router(problem: Problem) -> tuple[Tensor, Tensor]:
    """The quickest router of plain PyTorch, given to every peer without one of its own."""
    logits_TE = problem.x_TH @ problem.router_EH.T
    top = logits_TE.topk(problem.top_k, dim=1)
    return top.indices, top.values.float().softmax(1)


def grouped_mm(problem: Problem) -> Call:
    """Sort by expert, two grouped products of PyTorch, unsort, weighted sum."""

    def call() -> Tensor:
        expert_of_TK, gate_TK = torch_router(problem)
        T, K = expert_of_TK.shape
        in_order_A, order_A = expert_of_TK.flatten().sort(stable=True)
        experts_E = torch.arange(len(problem.down_EHI), device=in_order_A.device)
        end_E = torch.searchsorted(in_order_A, experts_E, right=True).int()
        x_AH = problem.x_TH[order_A // K]
        gate_up_A2I = torch.nn.functional.grouped_mm(
            x_AH, problem.gate_up_E2IH.transpose(1, 2), offs=end_E
        )
        gate_AI, up_AI = gate_up_A2I.chunk(2, dim=1)
        sorted_AH = torch.nn.functional.grouped_mm(
            silu(gate_AI) * up_AI, problem.down_EHI.transpose(1, 2), offs=end_E
        )
        y_AH = torch.empty_like(sorted_AH)
        y_AH[order_A] = sorted_AH
        return (y_AH.view(T, K, -1) * gate_TK[..., None].to(y_AH.dtype)).sum(1)

    return call


OURS = (
    Provider("ours live", ours_live, is_ours=True, trains=True),
    Provider("ours replay", ours_replay, is_ours=True, trains=True),
    Provider("ours given", ours_given, is_ours=True, has_router=False),
)
PLAIN = (
    Provider("eager loop", eager, capturable=False, trains=True),
    Provider("grouped_mm", grouped_mm, trains=True),
)
