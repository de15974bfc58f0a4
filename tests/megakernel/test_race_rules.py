"""Each rule of the race check alone: what it refuses in a toy kernel, and what it lets pass."""

import re
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from tests.helpers.race import toy
from tests.helpers.race.events import RaceError
from tests.helpers.race.weak.mutate import mutated

TOY = "tests.helpers.race.toy"
# A function of the toy, a text that it holds once, and what takes the text's place.
Edit = tuple[str, str, str]

UNSURE = "no wait is sure to see its signal"


@dataclass(frozen=True)
class Rule:
    """What one change makes of a good kernel, and what is said of it.

    ``good`` are edits that keep the kernel right though they come close to what ``bad`` does.
    """

    name: str
    finding: str
    bad: tuple[Edit, ...]
    good: tuple[Edit, ...] = field(default=())


WRITE = "tl.store(handed + worker * 16 + lane, lane)"
SAY_SO = "        signal(counters, 0)\n    if worker == 2"
TWICE = ("relay", SAY_SO, f"        signal(counters, 0)\n{SAY_SO}")
BETWEEN = "        tl.debug_barrier()\n        tl.store(out"
TURN_AWAITED = "        if worker == 1:\n            await_(counters, 2, 1)\n"
TURN_SIGNALLED = "        if worker == 0:\n            signal(counters, 2)\n"
SHARED_PLACE = ("relay", "handed + 16 + lane", "handed + lane")
RELEASE = 'sem="release"'
FIRST_POLL = 'sem="acquire")\n    polls'

RULES = [
    Rule("a wait for less than comes", rf"reads handed.*{UNSURE}.*counter 0, 1 of 2",
         (("relay", "await_(counters, 0, 2)", "await_(counters, 0, 1)"),)),
    Rule("more signals than are awaited", rf"reads handed.*{UNSURE}.*counter 0, 2 of 4",
         (TWICE,), (TWICE, ("relay", "await_(counters, 0, 2)", "await_(counters, 0, 4)"))),
    Rule("a missing signal", "reads handed.* it signals nothing",
         (("relay", SAY_SO, "    if worker == 2"),)),
    Rule("a missing wait", rf"reads handed.*{UNSURE}",
         (("relay", "        await_(counters, 0, 2)\n", ""),)),
    Rule("a signal before the stores", "reads handed.*its signal comes too early",
         (("relay", SAY_SO, "    if worker == 2"),
          ("relay", WRITE, f"signal(counters, 0)\n        {WRITE}"))),
    Rule("no barrier before a signal", "no barrier lies before its signal",
         (("signal", "    tl.debug_barrier()\n", ""),)),
    Rule("a relaxed signal", rf"reads handed.*it signals nothing|{UNSURE}",
         (("signal", RELEASE, 'sem="relaxed"'),), (("signal", RELEASE, 'sem="acq_rel"'),)),
    Rule("a signal to its own block", rf"reads handed.*it signals nothing|{UNSURE}",
         (("signal", RELEASE, f'{RELEASE}, scope="cta"'),),
         (("signal", RELEASE, f'{RELEASE}, scope="sys"'),)),
    Rule("a relaxed poll", rf"reads handed.*{UNSURE}",
         (("await_", FIRST_POLL, FIRST_POLL.replace("acquire", "relaxed")),),
         (("await_", FIRST_POLL, FIRST_POLL.replace("acquire", "acq_rel")),)),
    Rule("a poll of its own block", rf"reads handed.*{UNSURE}",
         (("await_", FIRST_POLL, 'sem="acquire", scope="cta")\n    polls'),)),
    Rule("a poll that loads", "reads counters",
         (("await_", 'tl.atomic_add(counters + COUNTER * 32, 0, sem="acquire")\n    polls',
           "tl.load(counters + COUNTER * 32)\n    polls"),)),
    Rule("a value that is never compared", rf"reads handed.*{UNSURE}",
         (("await_", "(seen < least) & (polls < 9)", "polls < 0"),),
         (("await_", "(seen < least)", "(least > seen)"),)),
    Rule("two writers", rf"writes handed\[0\], which .* writes: {UNSURE}",
         (("relay", WRITE, "tl.store(handed + lane, lane)"), SHARED_PLACE),
         (("relay", WRITE, f"pass\n{TURN_AWAITED}        tl.store(handed + lane, lane)\n"
           f"{TURN_SIGNALLED}"), SHARED_PLACE)),
    Rule("an overwrite that does not await the reader",
         rf"worker 3 .*writes handed\[0\], which worker 2 .*reads: {UNSURE}",
         (("relay", "        await_(counters, 1, 1)\n", ""),)),
    Rule("a read of what nobody wrote", r"reads handed\[32\], which nobody has written",
         (("relay", "handed + 16 + lane", "handed + 17 + lane"),)),
    Rule("an output that nobody wrote", r"nobody wrote out\[15\]",
         (("relay", "tl.load(own + 15 - lane))", "tl.load(own + 15 - lane), mask=lane < 15)"),)),
    Rule("no barrier inside a task", r"reads own\[.*no barrier lies between",
         (("relay", BETWEEN, "        tl.store(out"),)),
    Rule("no barrier before an overwrite", r"writes own\[.*no barrier lies between",
         (("relay", "        signal(counters, 1)", "        tl.store(own + lane, lane)\n"
           "        signal(counters, 1)"),),
         (("relay", BETWEEN, "        tl.store(own + lane, lane)\n" + BETWEEN),)),
    Rule("one store that writes a place twice", r"one store writes handed\[0\] 2 times",
         (("relay", WRITE, "tl.store(handed + worker * 16 + lane // 2, lane)"),)),
    Rule("an access outside", "worker 0 .* outside every tensor",
         (("relay", WRITE, "tl.store(handed + 9999 + lane, lane)"),)),
    Rule("a descriptor that reads what was stored", "through a descriptor",
         (("relay", "tl.store(own + lane, total)",
           "tl.store(own + lane, total)\n        box = tl.make_tensor_descriptor("
           "own, [16], [1], [16])\n        tl.debug_barrier()\n        total += box.load([0])"),)),
]  # fmt: skip


def assert_relay_clean(edits: tuple[Edit, ...]) -> None:
    """Watch the relay with some edits."""
    with ExitStack() as stack:
        for name, old, new in edits:
            stack.enter_context(mutated(f"{TOY}.{name}", old, new))
        toy.assert_toy_clean(lambda: toy.relay, num_workers=4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_breaks_a_rule_is_refused(rule: Rule) -> None:
    with pytest.raises(RaceError) as refusal:
        assert_relay_clean(rule.bad)
    findings = refusal.value.findings
    assert any(re.search(rule.finding, finding) for finding in findings), findings


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.good], ids=lambda rule: rule.name)
def test_what_comes_close_to_it_passes(rule: Rule) -> None:
    assert_relay_clean(rule.good)


def test_the_relay_passes() -> None:
    assert_relay_clean(())


@pytest.mark.parametrize(("workers", "tasks"), [(1, None), (2, 1), (1, 2)])
def test_tasks_that_wait_pass_however_they_are_dealt(workers: int, tasks: int | None) -> None:
    toy.assert_toy_clean(lambda: toy.queue, workers, tasks)


@pytest.mark.parametrize(("workers", "tasks"), [(1, None), (2, 1), (1, 2)])
def test_that_one_worker_had_both_tasks_orders_nothing(workers: int, tasks: int | None) -> None:
    no_wait = mutated(f"{TOY}.queue", "            await_(counters, 0, 1)\n", "")
    with no_wait, pytest.raises(RaceError, match=rf"task 1 reads handed.*task 0 writes: {UNSURE}"):
        toy.assert_toy_clean(lambda: toy.queue, workers, tasks)
