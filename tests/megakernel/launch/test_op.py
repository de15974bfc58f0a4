"""The custom op's text and lists: everything of a call comes back, whatever its fields."""

from dataclasses import replace

import pytest
import torch

from megakernel.config import FLOAT32, INTERPRETER, SHIPPED
from megakernel.launch.call import CallRule
from megakernel.launch.op import decode, encode, flatten, outputs_of, unflatten
from megakernel.plan.buffers import Buffers, RouterTensors, Routing
from megakernel.plan.rules import ExpertRule, RouterRule

PLAIN = CallRule("layer", "live", "one", RouterRule(), ExpertRule(), False, INTERPRETER)
RULES = {
    "plain": PLAIN,
    "every field another": CallRule(
        "rows", "given", "slot", RouterRule("sigmoid", False, 0.1, 8, 4, True, True),
        ExpertRule("clamped_swiglu", 1e-7, True, True), True, replace(FLOAT32, record_times=True),
    ),
    **{name: replace(PLAIN, config=config) for name, config in SHIPPED.items()},
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_names_and_rule_survive_as_text(rule):
    names = ("x_TH", "router.weight_EH")
    assert decode(encode(names, rule)) == ([*names], rule)


def test_tensors_survive_as_a_list_and_absent_ones_stay_absent():
    x_TH, bias_E, ids_TK = torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 1)
    buffers = Buffers(x_TH, RouterTensors(bias_E=bias_E), routing=Routing(ids_TK))
    tensors = flatten(buffers)
    assert list(tensors) == ["x_TH", "router.bias_E", "routing.expert_of_TK"]
    back = unflatten(tensors)
    assert back.router.bias_E is bias_E and back.router.weight_EH is None
    assert back.x_TH is x_TH and back.routing.expert_of_TK is ids_TK and back.y_TH is None


@pytest.mark.parametrize(
    ("route", "written"),
    [("live", {"expert_of_TK", "gate_TK"}), ("replay", {"gate_TK"}), ("given", set())],
    ids=["live", "replay", "given"],
)
def test_ids_and_weights_are_outputs_only_where_the_launch_makes_them(route, written):
    outputs = outputs_of(replace(PLAIN, route=route))
    made = {name.removeprefix("routing.") for name in outputs} & {"expert_of_TK", "gate_TK"}
    assert made == written and "y_TH" in outputs
