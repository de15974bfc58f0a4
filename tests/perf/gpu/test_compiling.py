"""Kernels compiled ahead are those that a launch looks for; what does not compile is told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perf.gpu.archive import pack, unpack_cache
from perf.gpu.child import Context
from perf.gpu.compiling import SOURCES, compile_for, list_calls, name_of
from perf.gpu.plans import PLANS
from tests.helpers.driver.stand_in import CC, build
from tests.helpers.sources import ROOT

AHEAD = """
import json
from perf.gpu.compiling import compile_or_say
from perf.gpu.recording import recording
from tests.helpers.driver import calls
with recording() as found:
    for call in calls.CALLS:
        call()
print(json.dumps([compile_or_say(call) for call in found]))
"""
LAUNCH = """
from tests.helpers.driver import calls
calls.stand_in()
for call in calls.CALLS:
    call()
"""


def compiled(cache: Path) -> set[Path]:
    """Return the folders of the kernels, and of the launchers that Triton 3.6 compiles."""
    found = [*cache.glob("*/moe_kernel.cubin"), *cache.glob("*/__triton_launcher*.so")]
    return {path.parent for path in found}


@pytest.mark.slow
@pytest.mark.skipif(CC is None, reason="needs a C compiler for the driver's stand-in")
def test_a_launch_finds_what_was_compiled_ahead_also_after_a_move(tmp_path: Path) -> None:
    environment = build(tmp_path, Path(os.devnull)) | {"RECORD_PARAMETERS": "0"}

    def run(code: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, cwd=ROOT, env=environment, text=True)

    assert json.loads(run(AHEAD)) == [["", ""]] * 3
    cache = tmp_path / "cache"
    kernels = compiled(cache)
    assert len(kernels) >= 3
    run(LAUNCH)
    assert compiled(cache) == kernels
    (tmp_path / "work").mkdir()
    pack(tmp_path / "a.tgz", tmp_path / "work", cache)
    shutil.rmtree(cache)
    moved = tmp_path / "elsewhere" / "cache"
    unpack_cache(tmp_path / "a.tgz", moved)
    environment["TRITON_CACHE_DIR"] = str(moved)
    run(LAUNCH)
    assert {path.name for path in compiled(moved)} == {path.name for path in kernels}
    assert not list(moved.glob("*/moe_kernel.ttir"))  # of a kernel that was compiled again


def test_every_run_has_its_sources() -> None:
    assert set(SOURCES) == set(PLANS)


def test_a_source_is_a_function_that_returns_calls(tmp_path: Path) -> None:
    said: list[str] = []
    context = Context(tmp_path, tmp_path)
    object.__setattr__(context, "say", said.append)
    calls = list_calls(context, ("perf.gpu.timing:calls",))
    assert len(calls) >= 8 and said[0].startswith(f"perf.gpu.timing:calls: {len(calls)} calls")
    assert name_of(calls[0]) == "layer live one bfloat16 EHI 128x2048x768 rows128 groups2"


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_named_and_the_others_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    context = Context(tmp_path, tmp_path, rehearse=True, fault="compile")
    with pytest.raises(RuntimeError, match="1 of 2 kernels do not compile, first layer live one"):
        compile_for(context, "first")
    assert len(compiled(tmp_path / "cache")) == 1
