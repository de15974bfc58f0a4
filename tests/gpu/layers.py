"""Layers of public models: inputs drawn where they are used, truth for some of their tokens."""

import torch
from torch import Tensor

import reference
from megakernel import Experts, MoEOutput
from megakernel.tools.models import MODELS
from tests.helpers.cases import Case
from tests.helpers.inputs import Inputs

INTERPRETED_SHRINK = 32  # widths and tokens where --interpret-gpu-tests runs a test's body


def make_layer(
    name: str, num_tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Inputs:
    """Draw tokens and weights of a named model; activations stay near one."""
    model = MODELS[name]
    shrink = 1 if device.type == "cuda" else INTERPRETED_SHRINK
    H, I = model.hidden // shrink, model.intermediate // shrink
    T = min(num_tokens, max(num_tokens // shrink, 5))
    case = Case(name, T, model.top_k, model.num_experts, H, I, "a layer in use", dtype)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)

    weights = Experts(
        draw(case.E, 2 * I, H, std=H**-0.5),
        draw(case.E, H, I, std=I**-0.5),
    )
    return Inputs(case, draw(T, H, std=1.0), draw(case.E, H, std=H**-0.5), weights)


def truth_of_tokens(inputs: Inputs, out: MoEOutput, tokens: Tensor) -> Tensor:
    """Return the float64 output of some tokens for the ids they got.

    Only the experts of those tokens are brought to float64: a whole layer would not fit.
    """
    ids_TK = out.expert_of_TK[tokens].long()
    experts, local_TK = ids_TK.unique(return_inverse=True)
    x_TH = inputs.x_TH[tokens]
    gate_TK = reference.weigh(x_TH.double() @ inputs.router_EH.double().T, ids_TK, True)
    weights = inputs.experts
    return reference.moe_by_token(
        x_TH, local_TK, gate_TK, weights.gate_up_E2IH[experts], weights.down_EHI[experts]
    )


def eager_rows(inputs: Inputs, out: MoEOutput) -> Tensor:
    """Return what eager PyTorch computes, in the inputs' dtype, for the same ids and weights."""
    weights = inputs.experts
    return reference.moe_by_expert(
        inputs.x_TH, out.expert_of_TK.long(), out.gate_TK, weights.gate_up_E2IH, weights.down_EHI
    )


def worst_row_error(*, actual: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of any token."""
    difference_TH = actual.double() - expected.double()
    return float((difference_TH.norm(dim=1) / expected.double().norm(dim=1)).max())


def spread_tokens(num_tokens: int, count: int, device: torch.device) -> Tensor:
    """Return at most ``count`` distinct tokens, first and last among them."""
    return torch.linspace(0, num_tokens - 1, count, device=device).round().long().unique()
