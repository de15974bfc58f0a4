"""The figures of ``balance.compare.report`` as text for people."""

from collections.abc import Sequence

from balance.compare.report import WORTH_IT, Row, TraceStats


def format_stats(stats: TraceStats) -> str:
    """What there is to gain, one line for each number of ranks."""
    lines = [
        stats.label,
        f"{stats.num_tokens:,} tokens, {stats.num_micro_batches} micro-batches, "
        f"{stats.num_layers} layers, {stats.num_experts} experts, top-{stats.top_k}",
        f"not counted: {stats.num_masked_rows:,} masked tokens, {stats.num_missing:,} missing ids",
        f"experts over the batch: Gini {stats.gini:.3f}, MaxVio {stats.max_violation:.2f}",
        "",
        f"{'ranks':>5} {'max/mean avg':>13} {'p95':>6} {'worst':>6} {'slowdown':>9} "
        f"{'of batch sums':>14}   balancing",
    ]
    if stats.all_zero_layers:
        lines.insert(3, f"WARNING: every id is 0 in layers {list(stats.all_zero_layers)}")
    for at in stats.ranks:
        verdict = "is worth it" if at.worth_it else f"gains too little (below {WORTH_IT})"
        lines.append(
            f"{at.num_ranks:>5} {at.imbalance_avg:>13.3f} {at.imbalance_p95:>6.3f} "
            f"{at.imbalance_worst:>6.3f} {at.slowdown:>9.3f} {at.batch_slowdown:>14.3f}   "
            f"{verdict}"
        )
    return "\n".join(lines)


def format_rows(rows: Sequence[Row]) -> str:
    """The comparison as a table in Markdown."""
    head = (
        "| method | max/mean avg | p95 | worst | efficiency | gap to bound | in tiles | "
        "copies | arrivals | seconds |"
    )
    lines = [head, "|---|" + "---:|" * 9]
    for row in rows:
        cells = [
            row.name,
            f"{row.imbalance_avg:.4f}",
            f"{row.imbalance_p95:.3f}",
            f"{row.imbalance_worst:.3f}",
            f"{row.efficiency:.3f}",
            f"{100 * row.gap:.2f} %",
            *(
                "" if value is None else f"{value:.{digits}f}"
                for value, digits in (
                    (row.tile_imbalance, 3),
                    (row.copies, 1),
                    (row.arrivals, 1),
                    (row.plan_seconds, 2),
                )
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
