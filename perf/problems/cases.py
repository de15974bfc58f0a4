"""What is measured: named model shapes, numbers of tokens, and routing scenarios."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from balance import Trace
from balance.formats import Routes, read
from balance.recorded.synthetic import SyntheticConfig, make_trace, top_k_chance
from megakernel.config import KernelConfig, LayerShape
from megakernel.launch.tuned import config_on
from megakernel.tools.models import MODELS, ModelShape

FORWARD_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

SIMULATED_GPU = "NVIDIA H200"

# For tests and rehearsals: every path of the suites in milliseconds on a CPU.
TINY = ModelShape("tiny", 8, 2, 64, 32, 2)
# The shape that a trace of 32 experts, top-4, is played on: the demo's, and gpt-oss-20b's own.
GPT_OSS_20B = ModelShape("gpt-oss-20b", 32, 4, 2880, 2880, 24)
SHAPES = {shape.name: shape for shape in (*MODELS.values(), GPT_OSS_20B, TINY)}

# What the demo's model routed while generating; any other recording is named with --trace.
RECORDING = Path(__file__).parents[1] / "demo" / "data" / "routing.npz"

# Load of each expert over the mean, hottest first: gpt-oss-20b while generating, layer 17 of
# AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting (Apache-2.0), all 107920 tokens.
RECORDED_PROFILE = (
    2.60, 2.46, 2.36, 2.01, 2.01, 1.98, 1.90, 1.87, 1.58, 1.39, 1.28, 1.16, 1.10, 0.99, 0.97, 0.93,
    0.67, 0.67, 0.60, 0.58, 0.55, 0.53, 0.51, 0.41, 0.32, 0.25, 0.11, 0.11, 0.04, 0.03, 0.02, 0.01,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One problem: a model's layer, a number of tokens, and who is routed where.

    Attributes:
        model: sizes of the layer.
        num_tokens: T.
        scenario: key of SCENARIOS.
        seed: of what is drawn.
        trace: the recording that the scenario "trace" reads.
    """

    model: ModelShape
    num_tokens: int
    scenario: str = "uniform"
    seed: int = 0
    trace: Path = RECORDING

    @property
    def name(self) -> str:
        """Identifies the case in results, up to the number of tokens."""
        played = f" {self.trace.stem}" if self.scenario == "trace" else ""
        return f"{self.model.name}/{self.scenario}{played}"

    @property
    def num_assignments(self) -> int:
        """A = T·K."""
        return self.num_tokens * self.model.top_k

    @property
    def layer(self) -> LayerShape:
        """What a config is chosen for."""
        model = self.model
        return LayerShape(model.num_experts, model.top_k, model.hidden, model.intermediate)

    @property
    def default_config(self) -> KernelConfig:
        """What moe() takes for the case on one H200."""
        return config_on(SIMULATED_GPU, self.layer, self.num_tokens)


def balanced(case: Case) -> np.ndarray:
    """Every expert gets the same number of assignments, to within one."""
    rng = np.random.default_rng(case.seed)
    E, K = case.model.num_experts, case.model.top_k
    ids_TK = rng.permutation(E)[np.arange(case.num_assignments) % E].reshape(-1, K)
    return rng.permutation(ids_TK)


def uniform(case: Case) -> np.ndarray:
    """Every choice of K experts is equally likely: what most published figures use."""
    return draw(case, np.ones(case.model.num_experts))


def zipf(case: Case) -> np.ndarray:
    """Expert r is chosen in proportion to 1 / r, but by no more than 95 % of the tokens."""
    return draw(case, 1 / np.arange(1, case.model.num_experts + 1))


def recorded(case: Case) -> np.ndarray:
    """Experts are as unequal as gpt-oss-20b's, whatever their number; tokens are independent."""
    E = case.model.num_experts
    place_E = (np.arange(E) + 0.5) / E * len(RECORDED_PROFILE) - 0.5
    return draw(case, np.interp(place_E, np.arange(len(RECORDED_PROFILE)), RECORDED_PROFILE))


def synthetic(case: Case) -> np.ndarray:
    """One micro-batch of balance.recorded.synthetic: sequences, domains and persistence."""
    config = SyntheticConfig(
        num_experts=case.model.num_experts,
        top_k=case.model.top_k,
        num_layers=1,
        num_micro_batches=1,
        tokens_per_micro_batch=case.num_tokens,
        num_ranks=1,
        seed=case.seed,
    )
    return make_trace(config).ids_TLK[:, 0].astype(np.int64)


def trace(case: Case) -> np.ndarray:
    """The ids of a recording, tokens in their order; of the layer with the median imbalance."""
    ids_TK = typical_layer(case.trace)
    if case.num_tokens > len(ids_TK):
        raise ValueError(f"num_tokens must be at most {len(ids_TK)}, got {case.num_tokens}")
    return ids_TK[: case.num_tokens].astype(np.int64)


def one_takes_all(case: Case) -> np.ndarray:
    """Every token's first choice is expert 0; the others share the rest evenly."""
    T, E, K = case.num_tokens, case.model.num_experts, case.model.top_k
    ids_TK = np.zeros((T, K), np.int64)
    ids_TK[:, 1:] = 1 + np.arange(T * (K - 1)).reshape(T, K - 1) % max(E - 1, 1)
    return ids_TK


SCENARIOS: dict[str, Callable[[Case], np.ndarray]] = {
    "balanced": balanced,
    "uniform": uniform,
    "zipf": zipf,
    "recorded": recorded,
    "synthetic": synthetic,
    "trace": trace,
    "one takes all": one_takes_all,
}


def why_missing(case: Case) -> str | None:
    """Return why the case's routing cannot be had here, or None."""
    if case.scenario != "trace":
        return None
    if not case.trace.exists():
        return f"there is no {case.trace}"
    num_experts, top_k = sizes_of(read_trace(case.trace))
    if (case.model.num_experts, case.model.top_k) != (num_experts, top_k):
        return f"the trace is of {num_experts} experts, top-{top_k}"
    return None


def make_ids(case: Case) -> np.ndarray:
    """Return ids_TK int64 of a case, distinct within a token.

    Raises:
        ValueError: on an unknown scenario, or one that cannot be had here.
    """
    if case.scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {list(SCENARIOS)}, got {case.scenario!r}")
    if reason := why_missing(case):
        raise ValueError(f"scenario {case.scenario!r} must be available, but {reason}")
    return SCENARIOS[case.scenario](case)


def make_loads(case: Case) -> np.ndarray:
    """Return load_E int64: the assignments of each expert."""
    return np.bincount(make_ids(case).ravel(), minlength=case.model.num_experts)


def draw(case: Case, weight_E: np.ndarray) -> np.ndarray:
    """Draw K distinct experts per token so that loads follow ``weight_E`` on average."""
    rng = np.random.default_rng(case.seed)
    K = case.model.top_k
    logit_E = fit_logits(weight_E, K)
    # Gumbel noise: the K largest are a draw without replacement.
    noise_TE = rng.gumbel(size=(case.num_tokens, len(weight_E)))
    return np.argpartition(-(logit_E + noise_TE), K - 1, axis=1)[:, :K]


def fit_logits(weight_E: np.ndarray, top_k: int) -> np.ndarray:
    """Return logits under which an expert's chance to be in the top-k is proportional to weight.

    A chance is at most 0.95; what that leaves goes to the other experts.
    """
    chance_E = top_k * weight_E / weight_E.sum()
    if top_k == len(weight_E):
        return np.zeros(len(weight_E))
    for _ in range(len(weight_E)):
        capped_E = chance_E >= 0.95
        rest = top_k - 0.95 * capped_E.sum()
        if not capped_E.any() or rest <= 0:
            break
        free = np.where(capped_E, 0, chance_E)
        chance_E = np.where(capped_E, 0.95, free * rest / max(free.sum(), 1e-30))
    logit_E = np.log(chance_E)
    for _ in range(50):
        logit_E += np.log(chance_E / top_k_chance(logit_E[None], top_k)[0])
    return logit_E


@lru_cache(maxsize=1)
def read_trace(path: Path) -> Trace | Routes:
    """Read a recording, packed or not.

    Raises:
        ValueError: if the file is none.
        OSError: if it cannot be read.
    """
    return read(path)


def sizes_of(recorded: Trace | Routes) -> tuple[int, int]:
    """Return E and K of a recording."""
    return recorded.num_experts, recorded.ids_TLK.shape[2]


@lru_cache(maxsize=1)
def typical_layer(path: Path) -> np.ndarray:
    """Return ids_TK of the layer whose imbalance is the median of the layers'.

    Tokens without a choice in some layer are left out.
    """
    recorded = read_trace(path)
    ids_TLK = recorded.ids_TLK
    if recorded.row_mask_T is not None:
        ids_TLK = ids_TLK[recorded.row_mask_T]
    ids_TLK = ids_TLK[(ids_TLK >= 0).all((1, 2))]
    hottest_L = [np.bincount(ids_TK.ravel()).max() for ids_TK in ids_TLK.swapaxes(0, 1)]
    layer = np.argsort(hottest_L, kind="stable")[len(hottest_L) // 2]
    return np.ascontiguousarray(ids_TLK[:, layer])
