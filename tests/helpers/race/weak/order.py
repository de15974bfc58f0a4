"""Weaknesses of the order: what is awaited, what is signalled, and when."""

from tests.helpers.race.weak.mutant import (
    EARLY,
    KERNEL,
    ORDER,
    QUEUE,
    STALLS,
    UNSURE,
    Mutant,
    edited,
    weak,
)

WAIT_OF, TABLE_WAIT_OF, SIGNAL_OF = (
    f"{ORDER}.{name}" for name in ("wait_of", "table_wait_of", "signal_of")
)
WAIT, READY, SIGNAL, SIGNAL_TASK = (
    f"{QUEUE}.{name}" for name in ("wait", "ready_task", "signal", "signal_task")
)
PLACE = "    place = control.counters + counter * C.COUNTER_STRIDE\n"
POLL = 'tl.atomic_add(place, 0, sem="acquire")\n    polls'
POLL_AGAIN = 'tl.atomic_add(place, 0, sem="acquire")\n        polls'
RELEASE = 'tl.atomic_add(control.counters + counter * C.COUNTER_STRIDE, 1, sem="release")'
INCREMENT = """place = control.counters + counter * C.COUNTER_STRIDE
    tl.store(place, tl.load(place) + 1)"""
WORK = "        # Comparisons of order between"
SAY_SO = "        signal_task(kind, tile, block, b, C)\n"

ORDERED = [
    Mutant("every awaited value of the order is 1", UNSURE, (
        (WAIT_OF, "return counter, least", "return counter, tl.where(least > 0, 1, 0)"),
        (TABLE_WAIT_OF, "return counter, size.token_tiles", "return counter, 1"),
    ), sampled=True),
    weak("FFN2 awaits nothing", "tl.where(is_ffn2, ffn1_tasks, least)",
         "tl.where(is_ffn2, 0, least)", "h_CI", sampled=True),
    edited("route tasks do not signal", STALLS, SIGNAL_OF, "C.ROUTE, C.ROUTE_DONE, -1",
           "C.ROUTE, -1, -1", sampled=True),
]  # fmt: skip
WAITS = [
    edited("every awaited value is 1", UNSURE, WAIT, PLACE, f"{PLACE}    least = 1\n",
           sampled=True),
    edited("every awaited value is one less", UNSURE, WAIT, PLACE,
           f"{PLACE}    least = least - 1\n"),
    edited("a wait's loop ends one signal early", UNSURE, WAIT, "while (seen < least)",
           "while (seen < least - 1)"),
    edited("a wait says too early that it is over", UNSURE, WAIT, "return seen >= least",
           "return seen >= 1"),
    edited("a wait's first poll acquires nothing", UNSURE, WAIT, POLL,
           POLL.replace("acquire", "relaxed")),
    edited("a wait's later polls acquire nothing", UNSURE, WAIT, POLL_AGAIN,
           POLL_AGAIN.replace("acquire", "relaxed"), polls_fail=True, sampled=True),
    edited("a wait polls with a load", "counters.*(no wait|changes)", WAIT, POLL,
           "tl.load(place)\n    polls"),
    edited("no task waits for anything but tables", UNSURE, READY, "if least > 0:",
           "if least < 0:"),
    edited("first waits are skipped", UNSURE, READY, "static_range(NUMBERS)",
           "static_range(1, NUMBERS)"),
    edited("second waits are skipped", f"gate_TK.*{UNSURE}", READY, "static_range(NUMBERS)",
           "static_range(1)", launch="replay"),
    edited("row tiles are counted without a wait", f"num_tiles_1.*{UNSURE}",
           f"{QUEUE}.count_made_tiles",
           "if wait(b.control, counter, least, task, size.num_tiles, max_polls, C):",
           "if counter >= 0:"),
    weak("prefix awaits one route task less", "C.makes_rows, token_tiles, 0",
         "C.makes_rows, token_tiles - 1, 0", "base_GB", sampled=True),
    weak("scatter awaits one prefix task less", "C.makes_rows, C.prefix_blocks, least",
         "C.makes_rows, C.prefix_blocks - 1, least", "total_B"),
    weak("scatter awaits route tasks", "C.PREFIX_DONE, C.ROUTE_DONE", "C.ROUTE_DONE, C.ROUTE_DONE",
         "total_B"),
    edited("row tables await one scatter task less", f"rows_of_tile.*{UNSURE}", TABLE_WAIT_OF,
           "return counter, size.token_tiles",
           "return counter, size.token_tiles - 1"),
    edited("row tables await more than comes", STALLS, TABLE_WAIT_OF, "C.SCATTER_DONE",
           "C.PREFIX_DONE"),
    weak("FFN2 awaits one FFN1 task less", "tl.where(is_ffn2, ffn1_tasks, least)",
         "tl.where(is_ffn2, ffn1_tasks - 1, least)", "h_CI"),
    weak("FFN2 awaits one FFN1 task of several blocks less", "ffn1_tasks_of(size, C), C.i_blocks",
         "ffn1_tasks_of(size, C) - 1, C.i_blocks", "h_CI", launch="wide"),
    weak("the combine awaits no more of the last column group than of the first",
         "ffn2_tasks_of(block, size, C)", "ffn2_tasks_of(0, size, C)", "y_CH", launch="wide"),
    weak("FFN2 awaits the row tile before its own", "C.first_tile_counter + tile",
         "C.first_tile_counter + max(tile - 1, 0)", "h_CI"),
    weak("FFN2 of the shared expert awaits nothing",
         "(kind == C.FFN2) | ((kind == C.SHARED_FFN2) & C.has_shared)",
         "kind == C.FFN2", "h_CI", launch="shared"),
    weak("combine awaits nothing", "(kind == C.COMBINE) & C.has_ffn", "kind < 0", "y_CH"),
    weak("combine awaits one row tile less", "size.num_tiles * ffn2_tasks_of",
         "(size.num_tiles - 1) * ffn2_tasks_of", "y_CH"),
    weak("combine awaits one FFN2 task less", "size.num_tiles * ffn2_tasks_of",
         "-1 + size.num_tiles * ffn2_tasks_of", "y_CH"),
    weak("combine awaits the first column group", "C.FIRST_COLUMN_GROUP + block",
         "C.FIRST_COLUMN_GROUP", "y_CH"),
    weak("combine of a replay awaits one route task less", "tl.where(late, token_tiles, 0)",
         "tl.where(late, token_tiles - 1, 0)", "gate_TK", launch="replay"),
    weak("combine of a replay awaits no route task", "(kind >= C.COMBINE) & C.weighs_late",
         "kind < 0", "gate_TK", launch="replay", sampled=True),
    weak("combine of a replay awaits no token gate", "(kind >= C.COMBINE) & C.weighs_late",
         "kind < 0", "sigmoid_T", launch="shared-replay"),
    edited("tables are awaited one task too late", f"rows_of_tile.*{UNSURE}", KERNEL,
           "task >= tables_from:", "task > tables_from:"),
    edited("tables are awaited by a worker's second task alone", f"rows_of_tile.*{UNSURE}", KERNEL,
           "    while task <", "    tables_from = max(tables_from, task + 1)\n    while task <"),
]  # fmt: skip


def early(kind: str, **more: object) -> Mutant:
    """Let tasks of a kind signal before their work."""
    edits = (
        (KERNEL, WORK, f"        if kind == C.{kind}:\n    {SAY_SO}{WORK}"),
        (KERNEL, f"C)\n{SAY_SO}", f"C)\n        if kind != C.{kind}:\n    {SAY_SO}"),
    )
    task = "{} of the shared expert" if kind.startswith("SHARED_") else "{}"
    name = f"{task.format(kind.removeprefix('SHARED_'))} signals before its stores"
    return Mutant(name, EARLY, edits, **more)  # type: ignore[arg-type]


def silent(name: str, old: str, new: str, **more: object) -> Mutant:
    """Let tasks of a kind not signal."""
    return edited(f"{name} does not signal", STALLS, SIGNAL_OF, old, new, **more)


def shared_counter(name: str, signal: tuple[str, str], wait: tuple[str, str, str]) -> Mutant:
    """Let two groups of tasks signal on one counter, and be awaited there."""
    return Mutant(name, UNSURE, ((SIGNAL_OF, *signal), wait))


def twice(statement: str) -> tuple[str, str]:
    """Return the edit that doubles a statement."""
    return statement, 2 * statement


TILE = "C.first_tile_counter + tile"
GROUP = "C.FIRST_COLUMN_GROUP + block"
SIGNALS = [
    edited("no barrier before a signal", "no barrier lies before its signal", SIGNAL,
           "    tl.debug_barrier()\n", "", sampled=True),
    edited("a signal releases nothing", UNSURE, SIGNAL, 'sem="release"', 'sem="relaxed"'),
    edited("a signal is for its own block alone", UNSURE, SIGNAL, 'sem="release"',
           'sem="release", scope="cta"'),
    edited("a signal is a load and a store", "counters.*(no wait|changes|signals nothing)", SIGNAL,
           RELEASE, INCREMENT),
    edited("tasks signal twice", UNSURE, SIGNAL_TASK,
           *twice("            signal(b.control, counter, C)\n")),
    edited("no task signals", STALLS, SIGNAL_TASK, "if counter >= 0:", "if counter < -1:"),
    early("ROUTE"),
    early("PREFIX"),
    early("SCATTER"),
    early("FFN1", sampled=True),
    early("FFN2"),
    early("SHARED_FFN1", launch="shared"),
    early("SHARED_FFN2", launch="shared"),
    silent("prefix", "C.PREFIX, C.PREFIX_DONE, counter", "C.PREFIX, counter, counter"),
    silent("scatter", "C.SCATTER, C.SCATTER_DONE, counter", "C.SCATTER, counter, counter"),
    silent("FFN1", f"is_ffn1, {TILE}, counter", "is_ffn1, counter, counter"),
    silent("FFN2", "is_ffn2, C.FIRST_COLUMN_GROUP + block // C.group_blocks, counter",
           "is_ffn2, counter, counter"),
    silent("FFN1 of the shared expert",
           "(kind == C.FFN1) | ((kind == C.SHARED_FFN1) & C.has_shared)",
           "kind == C.FFN1", launch="shared"),
    silent("FFN2 of the shared expert",
           "(kind == C.FFN2) | ((kind == C.SHARED_FFN2) & C.has_shared)",
           "kind == C.FFN2", launch="shared"),
    shared_counter("row tiles share one counter", (TILE, "C.first_tile_counter"),
                   (WAIT_OF, TILE, "C.first_tile_counter")),
    shared_counter("the first row tile shares the last column group's counter",
                   (TILE, f"{TILE} - 1"), (WAIT_OF, TILE, f"{TILE} - 1")),
    shared_counter("column groups share one counter",
                   (f"{GROUP} // C.group_blocks", "C.FIRST_COLUMN_GROUP"),
                   (WAIT_OF, GROUP, "C.FIRST_COLUMN_GROUP")),
    shared_counter("prefix and scatter share one counter", ("C.SCATTER_DONE", "C.PREFIX_DONE"),
                   (TABLE_WAIT_OF, "C.SCATTER_DONE", "C.PREFIX_DONE")),
]  # fmt: skip
