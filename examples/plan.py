"""Plan ahead: record a micro-batch, plan for four ranks, replay it so.

    python examples/plan.py         # on a GPU if there is one, else in Triton's interpreter

Prints:
    imbalance ... -> ...
    expert of each slot, -1 is empty: [...]
    same bits as without a plan: True
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported

from balance import Topology, Trace, make_plan
from megakernel import Experts, Placement, Router, moe, prepare_replay

torch.manual_seed(0)
T, H, I, E, R = 32, 64, 32, 8, 4
device = "cuda" if torch.cuda.is_available() else "cpu"
x_TH = torch.randn(T, H, device=device) + 0.5  # what tokens share makes some experts popular
weights = torch.randn(E, 2 * I, H, device=device) / 8, torch.randn(E, H, I, device=device) / 6
layer = torch.randn(E, H, device=device) / 8, Experts(*weights), Router(top_k=2)

live = moe(x_TH, *layer)
token_T = torch.arange(T).numpy()  # all in micro-batch 0, dealt to the ranks in turn
ids_TLK = live.expert_of_TK[:, None].cpu().numpy()
topology = Topology(num_nodes=1, ranks_per_node=R, spare_slots_per_rank=1)
plan = make_plan(Trace(ids_TLK, token_T * 0, token_T % R, E), topology)
load_R = live.load_E.view(R, -1).sum(1).double()
print(f"imbalance {load_R.max() / load_R.mean():.2f} -> {plan.summary()['imbalance_avg']:.2f}")
placement = Placement.from_plan(plan, micro_batch=0, layer=0, device=device)
print("expert of each slot, -1 is empty:", placement.expert_of_P.tolist())
replay = prepare_replay(live.expert_of_TK, E, placement, experts=layer[1])
planned = moe(x_TH, *layer, replay=replay)
print("same bits as without a plan:", torch.equal(planned.y_TH, live.y_TH))
