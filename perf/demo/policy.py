"""What the demo's training step is after: rollouts with a higher reward than others of a prompt.

Letters as in model.py; S of sampled bytes only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from perf.demo.rollout import Rollouts

LEAST_SPREAD = 1e-6  # of rewards; where they are equal there is nothing to learn


@dataclass(frozen=True)
class MicroBatch:
    """The rollouts of one prompt, as a trainer has them.

    Attributes:
        byte_GS: int64, prompts and all that was sampled.
        expert_of_TLK: int64, recorded; the last byte never went through the model.
        rollout_logprob_GS: fp32, of the sampled bytes, under the rollout's own numbers.
        advantage_G: fp32.
    """

    byte_GS: Tensor
    expert_of_TLK: Tensor
    rollout_logprob_GS: Tensor
    advantage_G: Tensor


def micro_batch_of(rollouts: Rollouts, prompt: int) -> MicroBatch:
    """Return what the rollouts of one prompt teach."""
    rows = rollouts.micro_batch(prompt)
    byte_GS = rollouts.byte_GS[rows]
    reward_G = rewards(byte_GS[:, rollouts.config.prompt_bytes :])
    return MicroBatch(
        byte_GS,
        rollouts.ids_of(prompt),
        rollouts.sampled_logprob_GS[rows],
        advantages(reward_G),
    )


def rewards(sampled_GS: Tensor) -> Tensor:
    """Return the share of different bytes among those sampled: repeating oneself is not rewarded.

    Example: "abab" has two of four, so 0.5.
    """
    shares = [len(set(row)) / len(row) for row in sampled_GS.tolist()]
    return torch.tensor(shares, device=sampled_GS.device)


def advantages(reward_G: Tensor) -> Tensor:
    """Return (reward - mean) / deviation over the samples of a prompt, as GRPO has it.

    arXiv 2402.03300.
    """
    centred_G = reward_G - reward_G.mean()
    return centred_G / (centred_G.square().mean().sqrt() + LEAST_SPREAD)


def policy_loss(logits_GSU: Tensor, batch: MicroBatch) -> Tensor:
    """Return -mean over sampled bytes of (probability / the rollout's) · advantage.

    Its gradient is the policy gradient, corrected for what training computes otherwise than the
    rollout did.

    Args:
        logits_GSU: of all bytes but the last, any float.
        batch: what was sampled.
    """
    num_sampled = batch.rollout_logprob_GS.shape[1]
    logprob_GSU = logits_GSU[:, -num_sampled:].log_softmax(-1)
    logprob_GS = logprob_GSU.gather(-1, batch.byte_GS[:, -num_sampled:, None])[..., 0]
    ratio_GS = (logprob_GS - batch.rollout_logprob_GS).exp()
    return -(ratio_GS * batch.advantage_G[:, None]).mean()
