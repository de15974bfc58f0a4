"""Traffic counted against a loop over tokens, and the rule for moving experts by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.measures.traffic import (
    Traffic,
    chosen_together,
    count_traffic,
    moving_the_expert_pays,
)
from balance.topology import Topology
from balance.trace import Trace


@given(seed=st.integers(0, 2**32 - 1), num_tokens=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_against_a_loop(seed, num_tokens):
    rng = np.random.default_rng(seed)
    topology, slots_per_rank = Topology(2, (1, 2)), 2
    slot_of_TK = rng.integers(-1, 6, (num_tokens, 3))
    source_T = rng.integers(0, 3, num_tokens)
    expected = dict.fromkeys(Traffic.__dataclass_fields__, 0)
    for slots, source in zip(slot_of_TK, source_T, strict=True):
        ranks = [int(slot) // slots_per_rank for slot in slots if slot >= 0]
        nodes = [topology.node_of_R[rank] for rank in ranks]
        here = topology.node_of_R[source]
        away = {rank for rank in ranks if topology.node_of_R[rank] != here}
        expected["num_assignments"] += len(ranks)
        expected["cross_rank"] += sum(rank != source for rank in ranks)
        expected["cross_rank_once"] += len(set(ranks) - {source})
        expected["cross_node"] += sum(node != here for node in nodes)
        expected["cross_node_once_per_rank"] += len(away)
        expected["cross_node_once_per_node"] += len(set(nodes) - {here})
    assert count_traffic(slot_of_TK, source_T, slots_per_rank, topology) == Traffic(**expected)


def test_traffic_adds_up():
    assert Traffic(1, 2, 3, 4, 5, 6) + Traffic(1, 1, 1, 1, 1, 1) == Traffic(2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("tokens", "arguments", "pays"),
    [
        pytest.param(74, {}, False, id="74 tokens x 4 x 10 B against 3 x 1000 B"),
        pytest.param(76, {}, True, id="76 tokens are more"),
        pytest.param(75, {}, False, id="a tie stays"),
        pytest.param(51, {"backward": False}, True, id="inference: 2 x 10 B against 1000 B"),
        pytest.param(51, {"copy_is_kept": True}, True, id="no second copy for the backward pass"),
        pytest.param(51, {"gradient_bytes": 0}, True, id="frozen weights send no gradient"),
        pytest.param(0, {"gradient_bytes": 0}, False, id="no tokens"),
    ],
)
def test_when_moving_the_expert_pays(tokens, arguments, pays):
    assert moving_the_expert_pays(tokens, 10, 1000, **arguments) is pays


@pytest.mark.parametrize("name", ["num_tokens", "token_bytes", "weight_bytes", "gradient_bytes"])
def test_negative_counts_are_named(name):
    arguments = {"num_tokens": 1, "token_bytes": 1, "weight_bytes": 1} | {name: -1}
    with pytest.raises(ValueError, match=name):
        moving_the_expert_pays(**arguments)


def test_chosen_together():
    ids_TLK = np.array([[[0, 1]], [[1, 2]], [[0, 1]], [[-1, 2]], [[0, 2]]])
    mask_T = np.array([True, True, True, True, False])
    trace = Trace(ids_TLK, np.zeros(5, int), np.zeros(5, int), 3, row_mask_T=mask_T)
    expected = [[[0, 2, 0], [2, 0, 1], [0, 1, 0]]]
    assert chosen_together(trace, tokens_per_chunk=2).tolist() == expected
