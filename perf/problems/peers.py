"""Other people's layers, each adapted to the same problem; imported only where installed."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from perf.problems.providers import OURS, PLAIN, Call, Provider, torch_router
from perf.problems.tensors import Problem

# LigerCute reserves memory for its largest call once per process: 4.7 GB for these sizes.
CUTE_MAX_TOKENS, CUTE_MAX_HIDDEN, CUTE_MAX_EXPERTS, CUTE_MAX_TOP_K = 16384, 7168, 256, 8

# "batched_mm" copies an expert's weights for every assignment; beyond this it is not tried.
MOST_COPIED_BYTES = 16e9


def transformers_eager(problem: Problem) -> Call:
    """The experts module of Qwen3-MoE in transformers: a loop that asks the GPU who was chosen."""
    return transformers_experts(problem, "eager")


def transformers_batched_mm(problem: Problem) -> Call:
    """The same module with a copy of the weights for every assignment: made for few tokens.

    Raises:
        ValueError: if the copies would take over MOST_COPIED_BYTES.
    """
    weights = problem.gate_up_E2IH[0].nbytes + problem.down_EHI[0].nbytes
    copied_bytes = problem.expert_of_TK.numel() * weights
    if copied_bytes > MOST_COPIED_BYTES:
        raise ValueError(
            f"copied weights must take at most {MOST_COPIED_BYTES:.0f} bytes, got {copied_bytes}"
        )
    return transformers_experts(problem, "batched_mm")


def transformers_grouped_mm(problem: Problem) -> Call:
    """The same module on PyTorch's grouped products."""
    return transformers_experts(problem, "grouped_mm")


def transformers_experts(problem: Problem, implementation: str) -> Call:
    """Return the call of the experts module of Qwen3-MoE with one of its implementations."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, H, I = problem.down_EHI.shape
    # A dict, for the checked signature does not know the last one.
    options: dict[str, Any] = {
        "num_experts": E,
        "hidden_size": H,
        "moe_intermediate_size": I,
        "experts_implementation": implementation,
    }
    config = Qwen3MoeConfig(**options)
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    # Plain attributes, not parameters: those would be cut off from the problem's tensors.
    for name, weight in (("gate_up_proj", problem.gate_up_E2IH), ("down_proj", problem.down_EHI)):
        delattr(experts, name)
        setattr(experts, name, weight)

    def call() -> Tensor:
        expert_of_TK, gate_TK = torch_router(problem)
        return experts(problem.x_TH, expert_of_TK, gate_TK.to(problem.x_TH.dtype))

    return call


def liger(problem: Problem) -> Call:
    """Liger-Kernel's fused MoE in Triton; it reads a size back from the GPU.

    It has no inference mode: each call also writes what its backward would read.
    """
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def call() -> Tensor:
        expert_of_TK, gate_TK = torch_router(problem)
        return LigerFusedMoEFunction.apply(
            problem.x_TH, problem.gate_up_E2IH, problem.down_EHI, expert_of_TK.int(), gate_TK
        )

    return call


def liger_cute(problem: Problem) -> Call:
    """Liger-Kernel's persistent CUTLASS kernel on a group of one rank."""
    configure_liger_cute()
    from liger_kernel.ops.cute.ops.moe import moe_fused

    E, _, I = problem.down_EHI.shape
    # Views: it takes a stride between experts as long as no gradient is wanted.
    gate_EIH, up_EIH = problem.gate_up_E2IH[:, :I], problem.gate_up_E2IH[:, I:]

    def call() -> Tensor:
        expert_of_TK, gate_TK = torch_router(problem)
        return moe_fused(
            problem.x_TH, expert_of_TK.int(), gate_TK.to(problem.x_TH.dtype),
            gate_EIH, up_EIH, problem.down_EHI, E, problem.top_k,
        )  # fmt: skip

    return call


@cache
def configure_liger_cute() -> None:
    """Start the process group and the memory that LigerCute wants, once."""
    from liger_cute_kernels import MoEConfig, configure

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    configure(
        moe=MoEConfig(
            max_tokens=CUTE_MAX_TOKENS,
            hidden_size=CUTE_MAX_HIDDEN,
            num_experts=CUTE_MAX_EXPERTS,
            top_k=CUTE_MAX_TOP_K,
            num_hosts=1,
            gpus_per_host=1,
        )
    )


def sonic(problem: Problem) -> Call:
    """SonicMoE with its own router kernel, in inference mode unless gradients are wanted."""
    from sonicmoe import moe_TC_softmax_topk_layer

    trains = problem.x_TH.requires_grad
    return lambda: moe_TC_softmax_topk_layer(
        problem.x_TH,
        problem.router_EH,
        problem.gate_up_E2IH.permute(1, 2, 0),
        None,
        problem.down_EHI.permute(1, 2, 0),
        None,
        problem.top_k,
        torch.cuda.current_stream().cuda_stream,
        "swiglu",
        is_inference_mode_enabled=not trains,
        is_softmax_over_topk=True,
        concat_layout=True,
    )[0]


def sglang(problem: Problem) -> Call:
    """SGLang's Triton fused_moe with the table it ships for this GPU."""
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_moe
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))
    E = len(problem.down_EHI)
    config = MoeRunnerConfig(
        num_experts=E, num_local_experts=E, top_k=problem.top_k, activation="silu", is_gated=True,
        inplace=False,
    )  # fmt: skip

    def call() -> Tensor:
        expert_of_TK, gate_TK = torch_router(problem)
        # The logits are not read once ids and weights are known.
        chosen = StandardTopKOutput(gate_TK, expert_of_TK.int(), gate_TK)
        return fused_moe(problem.x_TH, problem.gate_up_E2IH, problem.down_EHI, chosen, config)

    return call


def moe_ops(problem: Problem) -> Call:
    """The operators of moe-ops in a row: top-k softmax, permute, two GEMMs, unpermute."""
    import moe_ops as ops

    E, (T, K) = len(problem.down_EHI), problem.expert_of_TK.shape

    def call() -> Tensor:
        logits_TE = problem.x_TH @ problem.router_EH.T
        gate_TK, expert_of_TK = ops.fused_topk_softmax(logits_TE, K, fp32_routing=True)
        x_AH, row_of_A, start_Ep1 = ops.permute(problem.x_TH, expert_of_TK, 0, E)
        gate_up_A2I: Any = ops.grouped_gemm(x_AH, problem.gate_up_E2IH, start_Ep1)
        gate_AI, up_AI = gate_up_A2I.chunk(2, dim=1)
        y_AH = ops.grouped_gemm(silu(gate_AI) * up_AI, problem.down_EHI, start_Ep1)
        return ops.unpermute(y_AH, row_of_A, gate_TK, T, K)

    return call


PEERS = (
    Provider(
        "transformers eager", transformers_eager, "transformers", capturable=False, trains=True
    ),
    Provider("transformers batched_mm", transformers_batched_mm, "transformers", trains=True),
    Provider("transformers grouped_mm", transformers_grouped_mm, "transformers", trains=True),
    Provider("Liger Triton", liger, "liger_kernel", needs_gpu=True, capturable=False, trains=True),
    Provider("LigerCute", liger_cute, "liger_cute_kernels", needs_gpu=True),
    Provider("SonicMoE", sonic, "sonicmoe", needs_gpu=True, trains=True),
    Provider("SGLang fused_moe", sglang, "sglang", needs_gpu=True),
    Provider("moe-ops", moe_ops, "moe_ops", needs_gpu=True, trains=True),
)
ALL_PROVIDERS = (*OURS, *PLAIN, *PEERS)
