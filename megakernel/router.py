"""How logits become choices and weights."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from megakernel.checks.tensors import check_positive, check_seed, check_tensor
from megakernel.plan.rules import SCORES, RouterRule


@dataclass(frozen=True, eq=False)
class Router:
    """How logits become choices and weights.

    ============================ ===============================================================
    model                        router
    ============================ ===============================================================
    Mixtral                      ``Router(2)``
    Qwen2/3-MoE, OLMoE           ``Router(8, renormalize=norm_topk_prob)``
    gpt-oss                      ``Router(4, bias_E=bias)``
    DeepSeek-V3, GLM4-MoE, JoyAI ``Router(8, "sigmoid", norm_topk_prob, scale=2.5,
                                 correction_bias_E=bias, num_groups=8, top_groups=4)``
    Switch                       ``Router(1, renormalize=False, capacity=c)``
    GShard                       ``Router(2, capacity=c, random_second_seed=step)``
    ============================ ===============================================================

    Attributes:
        top_k: experts per token, at least 1.
        score: "softmax" over all experts, or "sigmoid", in float32.
        renormalize: whether a token's weights are divided by their sum.
        scale: factor on every weight, after that.
        bias_E: [E] float, added to the logits.
        correction_bias_E: [E] float, added to the scores for choosing only (arXiv 2408.15664).
        num_groups: groups of consecutive experts; divides E.
        top_groups: groups a token chooses from: those whose two best scores have the largest sum
            (arXiv 2412.19437).
        capacity: most tokens an expert takes; later tokens lose that choice, which then has id -1
            and weight 0 (arXiv 2101.03961). None for no limit.
        random_second_seed: in [0, 2^31); with top_k = 2, the second expert serves with probability
            min(1, 2 · its weight) (arXiv 2006.16668). The draw of token t depends on the seed
            and t alone. None to serve it always.

    Correction, groups, capacity and draws are for choosing: under replay they do nothing.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    top_k: int
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    bias_E: Tensor | None = None
    correction_bias_E: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    capacity: int | None = None
    random_second_seed: int | None = None
    rule: RouterRule = field(init=False, repr=False)  # what the compiler must know

    def __post_init__(self) -> None:
        """Check the fields."""
        check_positive("top_k", self.top_k)
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}")
        check_positive("num_groups", self.num_groups)
        check_positive("top_groups", self.top_groups)
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"top_groups must be at most num_groups={self.num_groups}, got {self.top_groups}"
            )
        for name in ("bias_E", "correction_bias_E"):
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name), 1)
        if self.capacity is not None:
            check_positive("capacity", self.capacity)
        if self.random_second_seed is not None:
            check_seed("random_second_seed", self.random_second_seed)
            if self.top_k != 2:
                raise ValueError(f"top_k must be 2 with random_second_seed, got {self.top_k}")
        rule = RouterRule(
            self.score, bool(self.renormalize), float(self.scale), self.num_groups,
            self.top_groups, self.capacity is not None, self.random_second_seed is not None,
        )  # fmt: skip
        object.__setattr__(self, "rule", rule)
