"""Which tasks a backward list has: those that what is asked for needs, and no others."""

import pytest
from hypothesis import given

from megakernel.plan.backward import backward_segments, needs_ds
from megakernel.plan.protocol import NAMES, Protocol
from megakernel.plan.rules import GradientRule
from tests.helpers.plan.lists import asked_rules

ROWS = ["route", "prefix", "scatter"]


def names_of(asked: GradientRule, makes_rows: bool = False, has_shared: bool = False) -> list[str]:
    """Return a list's segments by name."""
    segments = backward_segments(asked, makes_rows, has_shared)
    return ["dDown and dx" if s == Protocol.MIXED else NAMES[s] for s in segments]


ALONE = [
    ("x", GradientRule(x=True, weighs=True), ["dH", "dX", "dS", "dx"]),
    ("x, routing given", GradientRule(x=True), ["dH", "dX", "dx"]),
    ("router", GradientRule(router=True, weighs=True), ["dH", "dS", "dRouter"]),
    ("router bias", GradientRule(router_bias=True, weighs=True), ["dH", "dS", "dRouter"]),
    ("gate_up", GradientRule(gate_up=True, weighs=True), ["dH", "dGateUp"]),
    ("down", GradientRule(down=True, weighs=True), ["dH", "dDown"]),
    ("a bias", GradientRule(gate_up_bias=True), ["dH", "dBias"]),
    ("the other bias", GradientRule(down_bias=True), ["dH", "dBias"]),
    ("given weights", GradientRule(gates=True), ["dH", "dS"]),
    ("x and down", GradientRule(x=True, down=True), ["dH", "dX", "dDown and dx"]),
]


@pytest.mark.parametrize(
    ("asked", "expected"), [pytest.param(*case, id=name) for name, *case in ALONE]
)
def test_what_is_frozen_has_no_task(asked: GradientRule, expected: list[str]) -> None:
    assert names_of(asked) == expected
    assert names_of(asked, makes_rows=True) == ROWS + expected


SHARED = [
    ("its gate", GradientRule(shared_gate=True), ["shared dH", "dH", "shared dGateUp"]),
    ("its up", GradientRule(shared_up=True), ["shared dH", "dH", "shared dGateUp"]),
    ("its down", GradientRule(shared_down=True), ["shared dH", "dH", "shared dDown"]),
    ("its token gate", GradientRule(token_gate=True, token_gated=True),
     ["shared dH", "dH", "dS", "dTokenGate"]),
    ("x through the token gate", GradientRule(x=True, token_gated=True),
     ["shared dH", "dH", "shared dX", "dX", "dS", "dx"]),
    ("down, FFN1 again", GradientRule(down=True, recomputes=True),
     ["shared FFN1", "FFN1", "shared dH", "dH", "dDown"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "expected"), [pytest.param(*case, id=name) for name, *case in SHARED]
)
def test_a_shared_expert_has_tasks_beside_the_routed_ones(
    asked: GradientRule, expected: list[str]
) -> None:
    assert names_of(asked, has_shared=True) == expected


@given(asked_rules())
def test_a_list_has_each_segment_once_and_its_readers_behind_its_writers(drawn) -> None:
    asked, has_shared = drawn
    P = Protocol
    segments = backward_segments(asked, True, has_shared)
    assert len(set(segments)) == len(segments)
    place = {segment: at for at, segment in enumerate(segments)}
    assert segments[:3] == (P.ROUTE, P.PREFIX, P.SCATTER)
    assert (P.FFN1 in place) == asked.recomputes and P.DH in place
    assert (P.DX in place) == asked.x == (P.MIXED in place or P.DX_SUM in place)
    assert (P.DS in place) == needs_ds(asked)
    assert (P.DDOWN in place or P.MIXED in place) == asked.down
    for writer, reader in (
        (P.FFN1, P.DH), (P.SHARED_FFN1, P.SHARED_DH), (P.DH, P.DX), (P.SHARED_DH, P.SHARED_DX),
        (P.DX, P.DX_SUM), (P.DX, P.MIXED), (P.DH, P.DS), (P.DS, P.DROUTER), (P.DS, P.DX_SUM),
        (P.DS, P.MIXED), (P.DS, P.DTOKEN_GATE), (P.DH, P.DGATE_UP), (P.DH, P.DBIAS),
    ):  # fmt: skip
        assert not {writer, reader} <= place.keys() or place[writer] < place[reader]
