"""In a Hugging Face model: swap the layers, record the routing, force it again.

    pip install "moe-megakernel[transformers]"
    python examples/hf_transformers.py   # on a GPU if there is one, else in Triton's interpreter

Prints:
    swapped: logits within ... of eager
    recorded (8, 1, 2): tokens, MoE layers, top-k
    replayed: the same logits True
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is imported

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megakernel.adapters.transformers import record_routing, replay_routing, use_megakernel

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=61, hidden_size=48, moe_intermediate_size=24, num_hidden_layers=1, head_dim=12,
    num_attention_heads=4, num_key_value_heads=2, num_experts=5, num_experts_per_tok=2,
)  # fmt: skip
model = Qwen3MoeForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
ids = torch.arange(8, device=model.device).view(1, 8)

with torch.no_grad():
    eager = model(ids).logits
    use_megakernel(model)  # in place; parameters and their names stay
    with record_routing(model) as record:
        live = model(ids).logits
    print(f"swapped: logits within {(live - eager).abs().max():.0e} of eager")
    print(f"recorded {tuple(record.ids_TLK.shape)}: tokens, MoE layers, top-k")
    with replay_routing(model, record.ids_TLK):
        print("replayed: the same logits", torch.equal(model(ids).logits, live))
