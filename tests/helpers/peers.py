"""Stand-ins for other people's packages: their signatures, layouts and dtypes, in plain PyTorch.

Each refuses what the real function refuses, reads its arguments as the real one does, and computes
the layer with a loop over experts. So a provider that hands over the wrong thing is seen to.
"""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.functional import linear, silu


def install(monkeypatch, name, **members):
    """Let ``import name`` find a module that holds the members, and its packages with it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        module = ModuleType(path)
        module.__spec__, module.__path__ = ModuleSpec(path, None), []
        monkeypatch.setitem(sys.modules, path, module)
    vars(module).update(members)


def experts_sum(x_TH, expert_of_TK, weight_TK, gate_EIH, up_EIH, down_EHI):
    """The layer, one expert after the other, differentiable."""
    y_TH = torch.zeros_like(x_TH)
    for expert in range(len(down_EHI)):
        weight_T1 = (weight_TK * (expert_of_TK == expert)).sum(1, keepdim=True)
        h_TI = silu(linear(x_TH, gate_EIH[expert])) * linear(x_TH, up_EIH[expert])
        y_TH = y_TH + weight_T1.to(x_TH.dtype) * linear(h_TI, down_EHI[expert])
    return y_TH


def liger_kernel(monkeypatch):
    """liger_kernel.ops.fused_moe of Liger-Kernel 0.8.5."""

    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
            assert top_k_index.dtype == torch.int32
            assert x.shape[1] == gate_up_proj.shape[2] == down_proj.shape[1]
            gate, up = gate_up_proj.chunk(2, dim=1)
            return experts_sum(x, top_k_index, top_k_weights, gate, up, down_proj)

    install(
        monkeypatch,
        "liger_kernel.ops.fused_moe",
        LigerFusedMoEFunction=LigerFusedMoEFunction,
    )


def liger_cute_kernels(monkeypatch):
    """liger_cute_kernels 0.8.5 and the front end of Liger-Kernel for it; no gradients."""
    configured = {}

    @dataclass(frozen=True)
    class MoEConfig:
        max_tokens: int
        hidden_size: int
        num_experts: int
        top_k: int
        num_hosts: int
        gpus_per_host: int
        group: str | None = None
        max_inflight: int = 1

    def configure(*, process_groups=None, bootstrap_group=None, device=None, flsce=None, moe=None):
        assert torch.distributed.is_initialized()
        assert moe.num_hosts * moe.gpus_per_host == 1
        assert "moe" not in configured, "growth is unsupported"
        configured["moe"] = moe

    def moe_fused(
        X, expert_indices, expert_weights, all_B, all_C, all_A, num_experts, top_k, pg=None
    ):
        most = configured["moe"]
        if len(X) > most.max_tokens or X.shape[1] > most.hidden_size:
            raise ValueError("MoE input exceeds configured capacity")
        assert num_experts <= most.num_experts and top_k <= most.top_k
        assert expert_indices.dtype == torch.int32 and expert_indices.shape[1] == top_k
        assert expert_weights.dtype == X.dtype == torch.bfloat16
        assert all_B.stride(0) == all_C.stride(0) and all_B.stride(2) == all_C.stride(2) == 1
        return experts_sum(X, expert_indices, expert_weights, all_B, all_C, all_A)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    install(monkeypatch, "liger_kernel.ops.cute.ops.moe", moe_fused=moe_fused)
    install(monkeypatch, "liger_cute_kernels", MoEConfig=MoEConfig, configure=configure)


def sonicmoe(monkeypatch):
    """sonicmoe 0.1.2: weights as [2I, H, E] and [H, I, E], their experts outermost in memory."""

    flags = {
        "is_inference_mode_enabled": False,
        "is_softmax_over_topk": True,
        "norm_topk_probs": False,
        "concat_layout": False,
    }

    def moe_TC_softmax_topk_layer(
        x, router_w, w1, b1, w2, b2, K, stream_id, activation_type="swiglu", **options
    ):
        assert options.keys() <= flags.keys()
        chosen = flags | options
        assert b1 is None and b2 is None and activation_type == "swiglu"
        assert chosen["is_inference_mode_enabled"] != x.requires_grad
        assert w1.stride(1) == w2.stride(1) == 1, "the products' inner dimensions are contiguous"
        logits = linear(x, router_w)
        if chosen["is_softmax_over_topk"]:
            values, ids = logits.topk(K, dim=1)
            weights = values.float().softmax(1)
        else:
            weights, ids = logits.float().softmax(1).topk(K, dim=1)
        w1, w2 = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        interleaved = w1[:, ::2], w1[:, 1::2]
        gate, up = w1.chunk(2, dim=1) if chosen["concat_layout"] else interleaved
        return experts_sum(x, ids, weights, gate, up, w2), logits, ids.flatten().bincount()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    install(monkeypatch, "sonicmoe", moe_TC_softmax_topk_layer=moe_TC_softmax_topk_layer)


def moe_ops(monkeypatch):
    """moe_ops 0.1.0: rows sorted by expert, the place of choice k of token t at k·T + t."""

    def fused_topk_softmax(logits, K, fp32_routing=False):
        values, ids = (logits.float() if fp32_routing else logits).topk(K, dim=1)
        return values.softmax(1), ids.int()

    def permute(input, indices, num_out_tokens=0, E=None):
        order_A = indices.T.flatten().argsort(stable=True)
        row_id_map = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A)))
        load_E = indices.flatten().bincount(minlength=E)
        offsets = torch.nn.functional.pad(load_E.cumsum(0), (1, 0)).int()
        return input[order_A % len(input)], row_id_map.int(), offsets

    def grouped_gemm(A, B, offsets, trans_b=True):
        assert A.is_contiguous() and B.is_contiguous() and len(offsets) == len(B) + 1
        rows = zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
        return torch.cat(
            [A[i:j] @ (b.T if trans_b else b) for b, (i, j) in zip(B, rows, strict=True)]
        )

    def unpermute(input, row_id_map, prob, num_tokens, num_topK, max_tokens=-1):
        assert prob.shape == (num_tokens, num_topK)
        picked_KTH = input[row_id_map.long()].view(num_topK, num_tokens, -1)
        return (picked_KTH * prob.T[..., None].to(input.dtype)).sum(0)

    install(
        monkeypatch, "moe_ops", fused_topk_softmax=fused_topk_softmax, permute=permute,
        grouped_gemm=grouped_gemm, unpermute=unpermute,
    )  # fmt: skip


STAND_INS = {
    "Liger Triton": liger_kernel,
    "LigerCute": liger_cute_kernels,
    "SonicMoE": sonicmoe,
    "moe-ops": moe_ops,
}
