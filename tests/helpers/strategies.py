"""hypothesis strategies: machines, and loads for them."""

import numpy as np
from hypothesis import strategies as st

from balance.topology import Topology


@st.composite
def topologies(draw: st.DrawFn, max_nodes: int = 3, max_ranks_per_node: int = 4) -> Topology:
    """Even and uneven nodes, none to two spare slots, equal and unequal speeds, missing ranks.

    Every node keeps a present rank, so that batch-static copies have a place on it.
    """
    ranks_of_N = tuple(
        draw(st.lists(st.integers(1, max_ranks_per_node), min_size=1, max_size=max_nodes))
    )
    num_ranks = sum(ranks_of_N)
    speeds = st.lists(
        st.sampled_from([0.5, 1.0, 1.5, 2.0]), min_size=num_ranks, max_size=num_ranks
    )
    missing = draw(st.sets(st.integers(0, num_ranks - 1), max_size=num_ranks - 1))
    first_of_N = np.cumsum((0, *ranks_of_N[:-1]))
    return Topology(
        len(ranks_of_N),
        ranks_of_N,
        spare_slots_per_rank=draw(st.integers(0, 2)),
        rank_speed=draw(st.none() | speeds),
        missing_ranks=tuple(missing - set(first_of_N.tolist())),
    )


@st.composite
def loads(
    draw: st.DrawFn,
    num_ranks: int,
    max_experts: int = 12,
    max_layers: int = 2,
    max_micro_batches: int = 3,
) -> np.ndarray:
    """load_BLRE int64: often skewed, with experts, layers and micro-batches without load."""
    shape = (
        draw(st.integers(1, max_micro_batches)),
        draw(st.integers(1, max_layers)),
        num_ranks,
        draw(st.integers(1, max_experts)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 1.0, 2.0]))
    scale = draw(st.sampled_from([0.3, 5.0, 200.0]))
    return rng.poisson(scale * rng.lognormal(0.0, spread, shape))


@st.composite
def split_problems(
    draw: st.DrawFn, max_ranks: int = 8, max_experts: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """load_NX, home_NX, copy_NS, rank_of_S and speed_D of a few problems with random copies."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    spares = draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_problems = 3
    load_NX = rng.integers(0, draw(st.sampled_from([2, 50, 5000])), (num_problems, num_experts))
    home_NX = rng.integers(0, num_ranks, (num_problems, num_experts))
    rank_of_S = np.repeat(np.arange(num_ranks), spares)
    copy_NS = rng.integers(-1, num_experts, (num_problems, len(rank_of_S)))
    for copy_S, home_X in zip(copy_NS, home_NX, strict=True):
        for slot, (expert, rank) in enumerate(zip(copy_S.tolist(), rank_of_S, strict=True)):
            earlier = copy_S[:slot][rank_of_S[:slot] == rank]
            if home_X[expert] == rank or expert in earlier:
                copy_S[slot] = -1
    even = draw(st.booleans())
    speed_D = np.ones(num_ranks) if even else rng.choice([0.5, 1.0, 2.0], num_ranks)
    return load_NX, home_NX, copy_NS, rank_of_S, speed_D
