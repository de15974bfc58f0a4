"""Greedy copies: by hand, where one copy or one spill is known to be best."""

import numpy as np

from balance.compare.baselines.greedy import spill, threshold
from balance.topology import Topology


def test_threshold_meets_its_optimum_where_one_copy_suffices():
    # Rank 0 has 12, rank 1 has 4: half of the surplus moves into the one spare slot.
    served = threshold(np.array([[12.0, 4.0]]), Topology(1, 2, 1))
    np.testing.assert_allclose(served.load_BER[0].sum(0), [8, 8], rtol=2e-3)
    assert served.copies_B.tolist() == [1]


def test_spill_keeps_home_what_fits():
    # Mean 8, so a rank takes 8.8: the surplus of 3.2 leaves; nothing moves below the limit.
    served = spill(np.array([[12.0, 4.0], [8.0, 8.0]]), Topology(1, 2, 0))
    np.testing.assert_allclose(served.load_BER[0], [[8.8, 3.2], [0, 4]])
    np.testing.assert_allclose(served.load_BER[1], [[8, 0], [0, 8]])
    assert served.copies_B.tolist() == [1, 0]
