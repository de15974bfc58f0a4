"""Other ways to balance, written from their published descriptions.

Every method gets the same loads and topology and is measured the same way. From outside, come
through ``balance.baselines``.
"""

from balance.compare.baselines.run import BASELINES, Outcome, run_baseline

__all__ = ["BASELINES", "Outcome", "run_baseline"]
