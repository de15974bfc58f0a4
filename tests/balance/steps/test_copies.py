"""Copies: the search against HiGHS's optimum, and rules that hold for any loads."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from balance.exact import bounds, split
from balance.steps.copies import Search, choose_copies
from balance.steps.copies_by_flow import choose_copies_by_flow


@dataclasses.dataclass(frozen=True)
class Node:
    """F problems of one node."""

    load_FX: torch.Tensor
    home_FX: torch.Tensor
    rank_of_J: torch.Tensor
    speed_D: torch.Tensor

    @classmethod
    def make(cls, load_FX, num_ranks, spares=1, home_FX=None, speed_D=None):
        load_FX = torch.as_tensor(load_FX)
        blocks_X = torch.arange(load_FX.shape[1]) * num_ranks // load_FX.shape[1]
        home_FX = blocks_X.expand(load_FX.shape) if home_FX is None else torch.as_tensor(home_FX)
        speed_D = torch.ones(num_ranks) if speed_D is None else torch.as_tensor(speed_D)
        rank_of_J = torch.arange(num_ranks).repeat_interleave(spares)
        return cls(load_FX, home_FX, rank_of_J, speed_D.double())

    def bound_F(self):
        slots_D = torch.bincount(self.rank_of_J, minlength=len(self.speed_D))
        slots_FD = slots_D.expand(len(self.load_FX), -1)
        return torch.maximum(
            bounds.slot_level(self.load_FX, self.home_FX, slots_FD, self.speed_D),
            self.load_FX.double().sum(1) / self.speed_D.sum(),
        )

    def copies(self, choose=choose_copies, search=None):
        return choose(
            self.load_FX, self.home_FX, self.rank_of_J, self.speed_D, self.bound_F(), None, search
        )

    def level_F(self, copy_FJ):
        level_F, _ = split.bottleneck(
            self.load_FX, self.home_FX, copy_FJ, self.rank_of_J, self.speed_D
        )
        return level_F


def best_level(load_X, home_X, num_ranks, spares):
    """Least level of all placements, by HiGHS's mixed-integer solver to 0.001 %."""
    load_X = load_X / load_X.sum() * num_ranks
    num_flows = len(load_X) * num_ranks
    flow_XD = np.arange(num_flows).reshape(len(load_X), num_ranks)
    rows = []
    for x in range(len(load_X)):
        rows.append(({flow: 1.0 for flow in flow_XD[x]}, 1.0, 1.0))
        for d in range(num_ranks):
            rows.append(({flow_XD[x, d]: 1.0, flow_XD[x, d] + num_flows: -1.0}, -np.inf, 0.0))
    for d in range(num_ranks):
        time = dict(zip(flow_XD[:, d], load_X, strict=True))
        rows.append(({**time, 2 * num_flows: -1.0}, -np.inf, 0.0))
        away = [x for x in range(len(load_X)) if home_X[x] != d]
        rows.append(({flow_XD[x, d] + num_flows: 1.0 for x in away}, 0.0, float(spares)))
    matrix = np.zeros((len(rows), 2 * num_flows + 1))
    for row, (entries, _, _) in enumerate(rows):
        matrix[row, list(entries)] = list(entries.values())
    least = np.zeros(2 * num_flows + 1)
    least[num_flows + flow_XD[np.arange(len(load_X)), home_X]] = 1
    solved = milp(
        np.eye(2 * num_flows + 1)[-1],
        constraints=LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows]),
        bounds=Bounds(least, np.append(np.ones(2 * num_flows), np.inf)),
        integrality=np.append(np.repeat([0, 1], num_flows), 0),
        options={"mip_rel_gap": 1e-5},
    )
    assert solved.status == 0
    return solved.fun


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "spares"),
    [
        pytest.param(3, 9, 1, id="three ranks"),
        pytest.param(4, 16, 1, id="four ranks"),
        pytest.param(6, 18, 1, id="six ranks"),
        pytest.param(8, 32, 1, id="eight ranks, the hardest"),
        pytest.param(4, 24, 2, id="two slots"),
        pytest.param(4, 8, 0, id="no slots"),
    ],
)
def test_search_reaches_the_optimum(num_ranks, num_experts, spares):
    rng = np.random.default_rng(num_ranks)
    load_FX = np.round(rng.lognormal(3.0, 1.2, (12, num_experts))).astype(int) + 1
    node = Node.make(load_FX, num_ranks, spares)
    found_F = node.level_F(node.copies(search=Search(tolerance=1e-5))).numpy()
    home_X = node.home_FX[0].numpy()
    mean_F = load_FX.sum(1) / num_ranks
    best_F = np.array([best_level(load_X, home_X, num_ranks, spares) for load_X in load_FX])
    gap_F = found_F / (best_F * mean_F) - 1
    assert gap_F.min() > -2e-5, "better than the optimum: one of the two is wrong"
    assert gap_F.mean() <= 1e-3 and gap_F.max() <= 0.05


def test_flashlb_example_reaches_the_mean():
    # 8 experts on 8 ranks with one spare slot each: EPLB 232, FlashLB 205, the mean 181.25.
    node = Node.make([[600, 560, 120, 120, 20, 10, 10, 10]], 8)
    assert node.level_F(node.copies()).item() == pytest.approx(181.25, rel=5e-4)


def problems(draw, max_ranks=6, max_experts=12):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    load_FX = np.round(rng.lognormal(4.0, 1.5, (3, num_experts))).astype(np.int64)
    load_FX[rng.random(load_FX.shape) < 0.2] = 0
    home_FX = rng.integers(0, num_ranks, load_FX.shape)
    speed_D = rng.choice([0.5, 1.0, 2.0], num_ranks) if draw(st.booleans()) else None
    return Node.make(load_FX, num_ranks, draw(st.integers(0, 2)), home_FX, speed_D)


nodes = st.composite(problems)


@pytest.mark.parametrize("choose", [choose_copies, choose_copies_by_flow])
@given(node=nodes())
@settings(max_examples=40, deadline=None)
def test_copies_are_legal_and_never_hurt(choose, node):
    copy_FJ = node.copies(choose)
    for copy_J, home_X in zip(copy_FJ.tolist(), node.home_FX.tolist(), strict=True):
        pairs = [(e, r) for e, r in zip(copy_J, node.rank_of_J.tolist(), strict=True) if e >= 0]
        assert len(set(pairs)) == len(pairs), "a rank holds an expert twice"
        assert all(home_X[expert] != rank for expert, rank in pairs), "a copy beside the home"
    level_F = node.level_F(copy_FJ)
    assert (level_F <= node.level_F(torch.full_like(copy_FJ, -1)) * (1 + 1e-6)).all()
    assert (level_F >= node.bound_F() * (1 - 1e-9)).all()


@given(node=nodes())
@settings(max_examples=40, deadline=None)
def test_more_slots_never_hurt(node):
    fewer_F = node.level_F(node.copies())
    spares = torch.bincount(node.rank_of_J, minlength=len(node.speed_D))[0].item()
    more = Node.make(node.load_FX, len(node.speed_D), spares + 1, node.home_FX, node.speed_D)
    assert (more.level_F(more.copies()) <= fewer_F * (1 + 1e-6)).all()


@given(node=nodes(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_renaming_experts_or_scaling_loads_changes_nothing(node, seed):
    # Distinct loads, since equal ones are told apart by their number.
    load_FX = node.load_FX * node.load_FX.shape[1] + torch.arange(node.load_FX.shape[1]) + 1
    node = dataclasses.replace(node, load_FX=load_FX)
    level_F = node.level_F(node.copies())
    order = torch.from_numpy(np.random.default_rng(seed).permutation(load_FX.shape[1]))
    renamed = dataclasses.replace(node, load_FX=load_FX[:, order], home_FX=node.home_FX[:, order])
    assert torch.allclose(renamed.level_F(renamed.copies()), level_F, rtol=1e-3)
    scaled = dataclasses.replace(node, load_FX=load_FX * 4)
    assert torch.equal(scaled.copies(), node.copies())


def test_tolerance_saves_copies():
    rng = np.random.default_rng(0)
    node = Node.make(rng.lognormal(5, 1, (50, 32)).astype(int), 8)
    exact, rough = node.copies(), node.copies(search=Search(tolerance=0.05))
    assert (rough >= 0).sum() < 0.7 * (exact >= 0).sum()
    assert (node.level_F(rough) <= node.bound_F() * 1.051).all()


def test_light_experts_get_no_copy():
    rng = np.random.default_rng(0)
    node = Node.make(rng.lognormal(5, 1, (20, 32)).astype(int), 8)
    copy_FJ = node.copies(search=Search(min_load=300))
    load_FJ = node.load_FX.gather(1, copy_FJ.clamp(min=0))
    assert (load_FJ[copy_FJ >= 0] >= 300).all() and (copy_FJ >= 0).any()


def test_closed_slots_stay_empty():
    node = Node.make([[9, 1, 1, 1]], 4)
    usable_FJ = torch.tensor([[True, False, True, False]])
    copy_FJ = choose_copies(
        node.load_FX, node.home_FX, node.rank_of_J, node.speed_D, node.bound_F(), usable_FJ
    )
    assert (copy_FJ[~usable_FJ] == -1).all() and copy_FJ[0, 2] == 0


@pytest.mark.parametrize("load_1X", [[[0, 0]], [[5, 0]], [[0, 0, 0]]], ids=str)
def test_nothing_or_one_expert_to_serve(load_1X):
    node = Node.make(load_1X, 2)
    assert node.level_F(node.copies()).item() == sum(load_1X[0]) / 2


def test_chunks_do_not_change_the_answer():
    rng = np.random.default_rng(1)
    node = Node.make(rng.lognormal(5, 1, (30, 24)).astype(int), 6)
    small = node.copies(search=Search(problems_per_chunk=7))
    assert torch.equal(small, node.copies())
