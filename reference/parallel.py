"""The layer over R ranks, simulated in one process: a placement must not change the answer."""

import torch
from torch import Tensor

from reference.experts import expert_ffn


def moe_by_rank(
    x_TH: Tensor,
    slot_of_TK: Tensor,
    gate_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    expert_of_P: Tensor,
    num_ranks: int,
) -> Tensor:
    """Dispatch every assignment to its slot's rank, run the slots there, and combine in k order.

    Each assignment's row is computed on its own, so the result is the same bits for any placement
    that serves every choice from a slot holding the right expert.

    Args:
        x_TH: tokens; computed in its own dtype.
        slot_of_TK: integer slot of each choice in [0, P); -1 is skipped.
        gate_TK: weight of each choice.
        gate_up_E2IH: weights of the logical experts, gate rows first.
        down_EHI: down projections of the logical experts.
        expert_of_P: expert held by each slot; -1 is an empty slot.
        num_ranks: R; slot p lives on rank p // (P / R).

    Returns:
        y_TH: dtype of ``x_TH``.

    Raises:
        ValueError: if P is not a multiple of ``num_ranks``, or a choice goes to an empty slot.
    """
    if len(expert_of_P) % num_ranks:
        raise ValueError(f"num_ranks must divide the {len(expert_of_P)} slots, got {num_ranks}")
    used_P = slot_of_TK[slot_of_TK >= 0].unique()
    if bool((expert_of_P[used_P] < 0).any()):
        raise ValueError("slot_of_TK must point to slots that hold an expert")
    num_local_slots = len(expert_of_P) // num_ranks
    y_TKH = x_TH.new_zeros(*slot_of_TK.shape, x_TH.shape[1])
    for rank in range(num_ranks):
        for slot in range(rank * num_local_slots, (rank + 1) * num_local_slots):
            for token, choice in (slot_of_TK == slot).nonzero().tolist():
                expert = int(expert_of_P[slot])
                x_1H = x_TH[token : token + 1]
                row_1H = expert_ffn(x_1H, gate_up_E2IH[expert], down_EHI[expert])
                y_TKH[token, choice] = row_1H[0]
    gate_TK = gate_TK.masked_fill(slot_of_TK < 0, 0.0)
    gated_TKH = gate_TK.to(x_TH.dtype)[..., None] * y_TKH
    return torch.stack([gated_TKH[:, k] for k in range(gated_TKH.shape[1])]).sum(0)
