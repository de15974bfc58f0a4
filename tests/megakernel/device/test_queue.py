"""How the last worker ends a launch: zeroed counters, and errors that reach the host whole."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megakernel.plan.protocol import Protocol
from tests.helpers import last_worker
from tests.helpers.race.grid import builder, replaced
from tests.helpers.race.weak.mutate import mutated
from tests.helpers.sources import ROOT
from tests.helpers.specs import PLAIN_SPEC

STALL = {Protocol.STALL_AT: [1, 14, 9, 0, 1, 8]}
BAD_ID = {Protocol.INPUT_AT: [1, 7, 0, 99]}
LEAVE, HAND_OVER = "megakernel.device.queue.leave", "megakernel.device.queue.hand_over"
RELEASE = 'tl.atomic_xchg(control.report + AT, flag, sem="release", scope="sys")'


def words_of(errors: dict[int, list[int]]) -> Tensor:
    """Return error words with some errors in them."""
    words = torch.zeros(Protocol.ERROR_WORDS, dtype=torch.int32)
    for at, values in errors.items():
        words[at : at + len(values)] = torch.tensor(values, dtype=torch.int32)
    return words


def leave(errors: dict[int, list[int]], report: Tensor, num_tiles: int = 8) -> Tensor:
    """End a launch that met some errors; return its counters."""
    error = words_of(errors)
    counters = leave_with(error, report, num_tiles)
    assert not error.any(), "the next launch would report them again"
    return counters


def leave_with(error: Tensor, report: Tensor, num_tiles: int = 8) -> Tensor:
    """End a launch that has these error words; return its counters."""
    control = last_worker.make_control(error, report)
    last_worker.last_worker[(1,)](control, 7, num_tiles, C=PLAIN_SPEC)
    return control.counters


def test_a_launch_without_errors_reports_nothing_and_zeroes_its_counters():
    report = words_of({})
    assert not leave({}, report).any() and not report.any()


@pytest.mark.parametrize("num_tiles", [0, 3, 8], ids=["gave up", "knew fewer", "knew all"])
def test_after_a_stall_every_counter_is_zero(num_tiles: int):
    """The last worker to leave may be one that never learned how many row tiles there are."""
    assert not leave(STALL, words_of({}), num_tiles).any()


@pytest.mark.parametrize(
    "errors", [STALL, BAD_ID, STALL | BAD_ID], ids=["stall", "bad id", "both"]
)
def test_errors_reach_an_empty_report(errors: dict[int, list[int]]):
    report = words_of({})
    leave(errors, report)
    schedule = {Protocol.SCHEDULE_AT: [7]} if Protocol.STALL_AT in errors else {}
    assert torch.equal(report, words_of(errors | schedule))


def test_an_error_that_the_host_has_not_read_stays():
    """A launch behind the one that reported it has errors of its own, also of the other kind."""
    report = words_of(STALL)
    leave({Protocol.STALL_AT: [1, 2, 3, 4, 5, 6]} | BAD_ID, report)
    assert torch.equal(report, words_of(STALL | BAD_ID))


@dataclass(frozen=True)
class Access:
    """What the last worker did to some words of the report, or a barrier of it."""

    what: str
    words: tuple[int, ...] = ()
    order: str = ""
    scope: str = ""


@contextmanager
def watched(watched_words: Tensor) -> Iterator[list[Access]]:
    """Write down what is done to some words, and the barriers."""
    seen: list[Access] = []

    def log(what: str, pointers: Any, mask: Any, *order: Any) -> None:
        places = pointers.data.ravel()[True if mask is None else mask.data.ravel()]
        first = watched_words.data_ptr()
        words = tuple(((places.astype(int) - first) // 4).ravel().tolist())
        if words and 0 <= min(words) <= max(words) < len(watched_words):
            seen.append(Access(what, words, *(one.name for one in order)))

    load, store = builder.create_masked_load, builder.create_masked_store
    change = builder.create_atomic_rmw

    def loading(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        log("load", pointers, mask)
        return load(pointers, mask, *rest, **named)

    def storing(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        log("store", pointers, mask)
        return store(pointers, value, mask, *rest)

    def changing(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        log(operation.name, pointers, mask, *rest)
        return change(operation, pointers, value, mask, *rest)

    hooks = {
        "create_masked_load": loading,
        "create_masked_store": storing,
        "create_atomic_rmw": changing,
        "create_barrier": lambda: seen.append(Access("barrier")),
    }
    with replaced(hooks):
        yield seen


def assert_flag_comes_last(at: int) -> None:
    """End a launch with both errors; refuse if one's words need not be there with its flag."""
    report = words_of({})
    with watched(report) as seen:
        leave(STALL | BAD_ID, report)
    box = set(range(at, at + Protocol.ERROR_WORDS // 2))
    touching = [
        place for place, one in enumerate(seen) if one.what != "ADD" and box & {*one.words}
    ]
    *stores, flag = touching
    assert stores and seen[flag] == Access("XCHG", (at,), "RELEASE", "SYSTEM"), "no release"
    for place in stores:
        assert seen[place].what == "store" and at not in seen[place].words, "the flag too early"
        assert Access("barrier") in seen[place:flag], "no barrier"


KINDS = pytest.mark.parametrize(
    "at", [Protocol.STALL_AT, Protocol.INPUT_AT], ids=["stall", "bad id"]
)


@KINDS
def test_the_flag_is_released_to_the_host_behind_its_words(at: int):
    assert_flag_comes_last(at)


WEAK = {
    "among them": ("too early", "(word > AT)", "(word >= AT)"),
    "before them": ("too early", "    belongs =", f"    {RELEASE}\n            belongs ="),
    "no barrier": ("no barrier", "            tl.debug_barrier()\n", ""),
    "relaxed": ("no release", 'flag, sem="release"', 'flag, sem="relaxed"'),
    "for the GPU alone": ("no release", 'flag, sem="release", scope="sys"', 'flag, sem="release"'),
    "stored": ("no release", RELEASE, "tl.store(control.report + AT, flag)"),
}  # fmt: skip


@KINDS
@pytest.mark.parametrize(("finding", "old", "new"), WEAK.values(), ids=WEAK)
def test_a_flag_that_may_come_first_is_refused(at: int, finding: str, old: str, new: str):
    with mutated(HAND_OVER, old, new), pytest.raises(AssertionError, match=finding):
        assert_flag_comes_last(at)


def assert_errors_are_read_by_all_before_they_go() -> None:
    """Warps read the words one by one: what one zeroes early, another would not act on."""
    error = words_of(STALL)
    with watched(error) as seen:
        leave_with(error, words_of({}))
    whats = [one.what for one in seen[: 1 + [one.what for one in seen].index("store")]]
    assert whats[-3:] == ["load", "barrier", "store"], whats


def test_errors_are_read_by_all_before_they_go():
    assert_errors_are_read_by_all_before_they_go()


def test_errors_that_go_too_early_are_refused():
    line = "            tl.debug_barrier()  # each warp"
    with mutated(LEAVE, line, "            # each warp"), pytest.raises(AssertionError):
        assert_errors_are_read_by_all_before_they_go()


def test_the_compiled_flag_is_a_release_to_the_system():
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.last_worker"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory = r"st\.global|bar\.sync|atom\.global\.\S*exch|ld\.global\.sys\.acquire"
    order = re.findall(memory, done.stdout)
    flag = "atom.global.sys.release.exch"
    assert order.count(flag) == order.count("ld.global.sys.acquire") == 2
    for _ in range(2):
        at = order.index(flag)
        before = order[:at]
        assert before[-1] == "bar.sync" and "st.global" in before[-3:]
        del order[: at + 1]
