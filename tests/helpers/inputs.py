"""Inputs of the layer and the truth about them, which the kernel tests share."""

from dataclasses import dataclass

import torch
from torch import Tensor

import reference
from megakernel import Experts, KernelConfig, MoEOutput, Router, moe
from megakernel.launch.workspace import fill_all_scratch
from tests.helpers.cases import Case

# Small tiles, so that small problems have many tasks.
SMALL = KernelConfig(
    block_rows=16,
    block_i=32,
    block_h=32,
    step=64,
    block_tokens=16,
    block_experts=16,
    select_tokens=16,
    combine_tokens=8,
    column_groups=2,
    tile_group=2,
    blocks_per_task=2,
    least_tasks=4,
    half_tails=True,
)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of one case."""

    case: Case
    x_TH: Tensor
    router_EH: Tensor
    experts: Experts

    @property
    def router(self) -> Router:
        """Top-k of the case, renormalised."""
        return Router(self.case.K)


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Draw the tensors of a case; weights are scaled so that activations stay near one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(case.dtype).to(device)

    T, E, H, I = case.T, case.E, case.H, case.I
    x_TH = draw(T, H, scale=1.0)
    router_EH = draw(E, H, scale=H**-0.5)
    if case.skew != "random":
        x_TH[:, 0] = 1.0
        hot = slice(0, 1) if case.skew == "one" else slice(0, E // 2)
        router_EH[hot, 0] += 10.0  # ten standard deviations of a logit
    weights = Experts(draw(E, 2 * I, H, scale=H**-0.5), draw(E, H, I, scale=I**-0.5))
    return Inputs(case, x_TH, router_EH, weights)


def run(inputs: Inputs, **options: object) -> MoEOutput:
    """Call the layer on the inputs; with the small config unless told otherwise."""
    options.setdefault("config", SMALL)
    poison_scratch()
    router = options.pop("router", inputs.router)
    return moe(inputs.x_TH, inputs.router_EH, inputs.experts, router, **options)  # type: ignore


def poison_scratch() -> None:
    """Fill all scratch with NaN (as integers -1), so that a launch reads only what it wrote."""
    fill_all_scratch(0xFF)


def truth(inputs: Inputs, expert_of_TK: Tensor, renormalize: bool = True) -> Tensor:
    """Return the float64 output for given ids, with float64 weights."""
    logits_TE = inputs.x_TH.double() @ inputs.router_EH.double().T
    gate_TK = reference.weigh(logits_TE, expert_of_TK, renormalize)
    gate_up, down = inputs.experts.gate_up_E2IH, inputs.experts.down_EHI
    return reference.moe_by_token(inputs.x_TH, expert_of_TK, gate_TK, gate_up, down)


def eager(inputs: Inputs, expert_of_TK: Tensor) -> Tensor:
    """Return what eager PyTorch computes in the dtype of the inputs, for the same ids."""
    gate_up, down = inputs.experts.gate_up_E2IH, inputs.experts.down_EHI
    return reference.moe(
        inputs.x_TH, inputs.router_EH, gate_up, down, inputs.case.K, expert_of_TK=expert_of_TK
    )
