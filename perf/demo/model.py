"""A small Mixture-of-Experts language model over bytes, whose MoE layer is passed in.

Letters of this file besides the project's: G sequences, S positions (T = G·S tokens), D width of
an attention head, U vocabulary (the 256 bytes). Token t = g·S + s.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention

from perf.extras import optional

NUM_BYTES = 256
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; every layer has the same.

    Attributes:
        num_layers, hidden, num_experts, top_k, intermediate: L, H, E, K and I.
        num_heads: of the attention.
    """

    num_layers: int = 3
    hidden: int = 80
    num_heads: int = 5
    num_experts: int = 32
    top_k: int = 4
    intermediate: int = 32

    @property
    def head_width(self) -> int:
        """D."""
        return self.hidden // self.num_heads


class MoEWeights(NamedTuple):
    """One layer's router and experts, in the layout of Hugging Face transformers.

    Attributes:
        router_weight_EH, down_EHI: of the router, and out of the experts.
        gate_up_E2IH: into the experts, gate rows first, then up rows.
    """

    router_weight_EH: Tensor
    gate_up_E2IH: Tensor
    down_EHI: Tensor


class MoELayer(Protocol):
    """What may stand in for a layer's feed-forward: tokens in, outputs and chosen ids out."""

    def __call__(self, x_TH: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]: ...


class KeysAndValues(NamedTuple):
    """What one layer remembers of the positions already read.

    Attributes:
        keys, values: [G, heads, S, D].
    """

    keys: Tensor
    values: Tensor


class Step(NamedTuple):
    """What one pass over some positions returns.

    Attributes:
        logits_GSU: of the byte after each position.
        expert_of_TLK: int64, whom each layer chose.
        memory_L: what later positions need of these and the earlier ones.
    """

    logits_GSU: Tensor
    expert_of_TLK: Tensor
    memory_L: list[KeysAndValues]


class Block(nn.Module):
    """x + attention(norm x), then x + moe(norm x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, I, E = config.hidden, config.intermediate, config.num_experts
        self.config = config
        self.attention_norm_H = nn.Parameter(torch.ones(H))
        self.qkv_3HH = _matrix(3 * H, H)
        self.out_HH = _matrix(H, H)
        self.moe_norm_H = nn.Parameter(torch.ones(H))
        self.router_weight_EH = _matrix(E, H)
        self.gate_up_E2IH = _matrix(E, 2 * I, H)
        self.down_EHI = _matrix(E, H, I)

    def forward(
        self, x_GSH: Tensor, moe: MoELayer, past: KeysAndValues | None
    ) -> tuple[Tensor, Tensor, KeysAndValues]:
        """Return the positions' new states, the experts that they chose, and the memory."""
        attended_GSH, memory = self.attend(normalize(x_GSH, self.attention_norm_H), past)
        x_GSH = x_GSH + attended_GSH
        x_TH = normalize(x_GSH, self.moe_norm_H).flatten(0, 1)
        y_TH, expert_of_TK = moe(x_TH, self.moe_weights())
        return x_GSH + y_TH.view_as(x_GSH), expert_of_TK, memory

    def attend(self, x_GSH: Tensor, past: KeysAndValues | None) -> tuple[Tensor, KeysAndValues]:
        """Causal attention over the remembered positions and these, with rotary positions."""
        start = past.keys.shape[2] if past else 0
        heads = (self.config.num_heads, self.config.head_width)
        qkv = linear(x_GSH, self.qkv_3HH).unflatten(-1, (3, *heads))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        query, key = rotate(query, start), rotate(key, start)
        if past:
            key, value = torch.cat((past.keys, key), 2), torch.cat((past.values, value), 2)
        position = torch.arange(key.shape[2], device=x_GSH.device)
        visible = position <= position[start:, None]
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return linear(mixed.transpose(1, 2).flatten(2), self.out_HH), KeysAndValues(key, value)

    def moe_weights(self) -> MoEWeights:
        """Return what this layer's MoE function is given."""
        return MoEWeights(self.router_weight_EH, self.gate_up_E2IH, self.down_EHI)


class DemoModel(nn.Module):
    """Bytes in, a distribution over the next byte out; the embedding is also the output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_UH = _matrix(NUM_BYTES, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_H = nn.Parameter(torch.ones(config.hidden))

    def forward(
        self,
        byte_GS: Tensor,
        moe_of_L: Sequence[MoELayer],
        memory_L: Sequence[KeysAndValues] | None = None,
    ) -> Step:
        """Read ``byte_GS`` after what ``memory_L`` holds, with one MoE function per layer.

        Args:
            byte_GS: int64 in [0, 256).
            moe_of_L: who computes each layer's feed-forward.
            memory_L: the ``memory_L`` of an earlier step over the same sequences, or None.
        """
        past_L: Sequence[KeysAndValues | None] = memory_L or [None] * len(self.blocks)
        x_GSH = embedding(byte_GS, self.embedding_UH)
        ids_L, new_memory_L = [], []
        for block, moe, past in zip(self.blocks, moe_of_L, past_L, strict=True):
            x_GSH, expert_of_TK, memory = block(x_GSH, moe, past)
            ids_L.append(expert_of_TK)
            new_memory_L.append(memory)
        logits_GSU = linear(normalize(x_GSH, self.norm_H), self.embedding_UH)
        return Step(logits_GSU, torch.stack(ids_L, dim=1), new_memory_L)


def normalize(x_GSH: Tensor, scale_H: Tensor) -> Tensor:
    """RMSNorm: x / sqrt(mean x² + 1e-6) · scale."""
    return rms_norm(x_GSH, scale_H.shape, scale_H, eps=1e-6)


def rotate(heads_GNSD: Tensor, start: int) -> Tensor:
    """Turn each pair (d, d + D/2) by an angle that grows with the position (RoFormer)."""
    *_, S, D = heads_GNSD.shape
    position_S = torch.arange(start, start + S, device=heads_GNSD.device, dtype=torch.float64)
    speed = ROPE_BASE ** -(torch.arange(0, D, 2, device=heads_GNSD.device) / D)
    angle = position_S[:, None] * speed
    cos, sin = (part.to(heads_GNSD.dtype) for part in (angle.cos(), angle.sin()))
    first, second = heads_GNSD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def save_model(model: DemoModel, path: Path) -> None:
    """Write weights as float16, with the sizes of the model in the file's own metadata."""
    weights = {name: value.detach().half() for name, value in model.state_dict().items()}
    sizes = {name: str(size) for name, size in asdict(model.config).items()}
    optional("safetensors.torch").save_file(weights, path, sizes)


def load_model(path: Path, device: str, dtype: torch.dtype) -> DemoModel:
    """Read what :func:`save_model` wrote; weights ask for no gradient until a caller wants one."""
    with optional("safetensors").safe_open(path, framework="pt", device=device) as file:
        sizes = {name: int(size) for name, size in file.metadata().items()}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.device(device):
        model = DemoModel(ModelConfig(**sizes))
    model.load_state_dict(weights)
    return model.to(dtype).requires_grad_(False)


def _matrix(*shape: int) -> nn.Parameter:
    """A weight whose outputs have the variance of its inputs."""
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))
