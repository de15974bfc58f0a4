import pytest
import torch

from perf.demo.policy import MicroBatch, advantages, micro_batch_of, policy_loss, rewards
from perf.demo.rollout import RolloutConfig, Rollouts

CONFIG = RolloutConfig(samples_per_prompt=2, prompt_bytes=3, new_bytes=2)


def batch_of(advantage_G, logprob_GS, byte_GS):
    ids_TLK = torch.zeros(0, 1, 1, dtype=torch.int64)
    return MicroBatch(byte_GS, ids_TLK, logprob_GS, torch.tensor(advantage_G))


@pytest.mark.parametrize(
    ("text", "share"), [(b"abab", 0.5), (b"aaaa", 0.25), (b"abcd", 1.0)], ids=str
)
def test_the_reward_is_the_share_of_different_bytes(text, share):
    assert rewards(torch.tensor([list(text)])).tolist() == [share]


def test_advantages_are_centred_and_of_unit_size():
    advantage_G = advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert advantage_G.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantage_G.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert advantage_G.argmax() == 3


def test_equal_rewards_teach_nothing():
    assert advantages(torch.tensor([0.5, 0.5])).tolist() == [0, 0]


def test_a_micro_batch_is_of_one_prompt_and_its_reward_of_what_was_sampled():
    byte_GS = torch.arange(60).view(12, 5)
    byte_GS[2, 3:] = 7
    ids_TLK, logprob_GS = torch.arange(48).view(48, 1, 1), torch.arange(24.0).view(12, 2)
    batch = micro_batch_of(Rollouts(CONFIG, byte_GS, logprob_GS, ids_TLK), prompt=1)
    assert torch.equal(batch.byte_GS, byte_GS[2:4])
    assert batch.expert_of_TLK.flatten().tolist() == list(range(8, 16))
    assert batch.rollout_logprob_GS.tolist() == [[4, 5], [6, 7]]
    assert batch.advantage_G.tolist() == pytest.approx([-1, 1], abs=1e-4)


def test_the_gradient_is_the_policy_gradient_where_both_sides_agree():
    """At ratio 1 it is -mean of advantage · d log p."""
    logits_GSU = torch.randn(2, 4, 256, dtype=torch.float64, requires_grad=True)
    byte_GS = torch.randint(256, (2, 5))
    logprob_GS = logits_GSU[:, -2:].log_softmax(-1).gather(-1, byte_GS[:, -2:, None])[..., 0]
    batch = batch_of([-1.0, 2.0], logprob_GS.detach(), byte_GS)
    loss = policy_loss(logits_GSU, batch)
    assert loss.item() == pytest.approx(-0.5)
    (found,) = torch.autograd.grad(loss, logits_GSU, retain_graph=True)
    wanted_loss = -(logprob_GS * batch.advantage_G[:, None]).mean()
    (wanted,) = torch.autograd.grad(wanted_loss, logits_GSU)
    torch.testing.assert_close(found, wanted)
    assert found[:, :2].abs().max() == 0, "bytes of the prompt teach nothing"


def test_a_byte_that_training_finds_likelier_weighs_more():
    logits_GSU = torch.zeros(1, 2, 256)
    logits_GSU[0, 0, 9] = 3.0
    byte_GS = torch.tensor([[0, 9, 8]])
    rollout_GS = torch.zeros(1, 2).log_softmax(-1)  # both had 1 / 2
    loss = policy_loss(logits_GSU, batch_of([1.0], rollout_GS, byte_GS))
    probability_S = logits_GSU.softmax(-1)[0, [0, 1], [9, 8]]
    assert loss.item() == pytest.approx(-(probability_S / 0.5).mean().item())
