"""Train the demo's model on the Python standard library: ``python -m perf.demo.train``.

One run takes about five minutes on two cores and writes the weights and their description to
perf/demo/data/. The text comes with the interpreter, so another Python gives other weights.
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from perf.demo.files import CARD, DATA, WEIGHTS
from perf.demo.model import DemoModel, ModelConfig, MoELayer, MoEWeights, load_model, save_model
from perf.demo.text import SHARE_OF_KIND, Windows, read_texts
from perf.extras import progress_bar

HELD_OUT_WINDOWS = 64


@dataclass(frozen=True)
class TrainConfig:
    """How the committed weights were made.

    Attributes:
        steps: of the optimizer.
        sequences, length: of a batch; the length in bytes.
        learning_rate, warmup_steps: the highest, and the steps until it is reached.
        weight_decay: of matrices.
        balance_coefficient: of the load-balancing loss.
        seed: of weights and windows.
    """

    steps: int = 2400
    sequences: int = 16
    length: int = 128
    learning_rate: float = 8e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    balance_coefficient: float = 0.002
    seed: int = 0


class GroupedMoE:
    """The layer as training needs it: differentiable, rows grouped by expert, load watched.

    Attributes:
        balance_loss: E · sum over e of (share of assignments · mean router probability) of the
            latest call; 1 when balanced (Switch Transformer, arXiv 2101.03961).
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.balance_loss = torch.zeros(())

    def __call__(self, x_TH: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        logits_TE = x_TH @ weights.router_weight_EH.T
        logit_TK, expert_of_TK = logits_TE.topk(self.top_k)
        gate_TK = logit_TK.softmax(-1)
        load_E = expert_of_TK.flatten().bincount(minlength=logits_TE.shape[1])
        self.balance_loss = balance_loss(logits_TE, load_E)

        assignment_A = expert_of_TK.flatten().argsort(stable=True)
        token_A = assignment_A // self.top_k
        y_AH = run_experts(x_TH[token_A], load_E.tolist(), weights)
        weighted_AH = gate_TK.flatten()[assignment_A, None] * y_AH
        return torch.zeros_like(x_TH).index_add(0, token_A, weighted_AH), expert_of_TK


def run_experts(x_AH: Tensor, load_E: Sequence[int], weights: MoEWeights) -> Tensor:
    """Apply expert e to its ``load_E[e]`` consecutive rows of ``x_AH``."""

    def multiply(rows: Tensor, matrix_of_E: Tensor) -> Tensor:
        parts = zip(rows.split(load_E), matrix_of_E.unbind(), strict=True)
        return torch.cat([part @ matrix.T for part, matrix in parts])

    gate_AI, up_AI = multiply(x_AH, weights.gate_up_E2IH).chunk(2, dim=-1)
    return multiply(silu(gate_AI) * up_AI, weights.down_EHI)


def balance_loss(logits_TE: Tensor, load_E: Tensor) -> Tensor:
    """E · sum over e of (share of assignments · mean router probability); 1 when balanced."""
    share_E = load_E / load_E.sum()
    return len(load_E) * (share_E * logits_TE.softmax(-1).mean(0)).sum()


def train(config: TrainConfig, texts: dict[str, list[bytes]]) -> DemoModel:
    """Minimise next-byte cross-entropy plus the load-balancing loss, with AdamW."""
    torch.manual_seed(config.seed)
    model = DemoModel(ModelConfig())
    windows = Windows(texts, held_out=False, seed=config.seed)
    moe_of_L = [GroupedMoE(model.config.top_k) for _ in model.blocks]
    optimizer = make_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, config))
    progress = progress_bar(range(config.steps), desc="training", unit="step", mininterval=2)
    for _ in progress:
        byte_GS = windows.draw_mixed(config.sequences, config.length + 1)
        text_loss = next_byte_loss(model, byte_GS, moe_of_L)
        spread_loss = torch.stack([moe.balance_loss for moe in moe_of_L]).sum()
        (text_loss + config.balance_coefficient * spread_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{text_loss.item():.3f}", refresh=False)
    return model


def make_optimizer(model: DemoModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the scales of RMSNorm alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    scales = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def pace(step: int, config: TrainConfig) -> float:
    """Share of the learning rate at ``step``: linear up, then linear down to zero."""
    rise = (step + 1) / config.warmup_steps
    fall = (config.steps - step) / (config.steps - config.warmup_steps)
    return min(rise, fall)


def next_byte_loss(model: DemoModel, byte_GS: Tensor, moe_of_L: Sequence[MoELayer]) -> Tensor:
    """Mean cross-entropy in nats of every byte after the first."""
    logits_GSU = model(byte_GS[:, :-1], moe_of_L).logits_GSU
    return cross_entropy(logits_GSU.flatten(0, 1), byte_GS[:, 1:].flatten())


@torch.no_grad()
def examine(model: DemoModel, texts: dict[str, list[bytes]], length: int) -> dict[str, object]:
    """Return held-out loss by kind of text, and how evenly each layer used its experts."""
    windows = Windows(texts, held_out=True, seed=1)
    moe_of_L = [GroupedMoE(model.config.top_k) for _ in model.blocks]
    byte_of_kind = {k: windows.draw(k, HELD_OUT_WINDOWS, length + 1) for k in SHARE_OF_KIND}
    loss_of_kind = {
        kind: round(next_byte_loss(model, byte_GS, moe_of_L).item(), 3)
        for kind, byte_GS in byte_of_kind.items()
    }
    mixed_GS = windows.draw_mixed(HELD_OUT_WINDOWS, length)
    expert_of_TLK = model(mixed_GS, moe_of_L).expert_of_TLK
    num_experts = model.config.num_experts
    load_LE = torch.stack(
        [ids_TK.flatten().bincount(minlength=num_experts) for ids_TK in expert_of_TLK.unbind(1)]
    )
    return {
        "held_out_loss_nats_per_byte": loss_of_kind,
        "load_max_over_mean_L": [round((n.max() / n.float().mean()).item(), 2) for n in load_LE],
    }


def describe(
    config: TrainConfig, texts: dict[str, list[bytes]], seconds: float
) -> dict[str, object]:
    """Return where the weights came from."""
    return {
        "text": "the Python standard library's own sources and manual, of the interpreter named",
        "interpreter": f"CPython {platform.python_version()}",
        "licence": "text: PSF-2.0; weights: MIT, as this repository",
        "bytes_of_kind": {kind: sum(map(len, documents)) for kind, documents in texts.items()},
        "sha256_of_kind": {
            kind: hashlib.sha256(b"".join(documents)).hexdigest()
            for kind, documents in texts.items()
        },
        "share_of_kind": SHARE_OF_KIND,
        "training": asdict(config),
        "training_seconds": round(seconds),
        "torch": torch.__version__,
    }


def main() -> None:
    """Train, examine, and write weights and card."""
    parser = argparse.ArgumentParser(prog="python -m perf.demo.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the two files written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = TrainConfig(steps=arguments.steps)
    texts = read_texts()

    start = time.perf_counter()
    model = train(config, texts)
    card = describe(config, texts, time.perf_counter() - start)

    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = arguments.out / WEIGHTS
    save_model(model, weights)
    card |= examine(load_model(weights, "cpu", torch.float32), texts, config.length)
    (arguments.out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2), f"wrote {weights}, {weights.stat().st_size} bytes", sep="\n")


if __name__ == "__main__":
    main()
