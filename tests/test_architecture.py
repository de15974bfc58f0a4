"""docs/architecture.md keeps its word: its example is recomputed, its files and folders exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megakernel import Experts, KernelConfig, moe_routed
from megakernel.launch.workspace import Memory, workspace_for
from megakernel.plan.schedule import Schedule
from tests.helpers.sources import PACKAGES, ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()

# The page's example: 17 tokens of which three are routed, in tiles of 16.
T, K, H, I, E, TILE = 17, 2, 32, 32, 2, 16
CHOICES = {0: [0, 1], 1: [1, -1], 16: [1, 0]}
CONFIG = KernelConfig(
    num_workers=1, block_rows=TILE, block_i=16, block_h=16, step=16, block_tokens=TILE,
    block_experts=16, select_tokens=TILE, combine_tokens=TILE, column_groups=2,
)  # fmt: skip


def example_ids() -> Tensor:
    """Return expert_of_TK, -1 wherever the example has no choice."""
    expert_of_TK = torch.full((T, K), -1)
    for token, experts in CHOICES.items():
        expert_of_TK[token] = torch.tensor(experts)
    return expert_of_TK


def launch_example() -> Memory:
    """Return what a launch of the example leaves behind."""
    x_TH = torch.ones(T, H)
    experts = Experts(torch.ones(E, 2 * I, H), torch.ones(E, H, I))
    moe_routed(x_TH, example_ids(), torch.ones(T, K), experts, config=CONFIG)
    latest = workspace_for(x_TH.device).latest
    assert latest is not None
    return latest


def choice_table(memory: Memory) -> list[str]:
    """Write a line for each choice: where it is counted, and which row it gets."""
    rank_TK, base_GB = memory.scratch.rank_TK.tolist(), memory.scratch.base_GB.tolist()
    row_TK = memory.rows.row_of_TK.tolist()
    lines = ["token  k  assignment  expert | token tile  rank | base  ordinal |  row"]
    for token, experts in CHOICES.items():
        for k, expert in enumerate(experts):
            tile, rank, row = token // TILE, rank_TK[token][k], row_TK[token][k]
            start = f"{token:>5}  {k}  {token * K + k:>10}  {expert:>6} | {tile:>10}  {rank:>4} |"
            base = base_GB[tile][expert]
            placed = f" {base:>4}  {base + rank:>7} |" if expert >= 0 else " " * 15 + "|"
            lines.append(f"{start}{placed} {row:>4}")
    return lines


def row_tables(memory: Memory) -> list[str]:
    """Write the tables of counts and rows, a line each."""
    scratch, rows = memory.scratch, memory.rows
    num_tiles = int(scratch.num_tiles_1)
    counts_GB = torch.zeros(2, E, dtype=torch.int64)
    for token, experts in CHOICES.items():
        for expert in experts:
            counts_GB[token // TILE, expert] += expert >= 0
    filled = sorted(row for row in rows.row_of_TK.flatten().tolist() if row >= 0)
    assignments = ", ".join(f"row {row}: {int(rows.assignment_of_C[row])}" for row in filled)
    tables = {
        "counts, by route": counts_GB.tolist(),
        "base_GB, by prefix": scratch.base_GB.tolist(),
        "total_B, by prefix": scratch.total_B.tolist(),
        "expert_of_tile": rows.expert_of_tile[:num_tiles].tolist(),
        "rows_of_tile": rows.rows_of_tile[:num_tiles].tolist(),
        "assignment_of_C": assignments,
    }
    return [f"{name:<20}{values}" for name, values in tables.items()]


def words_of(schedule: Schedule, counter: int) -> str:
    """Name a counter without its number."""
    return re.sub(r"counter \d+ \((.*)\)", r"\1", schedule.describe_counter(counter))


def task_list(memory: Memory) -> list[str]:
    """Write a line for each task: id, what it is, what it waits for, what it signals."""
    schedule = Schedule(memory.schedule.spec, T, int(memory.scratch.num_tiles_1))
    rows = [("id", "task", "waits for", "signals")]
    for task_id, task in enumerate(schedule.tasks()):
        name = re.sub(r"task \d+ \((.*)\)", r"\1", schedule.describe_task(task_id))
        waits = (f"{least} {words_of(schedule, at)}" for at, least in schedule.waits(task_id))
        signal = schedule.signal(task)
        signals = "nobody" if signal is None else words_of(schedule, signal)
        rows.append((str(task_id), name, ", ".join(waits) or "nothing", signals))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{number:>{wide[0]}}  {name:<{wide[1]}}  {waits:<{wide[2]}}  {signals}"
        for number, name, waits, signals in rows
    ]


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    """What the page should say; written at once, since other launches use the same memory."""
    memory = launch_example()
    writers = (choice_table, row_tables, task_list)
    return {write.__name__: "\n".join(write(memory)) for write in writers}


@pytest.mark.parametrize("name", ["choice_table", "row_tables", "task_list"])
def test_the_example_is_what_a_launch_does(name: str, written: dict[str, str]) -> None:
    block = written[name]
    assert f"```text\n{block}\n```" in PAGE, f"the page should hold\n{block}"


def paths_named(page: str) -> Iterator[str]:
    """Yield each file or folder that a page names in a code span or links to."""
    yield from re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.\w+)?)`", page)
    yield from re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page)


def missing(page: str, folder: Path) -> list[str]:
    """Return the paths a page names that are in neither the repository nor its own folder."""
    return [
        name
        for name in paths_named(page)
        if not ((ROOT / name).exists() or (folder / name).exists())
    ]


def test_every_path_on_the_page_exists() -> None:
    assert len(list(paths_named(PAGE))) > 30
    assert missing(PAGE, ROOT / "docs") == []


def test_a_path_that_is_not_there_is_seen() -> None:
    page = "`perf/` and `perf/nothing.py`, [one](planner.md), [two](nothing.md), `x/y` is no path"
    assert missing(page, ROOT / "docs") == ["perf/nothing.py", "nothing.md"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
    assert [name for name in links if not (page.parent / name).exists()] == []


def drawn(package: str) -> dict[str, list[str]]:
    """Return the folders in the page's picture of a package, and the modules named in each."""
    picture = re.search(rf"^```text\n{package}/\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert picture, f"no picture of {package}"
    beside = re.findall(r"^  (\w+)  ", picture[1], re.MULTILINE)
    rooms = re.findall(r"^  (\w+)/.*\n((?:   +.*\n)*)", picture[1], re.MULTILINE)
    return {".": beside} | {room: modules.split() for room, modules in rooms}


@pytest.mark.parametrize("package", [*PACKAGES, "perf", "tests"])
def test_the_pictures_show_all_rooms_and_no_module_that_is_not_there(package: str) -> None:
    pictured = drawn(package)
    rooms = {path.parent.name for path in (ROOT / package).glob("*/*.py")}
    assert set(pictured) == rooms | {"."}
    modules = {f"{package}/{room}/{name}.py" for room, names in pictured.items() for name in names}
    assert {name for name in modules if not (ROOT / name).exists()} == set()
