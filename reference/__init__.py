"""The truth: a Mixture-of-Experts layer in plain PyTorch, readable before it is fast.

Nothing here imports Triton or needs a GPU. The three packages of this project (reference,
megakernel, balance) never import one another; they meet in plain tensors named by this glossary.

Letters. A name ends in the shape of its tensor, so ``x_TH`` has shape [T, H].

====== ============================================ ====== =======================================
letter meaning                                      letter meaning
====== ============================================ ====== =======================================
T      tokens in this call                          R      ranks (R / N per node, N nodes)
K      experts per token (top-k), never a GEMM      V      most copies any expert has; lists padded
       depth                                               to it end in -1
A      assignments = T·K, token-major: a = t·K + k  L      MoE layers
C      rows grouped by slot, each slot padded to    B      micro-batches
       the tile height
H      hidden width                                 W      persistent programs launched (workers)
I      expert intermediate width (gate and up: 2I)  P, Q   physical slots over all ranks; per rank
E      logical experts                                     (P = R·Q)
====== ============================================ ====== =======================================

Words. A *logical expert* is a set of weights. A *slot* is a place that holds one copy of an
expert. A *replica* is one of the copies. A *placement* says which expert each slot holds. *Load*
counts assignments. *Imbalance* is max over ranks / mean over ranks.

Maps read ``value_of_INDEX``: ``expert_of_P[p]`` is the expert in slot p (vLLM and SGLang call it
``physical_to_logical_map``, EPLB ``phy2log``), ``slot_of_TK[t, k]`` the slot that serves choice k
of token t. Id -1 means "no expert" or "empty slot". Units end names: ``_us``, ``_bytes``.
"""

from reference.experts import ExpertKind, expert_ffn, shared_ffn
from reference.moe import moe, moe_by_expert, moe_by_token
from reference.parallel import moe_by_rank
from reference.router import (
    Routing,
    choose,
    count_load,
    keep_best_groups,
    route,
    score,
    select,
    weigh,
)

__all__ = [
    "ExpertKind",
    "Routing",
    "choose",
    "count_load",
    "expert_ffn",
    "keep_best_groups",
    "moe",
    "moe_by_expert",
    "moe_by_rank",
    "moe_by_token",
    "route",
    "score",
    "select",
    "shared_ffn",
    "weigh",
]
