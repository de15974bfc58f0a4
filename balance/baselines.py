"""The door to the published ways to balance, on the planner's own terms.

    from balance.baselines import BASELINES, run_baseline

    outcome = run_baseline("EPLB, oracle per batch", trace.loads(), topology)
    outcome.rank_load_BLR                       # what every rank of every micro-batch serves

They live in ``balance.compare.baselines``, one file for each family.
"""

from balance.compare.baselines.common import Baseline, Served
from balance.compare.baselines.eplb import eplb
from balance.compare.baselines.run import BASELINES, Outcome, run_baseline

__all__ = ["BASELINES", "Baseline", "Outcome", "Served", "eplb", "run_baseline"]
