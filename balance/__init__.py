"""The replay planner: from recorded routing to a plan that a Mixture-of-Experts layer executes.

RL training replays the expert choices that rollout recorded, so before a step starts it is known
which token goes to which expert. ``make_plan`` turns that into a placement of experts on ranks,
extra copies for each micro-batch, and whole-token quotas, with a proven gap to the best possible.

    trace = Trace.load(path)
    plan = make_plan(trace, Topology(num_nodes=1, ranks_per_node=8, spare_slots_per_rank=1))
    plan.expert_of_P(micro_batch, layer), plan.slot_of_TK(micro_batch, layer), plan.summary()

Nothing here needs Triton or a GPU. Two more doors: ``balance.formats`` reads what engines and
trainers record, ``balance.baselines`` runs the published ways to balance.

Letters and words are those of the glossary in ``reference``. These letters are used only here:

====== ============================================ ====== =======================================
letter meaning                                      letter meaning
====== ============================================ ====== =======================================
D      present ranks, numbered without gaps: of     F      problems solved at once: micro-batch ×
       all nodes, or of the node in question               layer, and node where nodes are alike
G      places among which experts are swapped or    X      experts of one problem, or the seats
       spread: nodes, or ranks                             that hold them, or nobody
J      slots for extra copies in one problem        M      spare slots of all present ranks
U      sets of ranks, as bit masks: 2^D             Y      sets without a given rank: 2^(D-1)
O      moves looked at, best first                  Z      entries a node may host: home experts,
S      recorded sequences                                  batch-static copies, one without load
====== ============================================ ====== =======================================

A lower-case letter is a chosen part of what its capital counts: ``time_lBG`` holds the times of
some layers, ``expert_Fx`` some experts of each problem. A *level* is load / speed of the slowest
rank. A *batch-static* copy stays for the whole batch, any other for one micro-batch. A *unit* is
an assignment, or a tile of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balance.measures.traffic import Traffic, count_traffic, moving_the_expert_pays
    from balance.options import PlanOptions
    from balance.plan import Plan
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

_HOME = {
    "Plan": "balance.plan",
    "PlanOptions": "balance.options",
    "Topology": "balance.topology",
    "Trace": "balance.trace",
    "Traffic": "balance.measures.traffic",
    "count_traffic": "balance.measures.traffic",
    "make_plan": "balance.planner",
    "moving_the_expert_pays": "balance.measures.traffic",
}


def __getattr__(name: str) -> Any:
    """Return a public name when it is asked for: torch takes seconds, which --help need not."""
    if name == "__version__":
        return import_module("importlib.metadata").version("moe-megakernel")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
