"""The pages of the adapters keep their word."""

from pathlib import Path

import pytest

from tests.helpers.sources import ROOT
from tests.test_docs import blocks, run_python

PAGES = sorted((ROOT / "docs").glob("*.md"))
RUNNABLE = [page for page in PAGES if list(blocks("python", page.read_text()))]


QUICK = {"training", "planner"}


@pytest.mark.parametrize(
    "page",
    [page if page.stem in QUICK else pytest.param(page, marks=pytest.mark.slow)
     for page in RUNNABLE],
    ids=lambda page: page.stem,
)  # fmt: skip
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path) -> None:
    done = run_python(list(blocks("python", page.read_text())), tmp_path)
    assert done.returncode == 0, done.stderr


def test_each_adapter_has_a_page_that_says_what_was_tried() -> None:
    adapters = {"transformers", "megatron", "torchtitan"}
    pages = {page.stem: page.read_text() for page in PAGES}
    assert adapters <= set(pages)
    assert {name for name in adapters if "**not tried, unmeasured**" not in pages[name]} == set()
