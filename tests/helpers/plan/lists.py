"""Backward lists of every shape, for hypothesis."""

from dataclasses import fields, replace

from hypothesis import strategies as st

from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.rules import ExpertRule, GradientRule, WeightRule
from megakernel.plan.schedule import Schedule
from tests.helpers.specs import PLAIN_SPEC

SHARED_FIELDS = ("shared_gate", "shared_up", "shared_down", "token_gate")
ROUTER_FIELDS = ("router", "router_bias")


@st.composite
def asked_rules(draw: st.DrawFn, has_shared: bool | None = None) -> tuple[GradientRule, bool]:
    """Draw what a backward is asked for, and whether there is a shared expert."""
    if has_shared is None:
        has_shared = draw(st.booleans())
    given = {field.name: draw(st.booleans()) for field in fields(GradientRule)}
    if not has_shared:
        given |= dict.fromkeys((*SHARED_FIELDS, "token_gated"), False)
    given["token_gate"] &= given["token_gated"]
    if given["weighs"]:
        given["gates"] = False
    else:
        given |= dict.fromkeys(ROUTER_FIELDS, False)
    return GradientRule(**given), has_shared


@st.composite
def backward_schedules(draw: st.DrawFn, routes: tuple[str, ...] = ("given", "replay")) -> Schedule:
    """Draw a backward list, its shapes, its tiles and a number of row tiles, none or many."""
    small = st.integers(1, 5)
    has_gate, interleaved = draw(st.sampled_from([(True, False), (True, True), (False, False)]))
    expert = ExpertRule(
        "silu" if has_gate else "relu2", has_gate=has_gate, interleaved=interleaved
    )
    asked, has_shared = draw(asked_rules())
    if not has_gate:
        asked = replace(asked, shared_gate=False)
    hidden, intermediate = draw(st.integers(1, 100)), draw(st.integers(10, 50))
    height = intermediate * expert.rows_per_column
    rule = WeightRule.of_experts((expert.stacked, height, hidden), 16, 16, False, False)
    same = {field.name: getattr(PLAIN_SPEC, field.name) for field in fields(PLAIN_SPEC)}
    spec = BackwardSpec(**same | {
        "stages": "backward", "route": draw(st.sampled_from(routes)), "gradients": asked,
        "expert": expert, "gate_up": rule,
        "num_experts": draw(st.sampled_from([1, 2, 5, 33])),
        "hidden": hidden, "intermediate": intermediate,
        "shared_width": draw(st.sampled_from([24, 70])) if has_shared else 0,
        "block_i": draw(st.sampled_from([16, 32])), "block_h": draw(st.sampled_from([16, 64])),
        "combine_tokens": draw(st.sampled_from([1, 8, 16])), "column_groups": draw(small),
        "tile_group": draw(small), "blocks_per_task": draw(small),
    })  # fmt: skip
    num_tokens = draw(st.integers(1, 40))
    num_shared = Schedule(spec, num_tokens, 0).shared_tiles
    return Schedule(spec, num_tokens, num_shared + draw(st.integers(0, 6)))
