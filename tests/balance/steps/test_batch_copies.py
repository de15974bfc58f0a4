"""Batch-static copies told what they serve: every unit once, as their ranks wish."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from balance.steps.batch_copies import BatchCopies, choose_batch_copies
from balance.steps.present import Present
from balance.topology import Topology

PRESENT = Present.of(Topology(2, 2), 4)
RANK_LE = np.array([[0, 1, 2, 3]])


def one_copy(expert, rank, spare):
    """An entry on node 1, none on node 0."""
    return BatchCopies(*(np.array([[-1, value]]) for value in (expert, rank, spare)), np.arange(2))


def test_an_entry_takes_what_levels_the_nodes():
    # 60 on node 0 and 20 on node 1: 20 of expert 0 move.
    serving = one_copy(0, 2, 2).serve(np.array([[[50, 10, 10, 10]]]), RANK_LE, PRESENT)
    assert serving.share_BLJ.tolist() == [[[0, 20]]]
    assert serving.rest_BLE.tolist() == [[[30, 10, 10, 10]]]
    assert serving.bound_BL.tolist() == [[20.0]]


def test_where_nodes_are_level_the_rank_that_lacks_decides():
    # The nodes can be level with 0 to 4 units moved; rank 2 has 4 to do and its part is 4.
    unit_BLE = np.array([[[4, 4, 4, 4]]])
    assert one_copy(0, 2, 2).serve(unit_BLE, RANK_LE, PRESENT).share_BLJ.tolist() == [[[0, 0]]]


def test_copies_of_the_batch_stand_in_their_spare_slots():
    copies = one_copy(0, 3, 3)
    assert copies.in_spare_slots(PRESENT, 1).tolist() == [[-1, -1, -1, 0]]
    moved = copies.relabelled(np.array([[2, 3, 0, 1]]), PRESENT, 1)
    assert moved.in_spare_slots(PRESENT, 1).tolist() == [[-1, 0, -1, -1]]


def test_no_entries_serve_nothing():
    unit_BLE = np.array([[[5, 1, 1, 1]]])
    copies, rank_LE = choose_batch_copies(unit_BLE, RANK_LE, PRESENT, 1, 0, True)
    serving = copies.serve(unit_BLE, rank_LE, PRESENT)
    assert copies.num_entries == 0 and serving.bound_BL is None
    assert (serving.rest_BLE == unit_BLE).all()


@given(seed=st.integers(0, 2**32 - 1), spares=st.integers(1, 2))
@settings(max_examples=30, deadline=None)
def test_every_unit_is_served_once_and_seats_are_kept(seed, spares):
    rng = np.random.default_rng(seed)
    unit_BLE = rng.poisson(rng.lognormal(3, 1.5, (3, 2, 8)))
    present = Present.of(Topology(2, 2), 8)
    rank_LE = np.tile(np.repeat(np.arange(4), 2), (2, 1))
    copies, rank_LE = choose_batch_copies(unit_BLE, rank_LE, present, spares, 1, True)
    serving = copies.serve(unit_BLE, rank_LE, present)
    assert (np.sort(rank_LE) == np.repeat(np.arange(4), 2)).all()
    assert (serving.rest_BLE >= 0).all() and (serving.share_BLJ >= 0).all()
    assert (serving.rest_BLE.sum(2) + serving.share_BLJ.sum(2) == unit_BLE.sum(2)).all()
    taken = copies.spare_LJ[copies.spare_LJ >= 0]
    assert (taken // spares == copies.rank_LJ[copies.rank_LJ >= 0]).all()
