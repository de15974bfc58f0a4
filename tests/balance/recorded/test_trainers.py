"""Trainers: fillers are masked, micro-batches and ranks kept, dense layers left out."""

import numpy as np
import pytest
import torch

from balance.recorded.trainers import from_megatron, from_slime, from_verl
from tests.balance.recorded.recordings import draw_ids, megatron_records, with_dense_layer


@pytest.mark.parametrize("filler", [0, -1], ids=["zeros", "sentinel"])
def test_verl_padded_tensor(filler):
    ids_STLK = np.full((2, 6, 2, 2), filler, np.int16)
    mask_ST = np.zeros((2, 6), np.int64)
    first, second = draw_ids(3, 2, 2, 300), draw_ids(4, 2, 2, 300, seed=1)
    ids_STLK[0, 2:5], mask_ST[0, 2:6] = first, 1  # left-padded, one filler row at the end
    ids_STLK[1, :4], mask_ST[1, :4] = second, 1  # recorded in the trainer: no filler
    routes = from_verl(torch.from_numpy(ids_STLK), torch.from_numpy(mask_ST), 300)
    assert routes.sequence_start.tolist() == [0, 4, 8]
    assert routes.row_mask_T.tolist() == [True, True, True, False, True, True, True, True]
    np.testing.assert_array_equal(routes.ids_TLK[:3], first)
    np.testing.assert_array_equal(routes.ids_TLK[4:], second)


def test_verl_jagged_tensor_equals_padded():
    first, second = draw_ids(3, 2, 2, 9), draw_ids(5, 2, 2, 9, seed=1)
    pieces = [torch.from_numpy(ids.astype(np.int16)) for ids in (first, second)]
    nested = torch.nested.as_nested_tensor(pieces, layout=torch.jagged)
    routes = from_verl(nested, None, 9)
    np.testing.assert_array_equal(routes.ids_TLK, np.concatenate([first, second]))
    assert routes.row_mask_T is None


def test_verl_needs_a_mask_of_the_right_shape():
    ids_STLK = np.zeros((2, 3, 1, 1), np.int16)
    with pytest.raises(ValueError, match="with an attention_mask"):
        from_verl(ids_STLK, None, 4)
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 3\], got \[3, 2\]"):
        from_verl(ids_STLK, np.ones((3, 2)), 4)


def test_slime_lists_drop_dense_layers_and_mask_the_last_token():
    samples = [torch.from_numpy(with_dense_layer(draw_ids(n, 2, 2, 8))) for n in (3, 5)]
    routes = from_slime(samples, 8, total_lengths=[4, 6], moe_layers=[1, 2])
    assert routes.sequence_start.tolist() == [0, 4, 10]
    assert routes.pack(1).loads().sum() == (3 + 5) * 2 * 2


def test_megatron_records_keep_micro_batches_and_ranks():
    mtp = next(megatron_records()) | {"block": "mtp", "mtp_idx": 0}
    trace = from_megatron([mtp, *megatron_records()], 8)
    assert trace.num_micro_batches == 3 and trace.num_layers == 2
    assert trace.micro_batch_T.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert trace.source_rank_T.tolist() == [0, 0, 1, 1, 1] * 3
    np.testing.assert_array_equal(trace.ids_of(2)[2:], draw_ids(3, 2, 2, 8, seed=41))
    only_five = from_megatron(megatron_records(), 8, moe_layers=[5])
    np.testing.assert_array_equal(only_five.ids_TLK[:, 0], trace.ids_TLK[:, 1])


def test_megatron_layers_of_unequal_length_are_refused():
    records = list(megatron_records())[:-1]
    with pytest.raises(ValueError, match=r"equal tokens in every layer.*step 4, rank 1"):
        from_megatron(records, 8)
    with pytest.raises(ValueError, match="at least one decoder layer"):
        from_megatron([], 8)
