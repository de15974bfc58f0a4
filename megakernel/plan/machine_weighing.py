"""What the backward's tasks on the weights of tokens mean, in plain PyTorch; see machine_backward.

The derivative of the router's rule is autograd's, of ``machine_routing.weigh``.
"""

import torch
from torch import Tensor

from megakernel.plan.machine_backward import backward_spec
from megakernel.plan.machine_memory import Memory, columns_of, span, tokens_of
from megakernel.plan.machine_routing import weigh


def ds(m: Memory, tile: int, _: int) -> None:
    """Gradients of weights for a token tile: parts in block order, what comes in, then logits."""
    spec = backward_spec(m)
    tokens = tokens_of(m, tile, spec.block_tokens)
    at = span(tokens)
    held_TK = m.read("rows.row_of_TK", at) >= 0
    dgate_TK = torch.zeros(held_TK.shape, dtype=m.wide, device=m.device)
    for place, choice in held_TK.nonzero().tolist():
        dgate_TK[place, choice] = dgate_of(m, tokens[place], choice)
    if "incoming.dgate_TK" in m:
        dgate_TK = dgate_TK + m.read("incoming.dgate_TK", at).masked_fill(~held_TK, 0.0)
    if "gradients.gate_TK" in m:
        m.write("gradients.gate_TK", at, dgate_TK)
    if spec.gradients.weighs:
        chosen = "saved.chosen_TK" if "saved.chosen_TK" in m else "routing.expert_of_TK"
        dlogits_TE = through_rule(m, tokens, m.read(chosen, at), dgate_TK)
        if "incoming.dlogits_TE" in m:
            dlogits_TE = dlogits_TE + m.read("incoming.dlogits_TE", at)
        m.write("scratch.dlogits_TE", at, dlogits_TE)
    if spec.gradients.token_gated:
        m.write("scratch.dtoken_T", at, dtoken_of(m, tokens))


def dgate_of(m: Memory, token: int, choice: int) -> Tensor:
    """Return <dA', h> + <dy, bias of down>: the gradient of one weight."""
    row = int(m.read("rows.row_of_TK", (token, choice)))
    total = m.read("scratch.ds_CB", m.size.shared_tiles * m.spec.block_rows + row).sum()
    if "experts.down_bias_EH" in m:
        expert = int(m.read("routing.expert_of_TK", (token, choice)))
        bias_H = m.read("experts.down_bias_EH", expert)
        total = total + m.read("incoming.dy_TH", token) @ bias_H
    return total


def through_rule(m: Memory, tokens: range, ids_TK: Tensor, dgate_TK: Tensor) -> Tensor:
    """Return the gradient of logits through the weights of the ids they were made for."""
    logits_TE = m.read("routing.logits_TE", span(tokens))
    dlogits_TE = torch.zeros_like(logits_TE)
    some_T = (ids_TK >= 0).any(1)  # a token without any has no weight to go back through
    with torch.enable_grad():
        leaf_TE = logits_TE[some_T].detach().requires_grad_()
        gate_TK = weigh(leaf_TE, ids_TK[some_T], m.spec.router)
        (dlogits_TE[some_T],) = torch.autograd.grad(gate_TK, leaf_TE, dgate_TK[some_T])
    return dlogits_TE


def dtoken_of(m: Memory, tokens: range) -> Tensor:
    """Return the gradient of token_gate · x: sigmoid' of it, times <dA', h> of all slices."""
    height = m.spec.block_rows
    padded_tokens = -(-m.size.num_tokens // height) * height
    dweight_T = torch.zeros(len(tokens), dtype=m.wide, device=m.device)
    for index in range(m.spec.num_slices):
        first = index * padded_tokens
        rows = slice(first + tokens.start, first + tokens.stop)
        dweight_T = dweight_T + m.read("scratch.ds_CB", rows).sum(1)
    weight_T = m.read("saved.sigmoid_T", span(tokens))
    return dweight_T * weight_T * (1.0 - weight_T)


def drouter(m: Memory, tile: int, block: int) -> None:
    """dlogitsᵀ · x for a block of experts and one of H; past those, their bias's sums."""
    spec = backward_spec(m)
    experts = columns_of(tile, tile + 1, spec.block_experts, spec.num_experts)
    dlogits_TE = m.read("scratch.dlogits_TE", (slice(None), experts))
    if block >= spec.router_columns:
        m.write("gradients.router_bias_E", experts, dlogits_TE.sum(0))
        return
    columns = columns_of(block, block + 1, spec.step, spec.hidden)
    x_TH = m.read("x_TH", (slice(None), columns))
    dlogits_TE = m.rounded_as("router.weight_EH", dlogits_TE)
    m.write("gradients.router_weight_EH", (experts, columns), dlogits_TE.T @ x_TH)


def dtoken_gate(m: Memory, tile: int, _: int) -> None:
    """Sum of dtoken · x over all tokens, for one block of H."""
    columns = columns_of(tile, tile + 1, m.spec.block_h, m.spec.hidden)
    x_TH = m.read("x_TH", (slice(None), columns))
    m.write("gradients.token_gate_1H", (0, columns), m.read("scratch.dtoken_T") @ x_TH)
