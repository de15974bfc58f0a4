"""The kernel weakened on purpose: each change is one that a GPU may forgive for weeks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.helpers.race.mutate import mutated

DEVICE = "megakernel.device"

# A module and function, a text that it holds once, and what takes the text's place.
Edit = tuple[str, str, str]


@dataclass(frozen=True)
class Mutant:
    """One weakness, and what must notice it.

    Attributes:
        name: what is weakened; the test that kills it is ``test_mutant_is_refused[name]``.
        finding: what is said about it, a regular expression.
        edits: of device functions.
        launch: the watched launch that shows it, see launches.py.
        tasks_per_worker: 1, unless it takes a worker's second task to show; None for no limit.
        sampled: whether ``make test`` runs it.
    """

    name: str
    finding: str
    edits: tuple[Edit, ...]
    launch: str = "live"
    tasks_per_worker: int | None = 1
    sampled: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Weaken the kernel inside a ``with``."""
        with ExitStack() as stack:
            for place, old, new in self.edits:
                stack.enter_context(mutated(f"{DEVICE}.{place}", old, new))
            yield


UNSURE = "no wait is sure to see its signal"
EARLY = "its signal comes too early"
STALLS = "waited for counter"


def weak(name: str, function: str, old: str, new: str, reads: str, **more: object) -> Mutant:
    """Lower what a task waits for."""
    finding = f"reads .*{reads}.*{UNSURE}"
    return Mutant(name, finding, ((f"kernel.{function}", old, new),), **more)  # type: ignore


def first_in_wait(name: str, statement: str, **more: object) -> Mutant:
    """Start every wait with a statement."""
    edit = ("queue.wait", "    place =", f"    {statement}\n    place =")
    return Mutant(name, UNSURE, (edit,), **more)  # type: ignore


POLL = 'tl.atomic_add(place, 0, sem="acquire")\n    polls'
FFN1_SIGNAL = "                signal(control, C.first_tile_counter + tile, C)\n"
GATE_SIGNAL = "                signal(control, C.GATE_DONE, C)\n"
SCATTER_SIGNAL = "        signal(control, C.SCATTER_DONE, C)\n"
FFN2_SIGNAL = "            signal(control, C.FIRST_GROUP + group, C)\n"
PREFIX_SIGNAL = "            signal(control, C.PREFIX_DONE, C)\n"

WAITS = [
    first_in_wait("every awaited value is 1", "target = 1", sampled=True),
    first_in_wait("every awaited value is one less", "target = target - 1"),
    Mutant("a wait's loop ends one signal early", UNSURE,
           (("queue.wait", "while (seen < target)", "while (seen < target - 1)"),)),
    Mutant("a wait says too early that it is over", UNSURE,
           (("queue.wait", "return seen >= target", "return seen >= 1"),)),
    Mutant("a wait acquires nothing", UNSURE,
           (("queue.wait", POLL, POLL.replace("acquire", "relaxed")),)),
    Mutant("a wait polls with a load", "counters.*(no wait|changes)",
           (("queue.wait", POLL, "tl.load(place)\n    polls"),)),
    weak("prefix awaits one gate task less", "run_dispatch", "C.GATE_DONE, token_tiles, task",
         "C.GATE_DONE, token_tiles - 1, task", "base_GB", sampled=True),
    weak("scatter awaits one prefix task less", "run_dispatch",
         "C.PREFIX_DONE, C.prefix_blocks, task", "C.PREFIX_DONE, C.prefix_blocks - 1, task",
         "total_B"),
    weak("row tables await one scatter task less", "wait_for_tables",
         "C.SCATTER_DONE, token_tiles, task", "C.SCATTER_DONE, token_tiles - 1, task",
         "rows_of_tile"),
    weak("FFN2 awaits one block of I less", "run_tail", "counter, C.i_blocks, task",
         "counter, C.i_blocks - 1, task", "h_CI", sampled=True),
    weak("FFN2 awaits the row tile before its own", "run_tail", "C.first_tile_counter + tile",
         "C.first_tile_counter + max(tile - 1, 0)", "h_CI"),
    weak("combine awaits one row tile less", "run_tail", "num_tiles * C.group_blocks",
         "(num_tiles - 1) * C.group_blocks", "y_CH"),
    weak("combine awaits one block of H less", "run_tail", "num_tiles * C.group_blocks",
         "num_tiles * C.group_blocks - 1", "y_CH"),
    weak("combine awaits the first column group", "run_tail", "C.FIRST_GROUP + group, target",
         "C.FIRST_GROUP, target", "y_CH"),
    weak("combine of a replay awaits one gate task less", "run_tail",
         "C.GATE_DONE, token_tiles, task", "C.GATE_DONE, token_tiles - 1, task", "gate_TK",
         launch="replay"),
    weak("combine of a replay awaits no gate task", "run_tail", "if C.replay:", "if False:",
         "gate_TK", launch="replay", sampled=True),
    weak("combine of a replay awaits no token gate", "run_tail", "if C.replay:", "if False:",
         "sigmoid_T", launch="shared-replay"),
    weak("tables are awaited one task too late", "moe_kernel", "if task >= tables_from:",
         "if task > tables_from:", "rows_of_tile"),
    Mutant("tables are awaited by a worker's second task alone", f"rows_of_tile.*{UNSURE}",
           (("kernel.moe_kernel", "    while task <",
             "    tables_from = max(tables_from, task + 1)\n    while task <"),)),
]  # fmt: skip
SIGNALS = [
    Mutant("no barrier before a signal", "no barrier lies before its signal",
           (("queue.signal", "    tl.debug_barrier()\n", ""),), sampled=True),
    Mutant("a signal releases nothing", UNSURE,
           (("queue.signal", 'sem="release"', 'sem="relaxed"'),)),
    Mutant("a signal is for its own block alone", UNSURE,
           (("queue.signal", 'sem="release"', 'sem="release", scope="cta"'),)),
    Mutant("gate tasks signal twice", UNSURE,
           (("kernel.moe_kernel", GATE_SIGNAL, 2 * GATE_SIGNAL),)),
    Mutant("gate tasks signal before their stores", EARLY,
           (("kernel.moe_kernel", GATE_SIGNAL, ""),
            ("kernel.moe_kernel", "            elif kind == C.GATE:\n",
             "            elif kind == C.GATE:\n" + GATE_SIGNAL))),
    Mutant("prefix signals before its stores", EARLY,
           (("kernel.run_dispatch", PREFIX_SIGNAL, ""),
            ("kernel.run_dispatch", "            prefix_bins(",
             PREFIX_SIGNAL + "            prefix_bins("))),
    Mutant("scatter signals before its stores", EARLY,
           (("kernel.run_dispatch", SCATTER_SIGNAL, ""),
            ("kernel.run_dispatch", "        scatter_tile(",
             SCATTER_SIGNAL + "        scatter_tile("))),
    Mutant("FFN1 signals before its stores", EARLY,
           (("kernel.moe_kernel", FFN1_SIGNAL, ""),
            ("kernel.moe_kernel", "                tile += first\n",
             "                tile += first\n" + FFN1_SIGNAL)), sampled=True),
    Mutant("FFN2 signals before its stores", EARLY,
           (("kernel.run_tail", FFN2_SIGNAL, ""),
            ("kernel.run_tail", "            ffn2_of(", FFN2_SIGNAL + "            ffn2_of("))),
    Mutant("gate tasks do not signal", STALLS, (("kernel.moe_kernel", GATE_SIGNAL, ""),)),
    Mutant("prefix does not signal", STALLS, (("kernel.run_dispatch", PREFIX_SIGNAL, ""),)),
    Mutant("scatter does not signal", STALLS, (("kernel.run_dispatch", SCATTER_SIGNAL, ""),)),
    Mutant("FFN1 does not signal", STALLS, (("kernel.moe_kernel", FFN1_SIGNAL, ""),)),
    Mutant("FFN2 does not signal", STALLS, (("kernel.run_tail", FFN2_SIGNAL, ""),)),
    Mutant("row tiles share one counter", UNSURE,
           (("kernel.moe_kernel", "signal(control, C.first_tile_counter + tile, C)",
             "signal(control, C.first_tile_counter, C)"),
            ("kernel.run_tail", "C.first_tile_counter + tile", "C.first_tile_counter"))),
    Mutant("prefix and scatter share one counter", UNSURE,
           (("kernel.run_dispatch", "C.SCATTER_DONE, C)", "C.PREFIX_DONE, C)"),
            ("kernel.wait_for_tables", "C.SCATTER_DONE", "C.PREFIX_DONE"))),
]  # fmt: skip
ACCESSES = [
    Mutant("logits are read without a barrier", "logits_TE.*no barrier lies between",
           (("route.gate_tile", "        tl.debug_barrier()", "        pass"),), sampled=True),
    Mutant("first tiles are gathered without a barrier", "tile_start_GP.*no barrier lies between",
           (("dispatch.scatter_tile", "    tl.debug_barrier()", "    pass"),)),
    Mutant("choices are dropped without a barrier", "expert_of_TK.*no barrier lies between",
           (("dispatch.drop", "    tl.debug_barrier()", "    pass"),), launch="capacity"),
    Mutant("combine writes past the last token", "outside every tensor",
           (("ffn.combine_tile", "    live = token < num_tokens",
             "    live = token < num_tokens + 1"),)),
    Mutant("FFN1 writes rows that the next tile has", "h_CI.*writes|outside",
           (("ffn.ffn1_tile", "tile * C.block_rows + row, inside,",
             "tile * C.block_rows + row + 1, inside,"),)),
    Mutant("FFN2 reads rows that nobody filled", "h_CI.*nobody has written",
           (("ffn.ffn2_tile", "inside = row < num_rows", "inside = row <= num_rows"),)),
    Mutant("an FFN1 block is skipped", "h_CI.*nobody has written",
           (("kernel.moe_kernel", "                tile += first\n",
             "                tile += first\n                block = max(block, 1)\n"),)),
    Mutant("the last combine tile is skipped", "nobody wrote y_TH",
           (("kernel.run_tail", "        if ready:",
             "        if ready & (index * C.combine_tokens + C.combine_tokens < num_tokens):"),)),
    Mutant("gate tasks write the whole row of counts", "base_GB.*writes|outside",
           (("route.gate_tile", "mask=bin_index < C.num_bins",
             "mask=bin_index < C.num_bins + 1"),)),
]  # fmt: skip
ENDS = [
    Mutant("the counters are not reset", "is not zero at the end",
           (("queue.leave", "counter * C.COUNTER_STRIDE, 0, mask=counter < num_counters",
             "counter * C.COUNTER_STRIDE, 0, mask=counter < 0"),), sampled=True),
    Mutant("the last counter is not reset", "is not zero at the end",
           (("queue.leave", "mask=counter < num_counters", "mask=counter < num_counters - 1"),)),
    Mutant("the first worker to leave resets", "counters.*(no wait|changes)",
           (("queue.leave", "== num_workers - 1", "== 0"),)),
    Mutant("workers leave without order", "counters.*(no wait|changes)",
           (("queue.leave", 'sem="acq_rel"', 'sem="relaxed"'),)),
    Mutant("workers leave without release", "counters.*(no wait|changes)",
           (("queue.leave", 'sem="acq_rel"', 'sem="acquire"'),)),
    Mutant("workers leave without acquire", "counters.*(no wait|changes)",
           (("queue.leave", 'sem="acq_rel"', 'sem="release"'),)),
    Mutant("workers leave without a barrier", "no barrier lies before its signal",
           (("queue.leave", "    tl.debug_barrier()\n", ""),)),
]  # fmt: skip
MUTANTS = [*WAITS, *SIGNALS, *ACCESSES, *ENDS]
