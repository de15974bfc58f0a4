import numpy as np
import pytest
import torch

from perf.demo.layers import ReferenceLayer
from perf.demo.model import DemoModel, ModelConfig
from perf.demo.rollout import PROMPT_OF_KIND, RolloutConfig, encode_prompts, roll_out, sample

CONFIG = RolloutConfig(samples_per_prompt=2, prompt_bytes=5, new_bytes=4)
SMALL = ModelConfig(num_layers=2, hidden=16, num_heads=2, num_experts=5, top_k=2, intermediate=8)
NUM_SEQUENCES = len(PROMPT_OF_KIND) * CONFIG.samples_per_prompt


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DemoModel(SMALL).double().requires_grad_(False)


@pytest.fixture(scope="module")
def rollouts(model):
    return roll_out(model, CONFIG)


def test_every_prompt_fills_its_bytes():
    byte_GS = encode_prompts(RolloutConfig())
    assert byte_GS.shape == (8 * len(PROMPT_OF_KIND), RolloutConfig.prompt_bytes)
    assert bytes(byte_GS[8].tolist()) == b"es of all files and directories "


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        pytest.param({"samples_per_prompt": 0}, "samples_per_prompt must be positive, got 0"),
        pytest.param({"new_bytes": -1}, "new_bytes must be positive, got -1"),
        pytest.param({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        pytest.param({"prompt_bytes": 400}, r"prompt_bytes must be at most \d+, got 400"),
    ],
)
def test_sizes_that_leave_nothing_are_refused(size, rule):
    with pytest.raises(ValueError, match=rule):
        RolloutConfig(**size)


def test_the_record_is_what_reading_the_rollouts_again_routes(model, rollouts):
    layers = [ReferenceLayer(SMALL.top_k) for _ in model.blocks]
    step = model(rollouts.byte_GS[:, :-1], layers)
    assert torch.equal(step.expert_of_TLK, rollouts.expert_of_TLK)
    logprob_GSU = step.logits_GSU[:, CONFIG.prompt_bytes - 1 :].float().log_softmax(-1)
    new_GS1 = rollouts.byte_GS[:, CONFIG.prompt_bytes :, None]
    logprob_GS = logprob_GSU.gather(-1, new_GS1)[..., 0]
    torch.testing.assert_close(logprob_GS, rollouts.sampled_logprob_GS, rtol=0, atol=1e-5)


def test_rollouts_start_with_their_prompt_and_repeat_with_the_seed(model, rollouts):
    assert torch.equal(rollouts.byte_GS[:, : CONFIG.prompt_bytes], encode_prompts(CONFIG))
    assert torch.equal(roll_out(model, CONFIG).byte_GS, rollouts.byte_GS)


def test_trace_deals_sequences_to_ranks_and_prompts_to_micro_batches(rollouts):
    trace = rollouts.trace(SMALL.num_experts, num_ranks=2)
    assert trace.num_tokens == NUM_SEQUENCES * CONFIG.recorded_bytes
    assert trace.num_micro_batches == len(PROMPT_OF_KIND)
    assert trace.source_ranks_of(0).tolist() == [0] * 8 + [1] * 8
    for prompt in range(len(PROMPT_OF_KIND)):
        assert np.array_equal(trace.ids_of(prompt), rollouts.ids_of(prompt).numpy())


def test_micro_batch_holds_the_samples_of_one_prompt(rollouts):
    byte_GS = rollouts.byte_GS[rollouts.micro_batch(3), : CONFIG.prompt_bytes]
    assert [bytes(row) for row in byte_GS.tolist()] == [b"qual("] * CONFIG.samples_per_prompt


def test_sample_reports_the_log_probability_at_temperature_one():
    logits_GU = torch.tensor([[0.0, 3.0]]).expand(200, 2)
    byte_G, logprob_G = sample(logits_GU, 0.5, torch.Generator().manual_seed(0))
    assert set(byte_G.tolist()) == {0, 1} or byte_G.float().mean() > 0.95
    torch.testing.assert_close(logprob_G, logits_GU[0].log_softmax(-1)[byte_G])
