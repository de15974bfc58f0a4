"""Layers of public models: inputs drawn where they are used, truth for some of their tokens."""

import torch
from torch import Tensor

import reference
from megakernel import Experts, MoEOutput
from megakernel.plan.order import INTERPRETED
from megakernel.tools.models import MODELS
from tests.helpers.cases import Case
from tests.helpers.inputs import Inputs

INTERPRETED_SHRINK = 32  # widths and tokens where --interpret-gpu-tests runs a test's body


def make_layer(
    name: str, num_tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Inputs:
    """Draw tokens and weights of a named model; activations stay near one."""
    model = MODELS[name]
    shrink = INTERPRETED_SHRINK if INTERPRETED else 1
    H, I = model.hidden // shrink, model.intermediate // shrink
    T = min(num_tokens, max(num_tokens // shrink, 5))
    case = Case(name, T, model.top_k, model.num_experts, H, I, "a layer in use", dtype)
    weights = Experts(
        draw(case.E, 2 * I, H, std=H**-0.5, dtype=dtype, device=device),
        draw(case.E, H, I, std=I**-0.5, dtype=dtype, device=device),
    )
    x_TH = draw(T, H, std=1.0, dtype=dtype, device=device)
    router_EH = draw(case.E, H, std=H**-0.5, dtype=dtype, device=device)
    return Inputs(case, x_TH, router_EH, weights)


def draw(*shape: int, std: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw normal numbers, in place: weights of 15 GB have no room for a copy."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)


def truth_of_tokens(inputs: Inputs, out: MoEOutput, tokens: Tensor) -> Tensor:
    """Return the float64 output of some tokens for the ids they got.

    One expert at a time is brought to float64: those of 8 tokens take 22 GB in DeepSeek-V3.
    """
    ids_TK, x_TH = out.expert_of_TK[tokens].long(), inputs.x_TH[tokens]
    gate_TK = reference.weigh(x_TH.double() @ inputs.router_EH.double().T, ids_TK, True)
    weights, y_TH = inputs.experts, torch.zeros_like(x_TH, dtype=torch.float64)
    for expert in ids_TK.unique().tolist():
        chosen_TK = ids_TK == expert
        tokens_of_expert = chosen_TK.any(1).nonzero()[:, 0]
        gate_T1 = (gate_TK * chosen_TK).sum(1, keepdim=True)[tokens_of_expert]
        only = slice(expert, expert + 1)
        y_TH[tokens_of_expert] += reference.moe_by_token(
            x_TH[tokens_of_expert], torch.zeros_like(gate_T1, dtype=torch.int64), gate_T1,
            weights.gate_up_E2IH[only], weights.down_EHI[only],
        )  # fmt: skip
    return y_TH


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


def keep_busy(noise: Tensor) -> None:
    """Give the current stream something else to do."""
    noise @ noise
