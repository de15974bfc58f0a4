import json

import pytest
import torch

from perf.demo.files import CARD, DATA, WEIGHTS
from perf.demo.layers import ReferenceLayer
from perf.demo.model import DemoModel, ModelConfig, load_model, rotate, save_model

SMALL = ModelConfig(num_layers=2, hidden=16, num_heads=2, num_experts=5, top_k=2, intermediate=8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DemoModel(SMALL).double().requires_grad_(False)


def layers_of(model):
    return [ReferenceLayer(model.config.top_k) for _ in model.blocks]


def random_bytes(num_sequences, length):
    return torch.randint(256, (num_sequences, length))


@pytest.mark.parametrize("first", [1, 4, 6], ids=["one-byte-prompt", "middle", "one-byte-step"])
def test_remembering_equals_reading_again(model, first):
    byte_GS = random_bytes(3, 7)
    whole = model(byte_GS, layers_of(model))
    start = model(byte_GS[:, :first], layers_of(model))
    rest = model(byte_GS[:, first:], layers_of(model), start.memory_L)
    logits_GSU = torch.cat((start.logits_GSU, rest.logits_GSU), dim=1)
    torch.testing.assert_close(logits_GSU, whole.logits_GSU, rtol=0, atol=1e-12)


def test_a_later_byte_changes_no_earlier_logit(model):
    byte_GS = random_bytes(1, 6)
    other_GS = byte_GS.clone()
    other_GS[0, 4] = (byte_GS[0, 4] + 1) % 256
    one, other = (model(bytes_GS, layers_of(model)).logits_GSU for bytes_GS in (byte_GS, other_GS))
    torch.testing.assert_close(one[:, :4], other[:, :4], rtol=0, atol=1e-12)
    assert (one[:, 4:] - other[:, 4:]).abs().amin(dim=(0, 2)).ne(0).any()


def test_ids_are_token_major(model):
    byte_GS = random_bytes(2, 3)
    ids_TLK = model(byte_GS, layers_of(model)).expert_of_TLK
    alone_TLK = model(byte_GS[1:], layers_of(model)).expert_of_TLK
    assert ids_TLK.shape == (6, SMALL.num_layers, SMALL.top_k)
    assert torch.equal(ids_TLK[3:], alone_TLK)


def test_rotation_knows_only_distance():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = [(rotate(query, at) * rotate(key, at + 3)).sum().item() for at in (0, 1, 50)]
    assert products == pytest.approx([products[0]] * 3, abs=1e-12)


def test_saved_weights_come_back(model, tmp_path):
    save_model(model, tmp_path / "weights.safetensors")
    loaded = load_model(tmp_path / "weights.safetensors", "cpu", torch.float32)
    assert loaded.config == SMALL
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name


def test_the_committed_weights_are_small_and_know_python():
    assert (DATA / WEIGHTS).stat().st_size < 2_000_000
    trained = load_model(DATA / WEIGHTS, "cpu", torch.float32)
    text = b"    def __init__(self, name):\n        self.name = name\n\n    def __repr__(self):\n"
    byte_GS = torch.tensor([list(text)])
    logits_GSU = trained(byte_GS[:, :-1], layers_of(trained)).logits_GSU
    loss = torch.nn.functional.cross_entropy(logits_GSU[0], byte_GS[0, 1:]).item()
    assert loss < max(
        json.loads((DATA / CARD).read_text())["held_out_loss_nats_per_byte"].values()
    )
