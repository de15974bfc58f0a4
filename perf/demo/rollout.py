"""Rollouts of the demo model, with the routing of every byte recorded as they are generated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from balance import Trace
from perf.demo.layers import ReferenceLayer
from perf.demo.model import DemoModel
from perf.extras import progress_bar

PROMPT_OF_KIND = {
    "class": "class OptionParser:\n    def add_argument(self, name, default=None):\n        ",
    "docstring": 'def walk(top):\n    """Yield the names of all files and directories ',
    "comment": "    # The lock must be held while the queue is empty, because ",
    "test": "    def test_empty_list(self):\n        self.assertEqual(",
    "manual": 'The "try" statement specifies exception handlers for a group ',
    "table": "    0x0041: 0x0041,     #  LATIN CAPITAL LETTER A\n    0x0042: ",
}


@dataclass(frozen=True)
class RolloutConfig:
    """How much is generated.

    Attributes:
        samples_per_prompt: sequences that continue the same prompt.
        prompt_bytes: every prompt is cut to its last ones.
        new_bytes: sampled for each sequence.
        temperature: of the sampling.
        seed: of the sampling.
    """

    samples_per_prompt: int = 8
    prompt_bytes: int = 32
    new_bytes: int = 33
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError on a size that leaves nothing to roll out."""
        for name in ("samples_per_prompt", "prompt_bytes", "new_bytes", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        longest = min(len(prompt.encode()) for prompt in PROMPT_OF_KIND.values())
        if self.prompt_bytes > longest:
            raise ValueError(f"prompt_bytes must be at most {longest}, got {self.prompt_bytes}")

    @property
    def recorded_bytes(self) -> int:
        """Positions of a sequence that went through the model: the last sample never did."""
        return self.prompt_bytes + self.new_bytes - 1


@dataclass(frozen=True)
class Rollouts:
    """What a rollout engine hands to the trainer.

    Sequence g = prompt · samples_per_prompt + sample; token t = g · S + s over the S recorded
    positions.

    Attributes:
        config: how much was generated.
        byte_GS: int64; one position more than was recorded: the last sample.
        sampled_logprob_GS: fp32, of the new bytes only, under the rollout's own numbers.
        expert_of_TLK: int64, as the rollout routed.
    """

    config: RolloutConfig
    byte_GS: Tensor
    sampled_logprob_GS: Tensor
    expert_of_TLK: Tensor

    def micro_batch(self, prompt: int) -> slice:
        """The sequences of one prompt, which train together."""
        size = self.config.samples_per_prompt
        return slice(prompt * size, (prompt + 1) * size)

    def ids_of(self, prompt: int) -> Tensor:
        """expert_of_TLK of one micro-batch."""
        tokens = self.config.samples_per_prompt * self.config.recorded_bytes
        return self.expert_of_TLK[prompt * tokens : (prompt + 1) * tokens]

    def trace(self, num_experts: int, num_ranks: int) -> Trace:
        """The recorded routing as the planner reads it, sequences dealt to the ranks in turn."""
        num_sequences = len(self.byte_GS)
        sequence_T = torch.arange(num_sequences).repeat_interleave(self.config.recorded_bytes)
        return Trace(
            ids_TLK=self.expert_of_TLK.cpu().numpy(),
            micro_batch_T=(sequence_T // self.config.samples_per_prompt).numpy(),
            source_rank_T=(sequence_T % num_ranks).numpy(),
            num_experts=num_experts,
            label="demo model",
        )


def roll_out(model: DemoModel, config: RolloutConfig) -> Rollouts:
    """Sample continuations of every prompt, byte by byte, all sequences at once.

    The model runs in its own dtype, with the router choosing freely; what it chose is recorded.
    """
    device = model.embedding_UH.device
    layer_L = [ReferenceLayer(model.config.top_k)] * model.config.num_layers
    random = torch.Generator().manual_seed(config.seed)
    byte_GS = encode_prompts(config).to(device)
    step = model(byte_GS, layer_L)
    ids_of_step = [split_sequences(step.expert_of_TLK, len(byte_GS))]
    logprobs = []
    progress = progress_bar(range(config.new_bytes), desc="rollouts", unit="byte")
    for new in progress:
        byte_G, logprob_G = sample(step.logits_GSU[:, -1], config.temperature, random)
        byte_GS = torch.cat((byte_GS, byte_G[:, None]), dim=1)
        logprobs.append(logprob_G)
        if new + 1 < config.new_bytes:
            step = model(byte_G[:, None], layer_L, step.memory_L)
            ids_of_step.append(split_sequences(step.expert_of_TLK, len(byte_GS)))
    expert_of_TLK = torch.cat(ids_of_step, dim=1).flatten(0, 1)
    return Rollouts(config, byte_GS, torch.stack(logprobs, dim=1), expert_of_TLK)


def encode_prompts(config: RolloutConfig) -> Tensor:
    """Return the prompts as byte_GS, each repeated ``samples_per_prompt`` times."""
    prompts = [text.encode()[-config.prompt_bytes :] for text in PROMPT_OF_KIND.values()]
    byte_rows = torch.tensor([list(prompt) for prompt in prompts])
    return byte_rows.repeat_interleave(config.samples_per_prompt, dim=0)


def sample(
    logits_GU: Tensor, temperature: float, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one byte for each sequence; return it and its log probability at temperature 1."""
    logits_GU = logits_GU.float()
    share_GU = (logits_GU / temperature).softmax(-1).cpu()
    byte_G = torch.multinomial(share_GU, 1, generator=random)[:, 0].to(logits_GU.device)
    logprob_GU = logits_GU.log_softmax(-1)
    return byte_G, logprob_GU.gather(1, byte_G[:, None])[:, 0]


def split_sequences(expert_of_TLK: Tensor, num_sequences: int) -> Tensor:
    """View ids of T = G·S tokens as [G, S, L, K]."""
    return expert_of_TLK.unflatten(0, (num_sequences, -1))
