"""The tensors of a case: random weights, tokens that a live router sends where it says."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

import reference
from megakernel import MainGrad
from megakernel.tools.models import ModelShape
from perf.problems.cases import Case, make_ids

# Logits have this standard deviation, and those of the chosen experts lie so many above the rest:
# far enough that bfloat16 cannot change a choice, and small enough that it weighs them well.
LOGIT_SPREAD = 0.25
LIFT_SPREADS = 12.0


@dataclass(frozen=True, eq=False)
class Problem:
    """Random tensors that a live router sends where the case demands.

    Attributes:
        case: what they were made for.
        x_TH, router_EH, gate_up_E2IH, down_EHI: one dtype; outputs are of order 1.
        expert_of_TK: int32, best first, what a live router chooses.
        gate_TK: float32, renormalised.
        main_grad: where our layer's gradients of expert weights go; None for autograd's own.
    """

    case: Case
    x_TH: Tensor
    router_EH: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor
    expert_of_TK: Tensor
    gate_TK: Tensor
    main_grad: MainGrad | None = None

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_of_TK.shape[1]


def make_problem(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Return random tensors for a case.

    The router's rows are orthogonal, and each token gets the rows of its experts added, so that
    a live router chooses exactly the experts of the scenario.

    Raises:
        ValueError: if H < E, where rows cannot be orthogonal.
    """
    model = case.model
    if model.hidden < model.num_experts:
        raise ValueError(f"hidden must be at least E={model.num_experts}, got {model.hidden}")
    random = torch.Generator(device).manual_seed(case.seed)
    gate_up_E2IH, down_EHI, router_EH = make_weights(model, device, dtype)
    ids_TK = torch.from_numpy(make_ids(case)).to(device)
    x_TH = torch.randn(case.num_tokens, model.hidden, generator=random, device=device)
    for choice in range(model.top_k):
        x_TH += LIFT_SPREADS / LOGIT_SPREAD * router_EH[ids_TK[:, choice]]
    x_TH = x_TH.to(dtype)
    routing = reference.route(x_TH.float(), router_EH.float(), model.top_k)
    if not torch.equal(routing.expert_of_TK.sort(1).values, ids_TK.sort(1).values):
        raise RuntimeError(f"the router does not choose the experts of {case.name}")
    return Problem(
        case, x_TH, router_EH, gate_up_E2IH, down_EHI, routing.expert_of_TK.int(), routing.gate_TK
    )


@lru_cache(maxsize=1)
def make_weights(
    model: ModelShape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate_up_E2IH, down_EHI and router_EH; the last model's are kept."""
    E, H, I = model.num_experts, model.hidden, model.intermediate
    random = torch.Generator(device).manual_seed(1)
    gate_up = torch.empty(E, 2 * I, H, dtype=dtype, device=device)
    down = torch.empty(E, H, I, dtype=dtype, device=device)
    gate_up.normal_(std=H**-0.5, generator=random)
    down.normal_(std=I**-0.5, generator=random)
    router_HE, _ = torch.linalg.qr(torch.randn(H, E, generator=random, device=device))
    return gate_up, down, (LOGIT_SPREAD * router_HE.T).contiguous().to(dtype)
