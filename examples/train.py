"""Train through the layer: rollout's experts are forced, their live weights learn.

    python examples/train.py        # on a GPU if there is one, else in Triton's interpreter

Prints:
    gradients of x_TH, router and experts: under a plan the same bits True
    loss ... -> ... -> ...
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported

from megakernel import Experts, MainGrad, Placement, Router, moe, prepare_replay

torch.manual_seed(0)
T, H, I, E = 24, 32, 16, 4
device = "cuda" if torch.cuda.is_available() else "cpu"
x_TH = torch.randn(T, H, device=device, requires_grad=True)
target_TH = torch.randn(T, H, device=device)
router_EH = torch.randn(E, H, device=device, requires_grad=True)
gate_up_E2IH = torch.randn(E, 2 * I, H, device=device).div(4).requires_grad_()
down_EHI = torch.randn(E, H, I, device=device).div(4).requires_grad_()
with torch.no_grad():
    ids_TK = moe(x_TH, router_EH, Experts(gate_up_E2IH, down_EHI), Router(top_k=2)).expert_of_TK


def loss_of(rows, placement=None, main_grad=None):
    """The share of some tokens in the loss. ``save``: FFN1 is run again in the backward."""
    experts = Experts(gate_up_E2IH, down_EHI, main_grad=main_grad)
    replay = prepare_replay(ids_TK[rows], E, placement, experts=experts)
    out = moe(x_TH[rows], router_EH, experts, Router(top_k=2), replay=replay, save="nothing")
    return (out.y_TH - target_TH[rows]).square().sum() / T


leaves = x_TH, router_EH, gate_up_E2IH, down_EHI
plan = Placement(torch.tensor([2, 0, 3, 1, 2], device=device))  # expert 2 has two copies
one, other = (torch.autograd.grad(loss_of(slice(T), p), leaves) for p in (None, plan))
same = all(torch.equal(*pair) for pair in zip(one, other, strict=True))
print("gradients of x_TH, router and experts: under a plan the same bits", same)

optimizer, losses = torch.optim.AdamW(leaves[1:], lr=0.03), []
buffers = torch.empty_like(gate_up_E2IH), torch.empty_like(down_EHI)  # float32, never zeroed
for _ in range(3):
    optimizer.zero_grad()
    main = MainGrad(*buffers)  # the first micro-batch writes, later ones add
    shares = [loss_of(rows, main_grad=main) for rows in (slice(0, 16), slice(16, T))]
    for share in shares:
        share.backward()
    gate_up_E2IH.grad, down_EHI.grad = buffers
    optimizer.step()
    losses.append(sum(share.item() for share in shares))
assert losses[0] > losses[1] > losses[2]
print("loss", " -> ".join(f"{loss:.2f}" for loss in losses))
