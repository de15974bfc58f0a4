import pytest
import torch

from perf.demo.text import HELD_OUT_EVERY, SHARE_OF_KIND, Windows, read_texts


def texts_of_one_byte_documents(length=50):
    """Document i of every kind is byte i, repeated."""
    documents = [bytes([number]) * length for number in range(2 * HELD_OUT_EVERY)]
    return dict.fromkeys(SHARE_OF_KIND, documents)


@pytest.mark.parametrize("held_out", [True, False])
def test_held_out_documents_are_never_trained_on(held_out):
    windows = Windows(texts_of_one_byte_documents(), held_out, seed=0)
    drawn = windows.draw_mixed(200, 20)
    numbers = set(drawn.unique().tolist()) - {ord("\n")}
    assert all((number % HELD_OUT_EVERY == 0) == held_out for number in numbers)
    assert drawn.shape == (200, 20)


def test_same_seed_same_windows():
    one, other = (
        Windows(texts_of_one_byte_documents(), held_out=False, seed=7).draw_mixed(8, 30)
        for _ in range(2)
    )
    assert torch.equal(one, other)


def test_a_missing_kind_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="lacks the modules"):
        read_texts()
