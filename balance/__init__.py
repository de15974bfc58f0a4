"""The replay planner: from recorded routing to a plan that a Mixture-of-Experts layer executes.

RL training replays the expert choices that rollout recorded, so before a step starts it is known
which token goes to which expert. ``make_plan`` turns that into a placement of experts on ranks,
extra copies for each micro-batch, and whole-token quotas, with a proven gap to the best possible.

    trace = Trace.load(path)
    plan = make_plan(trace, Topology(num_nodes=1, ranks_per_node=8, spare_slots_per_rank=1))
    plan.expert_of_P(micro_batch, layer), plan.slot_of_TK(micro_batch, layer), plan.summary()

Nothing here needs Triton or a GPU. Letters and words are those of the glossary in ``reference``.
"""

from balance.measures.traffic import Traffic, count_traffic, moving_the_expert_pays
from balance.plan import Plan, PlanOptions
from balance.planner import make_plan
from balance.topology import Topology
from balance.trace import Trace

__all__ = [
    "Plan",
    "PlanOptions",
    "Topology",
    "Trace",
    "Traffic",
    "count_traffic",
    "make_plan",
    "moving_the_expert_pays",
]
