"""Replay: rollout's experts are forced later, their weights come from the router of that day.

    python examples/replay.py       # on a GPU if there is one, else in Triton's interpreter

Prints:
    same router: the same bits True
    changed router: of 24 tokens ... choose otherwise, 0 under replay
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported

from megakernel import Experts, Router, moe, prepare_replay

torch.manual_seed(0)
T, H, I, E = 24, 64, 32, 8
device = "cuda" if torch.cuda.is_available() else "cpu"
x_TH = torch.randn(T, H, device=device)
router_EH = torch.randn(E, H, device=device) / 8
weights = torch.randn(E, 2 * I, H, device=device) / 8, torch.randn(E, H, I, device=device) / 6
experts, router = Experts(*weights), Router(top_k=2)

rollout = moe(x_TH, router_EH, experts, router)
replay = prepare_replay(rollout.expert_of_TK, E, experts=experts)  # sorted here, ahead of the step
again = moe(x_TH, router_EH, experts, router, replay=replay)
print("same router: the same bits", torch.equal(again.y_TH, rollout.y_TH))

changed_EH = router_EH + torch.randn_like(router_EH) / 16  # as after an optimizer's step
live = moe(x_TH, changed_EH, experts, router)
forced = moe(x_TH, changed_EH, experts, router, replay=replay)
moved = [(out.expert_of_TK != rollout.expert_of_TK).any(1).sum() for out in (live, forced)]
print(f"changed router: of {T} tokens {moved[0]} choose otherwise, {moved[1]} under replay")
