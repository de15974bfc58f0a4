"""Routing made up, but with the fluctuations of recorded routing.

Independent tokens would understate how much micro-batches differ by a factor of six: what varies
is the sequence, and the domain it comes from. So expert logits are a sum of normal offsets,

    logit[l, s, e] = base[l, e] + domain[l, d(s), e] + sequence[l, s, e] + drift[l, b(s), e],

and each token takes the top-k of logit + Gumbel noise, of which it keeps a part from the token
before. The default spreads reproduce gpt-oss-20b's correlation inside a sequence, overlap of
neighbouring tokens and rank imbalance; every label says "synthetic".
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from balance.recorded.packing import Order, deal_to_ranks, fill_micro_batches
from balance.trace import Trace

# Keeps a chunk's noise, 4 MB at 128 experts, near the caches.
_TOKENS_PER_CHUNK = 8192


@dataclass(frozen=True)
class SyntheticConfig:
    """What to make up.

    Attributes:
        num_experts, top_k, num_layers: of the model; top_k <= num_experts.
        num_micro_batches, tokens_per_micro_batch: of the batch; the last may run short.
        num_ranks: ranks that whole sequences are dealt to.
        base_spread: least and largest standard deviation of a layer's base logits.
        num_domains: kinds of text.
        domain_spread: standard deviation of a domain's logits.
        sequence_spread: least and largest standard deviation of a sequence's logits in a layer.
        persistence: chance that an expert's noise stays the same from one token to the next.
        drift: standard deviation of the step that base logits take from micro-batch to
            micro-batch, 0 for a model that does not train meanwhile.
        sequence_tokens: shortest and longest sequence; lengths are lognormal in between.
        order: "shuffled", or "domain": sequences grouped by domain, the hard case.
        seed: the same seed gives the same trace.

    Raises:
        ValueError: on a size below 1, top_k above num_experts, or an unknown order.
    """

    num_experts: int = 128
    top_k: int = 8
    num_layers: int = 4
    num_micro_batches: int = 32
    tokens_per_micro_batch: int = 16384
    num_ranks: int = 64
    base_spread: tuple[float, float] = (0.5, 1.2)
    num_domains: int = 6
    domain_spread: float = 0.6
    sequence_spread: tuple[float, float] = (0.4, 1.1)
    persistence: float = 0.25
    drift: float = 0.0
    sequence_tokens: tuple[int, int] = (30, 8192)
    order: Order = "shuffled"
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("num_experts", "top_k", "num_layers", "num_micro_batches")
        for name in (*sizes, "tokens_per_micro_batch", "num_ranks", "num_domains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most {self.num_experts}, got {self.top_k}")
        if self.order not in ("shuffled", "domain"):
            raise ValueError(f'order must be "shuffled" or "domain", got {self.order!r}')
        if not 0 <= self.persistence < 1:
            raise ValueError(f"persistence must lie in [0, 1), got {self.persistence}")
        if not 1 <= self.sequence_tokens[0] <= self.sequence_tokens[1]:
            raise ValueError(f"sequence_tokens must rise from 1, got {self.sequence_tokens}")

    @property
    def label(self) -> str:
        """Says that the routing is made up, and from what."""
        return (
            f"synthetic {self.num_experts} experts top-{self.top_k}, {self.order}, "
            f"seed {self.seed}"
        )


@dataclass(frozen=True)
class _Sequences:
    """Decided before any routing: tokens, domain, micro-batch and rank of each sequence."""

    length_S: np.ndarray
    domain_S: np.ndarray
    micro_batch_S: np.ndarray
    rank_S: np.ndarray


def make_trace(config: SyntheticConfig) -> Trace:
    """A synthetic trace, ids best choice first in the narrowest unsigned dtype."""
    sequences = _make_sequences(config)
    num_tokens = int(sequences.length_S.sum())
    shape = (num_tokens, config.num_layers, config.top_k)
    ids_TLK = np.empty(shape, np.min_scalar_type(config.num_experts - 1))
    rng = np.random.default_rng([config.seed, 2])
    for layer, logit_SE in enumerate(_layer_logits(config, sequences)):
        ids_TLK[:, layer] = _draw_ids(logit_SE, sequences.length_S, config, rng)
    return Trace(
        ids_TLK,
        np.repeat(sequences.micro_batch_S, sequences.length_S),
        np.repeat(sequences.rank_S, sequences.length_S),
        config.num_experts,
        label=config.label,
    )


def make_counts(config: SyntheticConfig) -> np.ndarray:
    """load_BLRE int32 of the same process without drawing tokens: for batches of any length.

    A sequence of n tokens gives an expert a binomial count of its chance to be in the top-k,
    adjusted so that counts add up to n · K; correlation of neighbouring tokens is left out.
    """
    sequences = _make_sequences(config)
    num_micro_batches = int(sequences.micro_batch_S.max()) + 1
    shape = (num_micro_batches, config.num_layers, config.num_ranks, config.num_experts)
    load_BLRE = np.zeros(shape, np.int32)
    rng = np.random.default_rng([config.seed, 3])
    for layer, logit_SE in enumerate(_layer_logits(config, sequences)):
        chance_SE = top_k_chance(logit_SE, config.top_k)
        count_SE = _draw_counts(chance_SE, sequences.length_S, rng)
        np.add.at(load_BLRE[:, layer], (sequences.micro_batch_S, sequences.rank_S), count_SE)
    return load_BLRE


def top_k_chance(logit_SE: np.ndarray, top_k: int) -> np.ndarray:
    """Chance of each expert to be in the top-k of logit + Gumbel noise, rows summing to top_k.

    Expert e wins a place when its arrival, exponential of rate exp(logit), comes before a time
    x: chance 1 - exp(-x · exp(logit)). The time at which k arrivals are expected is bisected.
    """
    rate_SE = np.exp(logit_SE - logit_SE.max(-1, keepdims=True))
    if top_k == rate_SE.shape[-1]:
        return np.ones_like(rate_SE)
    low_S = np.full(rate_SE.shape[:-1], -30.0)
    high_S = np.full(rate_SE.shape[:-1], 60.0)
    for _ in range(60):
        middle_S = (low_S + high_S) / 2
        expected_S = -np.expm1(-np.exp(middle_S)[..., None] * rate_SE).sum(-1)
        low_S = np.where(expected_S < top_k, middle_S, low_S)
        high_S = np.where(expected_S < top_k, high_S, middle_S)
    chance_SE = -np.expm1(-np.exp(high_S)[..., None] * rate_SE)
    return chance_SE * (top_k / chance_SE.sum(-1, keepdims=True)).clip(max=1.0)


def _make_sequences(config: SyntheticConfig) -> _Sequences:
    """Lengths that fill the micro-batches exactly, their domains, and where each one goes."""
    rng = np.random.default_rng([config.seed, 0])
    total = config.num_micro_batches * config.tokens_per_micro_batch
    # A sequence longer than a micro-batch would leave the next one empty.
    longest = min(config.sequence_tokens[1], config.tokens_per_micro_batch)
    shortest = min(config.sequence_tokens[0], longest)
    median = np.sqrt(shortest * longest)
    draws = rng.lognormal(np.log(median), 1.0, size=total // shortest + 1)
    end_S = np.cumsum(np.clip(draws, shortest, longest).astype(np.int64))
    num_sequences = int(np.searchsorted(end_S, total)) + 1
    length_S = np.diff(np.minimum(end_S[:num_sequences], total), prepend=0)
    domain_S = rng.integers(config.num_domains, size=num_sequences)
    if config.order == "domain":
        domain_S = np.sort(domain_S)
    micro_batch_S = fill_micro_batches(length_S, config.tokens_per_micro_batch)
    rank_S = deal_to_ranks(length_S, micro_batch_S, config.num_ranks)
    return _Sequences(length_S, domain_S, micro_batch_S, rank_S)


def _layer_logits(config: SyntheticConfig, sequences: _Sequences) -> Iterator[np.ndarray]:
    """logit_SE of one layer after the other, float32."""
    rng = np.random.default_rng([config.seed, 1])
    num_micro_batches = int(sequences.micro_batch_S.max()) + 1

    def normal(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, config.num_experts), np.float32)

    for _ in range(config.num_layers):
        base_E = np.float32(rng.uniform(*config.base_spread)) * normal(1)[0]
        of_domain = np.float32(config.domain_spread) * normal(config.num_domains)
        drift_BE = np.float32(config.drift) * np.cumsum(normal(num_micro_batches), axis=0)
        sequence_spread = np.float32(rng.uniform(*config.sequence_spread))
        sequence_SE = sequence_spread * normal(len(sequences.length_S))
        yield (
            base_E
            + of_domain[sequences.domain_S]
            + drift_BE[sequences.micro_batch_S]
            + sequence_SE
        )


def _draw_ids(
    logit_SE: np.ndarray,
    length_S: np.ndarray,
    config: SyntheticConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """Top-k experts of each token. Arrivals with rate exp(logit): the k first are the top-k."""
    mean_SE = np.exp(-logit_SE)
    sequence_T = np.repeat(np.arange(len(length_S)), length_S)
    is_first_T = np.diff(sequence_T, prepend=-1) != 0
    ids_TK = np.empty((len(sequence_T), config.top_k), np.int64)
    last_E = np.zeros((1, config.num_experts), np.float32)
    for start in range(0, len(sequence_T), _TOKENS_PER_CHUNK):
        rows = slice(start, start + _TOKENS_PER_CHUNK)
        noise_TE = _persistent_noise(last_E, is_first_T[rows], config.persistence, rng)
        last_E = noise_TE[-1:]
        arrival_TE = noise_TE * mean_SE[sequence_T[rows]]
        ids_TK[rows] = _smallest(arrival_TE, config.top_k)
    return ids_TK


def _persistent_noise(
    last_E: np.ndarray, is_first_T: np.ndarray, persistence: float, rng: np.random.Generator
) -> np.ndarray:
    """Exponential noise_TE; each entry repeats the one above it with chance ``persistence``."""
    shape = (len(is_first_T), last_E.shape[1])
    noise_TE = np.concatenate([last_E, rng.standard_exponential(shape, np.float32)])
    keep_TE = rng.integers(0, 256, shape, np.uint8) < round(256 * persistence)
    keep_TE[is_first_T] = False
    age_TE = np.zeros(shape, np.int32)
    run_TE = keep_TE.copy()
    while run_TE.any():
        age_TE += run_TE
        # Kept once more when the entry above was kept that often, or is the last chunk's.
        run_TE[1:] = run_TE[:-1] & keep_TE[1:]
        run_TE[0] = False
    row_TE = np.arange(1, len(is_first_T) + 1, dtype=np.int32)[:, None] - age_TE
    return np.take_along_axis(noise_TE, row_TE, axis=0)


def _smallest(value_TE: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest values of each row, smallest first."""
    column_TK = np.argpartition(value_TE, k - 1, axis=1)[:, :k]
    order_TK = np.argsort(np.take_along_axis(value_TE, column_TK, axis=1), axis=1)
    return np.take_along_axis(column_TK, order_TK, axis=1)


def _draw_counts(
    chance_SE: np.ndarray, length_S: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Binomial counts whose rows sum to length · K, none above length.

    The surplus of the independent draws is taken back in proportion to how uncertain each is.
    """
    length_S1 = length_S[:, None]
    count_SE = rng.binomial(length_S1, chance_SE.clip(0, 1)).astype(np.float64)
    total_S = length_S * round(float(chance_SE[0].sum()))
    for _ in range(8):
        surplus_S = count_SE.sum(1) - total_S
        room_SE = np.where(surplus_S[:, None] > 0, count_SE, length_S1 - count_SE)
        give_SE = room_SE * chance_SE * (1 - chance_SE) + 1e-9 * room_SE
        share_SE = give_SE / give_SE.sum(1, keepdims=True).clip(1e-30)
        count_SE = np.clip(count_SE - surplus_S[:, None] * share_SE, 0, length_S1)
    # Rounding the running sum keeps the total and moves no count by one or more.
    running_SE = np.rint(np.cumsum(count_SE, axis=1))
    return np.diff(running_SE, axis=1, prepend=0).astype(np.int32)
