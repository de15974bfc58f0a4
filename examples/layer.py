"""The layer, live: router, dispatch, experts and combine in one launch.

    python examples/layer.py        # on a GPU if there is one, else in Triton's interpreter

Prints:
    y_TH (24, 64), load_E sums to 48
    largest difference from plain PyTorch in float64: ...
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported

import reference
from megakernel import Experts, Router, moe

torch.manual_seed(0)
T, H, I, E, K = 24, 64, 32, 8, 2
device = "cuda" if torch.cuda.is_available() else "cpu"
x_TH = torch.randn(T, H, device=device)
router_weight_EH = torch.randn(E, H, device=device) / 8
gate_up_E2IH = torch.randn(E, 2 * I, H, device=device) / 8  # gate rows first, then up rows
down_EHI = torch.randn(E, H, I, device=device) / 6

out = moe(x_TH, router_weight_EH, Experts(gate_up_E2IH, down_EHI), Router(top_k=K))
print(f"y_TH {tuple(out.y_TH.shape)}, load_E sums to {int(out.load_E.sum())}")

weights = (router_weight_EH.double(), gate_up_E2IH.double(), down_EHI.double())
true_TH = reference.moe(x_TH.double(), *weights, K)
difference = (out.y_TH - true_TH).abs().max()
assert difference < 1e-5
print(f"largest difference from plain PyTorch in float64: {difference:.1e}")
