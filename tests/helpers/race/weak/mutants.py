"""The kernel weakened on purpose: each change is one that a GPU may forgive for weeks."""

from tests.helpers.race.weak.backward import BACKWARD
from tests.helpers.race.weak.mutant import (
    COMBINE,
    DISPATCH,
    FFN,
    KERNEL,
    ORDER,
    QUEUE,
    ROUTE,
    UNWRITTEN,
    Mutant,
    edited,
)
from tests.helpers.race.weak.order import (
    ORDERED,
    PLACE,
    SIGNAL_TASK,
    SIGNALS,
    WAIT,
    WAITS,
    WORK,
    twice,
)

UNORDERED = "no barrier lies between"
NO_BARRIER = ("    tl.debug_barrier()", "    pass")

ACCESSES = [
    edited("logits are read without a barrier", f"logits_TE.*{UNORDERED}", f"{ROUTE}.route_tile",
           *NO_BARRIER, sampled=True),
    edited("first tiles are gathered without a barrier", f"tile_start_GP.*{UNORDERED}",
           f"{DISPATCH}.scatter_tile", *NO_BARRIER),
    edited("choices are dropped without a barrier", f"expert_of_TK.*{UNORDERED}",
           f"{DISPATCH}.drop", *NO_BARRIER, launch="capacity"),
    edited("combine goes past the last token", "outside every tensor", f"{COMBINE}.combine_tile",
           "exists = token < size.num_tokens", "exists = token < size.num_tokens + 1"),
    edited("FFN1 writes rows that the next tile has", "h_CI.*writes|outside", f"{FFN}.store_h",
           "tile * C.block_rows + tl", "tile * C.block_rows + 1 + tl"),
    edited("scatter leaves a row out", f"assignment_of_C.*{UNWRITTEN}", f"{DISPATCH}.place_tokens",
           "assignment_of_C + row, assignment, mask=placed",
           "assignment_of_C + row, assignment, mask=placed & (row != 1)"),
    edited("an FFN1 task leaves its last block out", f"h_CI.*{UNWRITTEN}", f"{ORDER}.ffn1_end_of",
           "C.i_blocks)", "C.i_blocks) - 1", launch="wide"),
    edited("an FFN2 task goes on in the next column group", "y_CH.*writes", f"{ORDER}.ffn2_end_of",
           "(group + 1) * C.group_blocks", "(group + 2) * C.group_blocks", launch="wide"),
    edited("a low tile is read to its full height", f"h_CI.*{UNWRITTEN}", f"{FFN}.ffn2_tile",
           "inside = row <", "inside = row <=", launch="half-tails"),
    edited("FFN2 reads rows that nobody filled", f"h_CI.*{UNWRITTEN}", f"{FFN}.ffn2_tile",
           "inside = row <", "inside = row <="),
    edited("an FFN1 block is skipped", f"h_CI.*{UNWRITTEN}", KERNEL, WORK,
           f"        if kind == C.FFN1:\n            block = max(block, 1)\n{WORK}"),
    edited("a row tile's FFN2 is skipped", f"y_CH.*{UNWRITTEN}", KERNEL,
           "ffn2_tile(tile, block, content, down", "None if tile == 0 else "
           "ffn2_tile(tile, block, content, down"),
    edited("the last combine tile is skipped", "nobody wrote .*y_TH", KERNEL,
           "            combine_tile(",
           "            if (tile + 1) * C.combine_tokens < num_tokens:\n"
           "                combine_tile("),
    edited("route tasks write the whole row of counts", "base_GB.*writes|outside",
           f"{ROUTE}.route_tile", "mask=bin_index < C.num_bins",
           "mask=bin_index < C.num_bins + 1"),
    edited("blocks of bins overlap", "base_GB.*(reads|writes)", f"{DISPATCH}.prefix_bins",
           "block * C.PREFIX_BINS +", "block * (C.PREFIX_BINS - 1) +"),
    edited("scatter tasks write one another's table", "(rows|expert)_of_tile.*writes",
           f"{DISPATCH}.scatter_tile", "fill_tile_table(tile * share,", "fill_tile_table(0,"),
    edited("scatter tasks share one copy of first tiles", "tile_start_GP.*writes",
           f"{DISPATCH}.scatter_tile", "tile.to(tl.int64) * C.slots_pad", "tile.to(tl.int64) * 0"),
    edited("every scatter task writes the row tiles", "num_tiles_1.*writes",
           f"{DISPATCH}.scatter_tile", "if tile == 0:", "if tile >= 0:"),
    edited("all tasks keep their times in one place", "times.*writes", f"{QUEUE}.stamp",
           "(task + 1).to(tl.int64) * C.NUM_TIMES", "C.NUM_TIMES", launch="timed-replay"),
]  # fmt: skip
RESET = "counter * C.COUNTER_STRIDE, 0, mask=counter < num_counters"
LEAVE = f"{QUEUE}.leave"
UNORDERED_EXIT = "counters.*(no wait|changes)"
ENDS = [
    edited("a claim is a load and a store", "counters.*(no wait|changes|signals nothing)",
           f"{QUEUE}.claim",
           'return tl.atomic_add(control.counters + C.CLAIM * C.COUNTER_STRIDE, 1, sem="relaxed")',
           "place = control.counters + C.CLAIM * C.COUNTER_STRIDE\n    task = tl.load(place)\n"
           "    tl.store(place, task + 1)\n    return task"),
    edited("the counters are not reset", "is not zero at the end", LEAVE, RESET,
           RESET.replace("num_counters", "0"), sampled=True),
    edited("the last counter is not reset", "is not zero at the end", f"{ORDER}.count_counters",
           "* size.num_tiles", "* size.num_tiles - 1"),
    edited("the first worker to leave resets", UNORDERED_EXIT, LEAVE, "== num_workers - 1",
           "== 0"),
    edited("workers leave without order", UNORDERED_EXIT, LEAVE, 'sem="acq_rel"',
           'sem="relaxed"'),
    edited("workers leave without release", UNORDERED_EXIT, LEAVE, 'sem="acq_rel"',
           'sem="acquire"'),
    edited("workers leave without acquire", UNORDERED_EXIT, LEAVE, 'sem="acq_rel"',
           'sem="release"'),
    edited("workers leave without a barrier", "no barrier lies before its signal", LEAVE,
           "    tl.debug_barrier()\n", ""),
]  # fmt: skip
MUTANTS: list[Mutant] = [*ORDERED, *WAITS, *SIGNALS, *ACCESSES, *ENDS, *BACKWARD]

# Other ways to do it right, which the check must not refuse: no mutants, so nothing is found.
HARMLESS = [
    Mutant("tasks signal twice, and are awaited twice", "", (
        (SIGNAL_TASK, *twice("            signal(b.control, counter, C)\n")),
        (WAIT, PLACE, f"{PLACE}    least = 2 * least\n"),
    )),
]  # fmt: skip


def table() -> str:
    """Return the mutants as the rows that docs/race-check.md holds."""
    lines = ["| weakness | in | launch | in `make test` |", "|---|---|---|---|"]
    for mutant in MUTANTS:
        places = ", ".join(f"`{place}`" for place in mutant.places)
        sampled = "yes" if mutant.sampled else ""
        lines.append(f"| {mutant.name} | {places} | {mutant.launch} | {sampled} |")
    return "\n".join(lines)
