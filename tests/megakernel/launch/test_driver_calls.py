"""The way of a call to the driver: what Triton's real launcher passes, recorded without a GPU.

A small C library stands in for libcuda (tests/helpers/driver). So the launcher that Triton
generates and compiles for our arguments (named tuples, absent fields, tensor descriptors, plain
integers) is the one a GPU would get, and the kernel is really compiled for sm_90.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.driver.stand_in import CC, build

ROOT = Path(__file__).parents[3]
CALLS = ("live", "replayed and timed", "routed like gpt-oss, with replicas")

pytestmark = pytest.mark.skipif(CC is None, reason="needs a C compiler, as Triton's launcher does")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Make the calls in a process of its own, and return what the driver heard."""
    folder = tmp_path_factory.mktemp("driver")
    path = folder / "record.jsonl"
    environment = build(folder, path)
    command = [sys.executable, "-m", "tests.helpers.driver.calls", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def launches(record: list[dict[str, Any]]) -> Iterator[tuple[dict, list[dict], dict]]:
    """Yield for each call what is expected, the maps encoded and the launch."""
    starts = [place for place, line in enumerate(record) if line["call"] == "expect"]
    for start, end in zip(starts, [*starts[1:], len(record)], strict=True):
        expected, *maps, launch = record[start:end]
        yield expected, maps, launch


def test_every_call_is_one_launch_of_all_workers(record: list[dict[str, Any]]) -> None:
    assert [line["call"] for line in record] == ["expect", "map", "map", "launch"] * len(CALLS)
    for *_, launch in launches(record):
        assert (launch["grid"], launch["threads"]) == (132, 128)
        assert 0 < launch["shared_bytes"] <= 232_448


@pytest.mark.parametrize("place", range(len(CALLS)), ids=CALLS)
def test_the_kernel_is_passed_every_argument_in_its_place(
    record: list[dict[str, Any]], place: int
) -> None:
    expected, _, launch = list(launches(record))[place]
    passed = zip(expected["types"], launch["parameters"], strict=True)
    for argument in expected["arguments"]:
        kind, value = next(passed)
        if argument["kind"] == "integer":
            assert kind == "u32" and value % 2**32 == argument["value"]
            continue
        assert kind == ("b8" if argument["kind"] == "map" else "u64")
        assert value == argument["value"]
        for field in ("shape", "strides") if argument["kind"] == "map" else ():
            for size in argument[field]:
                kind, value = next(passed)
                assert value % (2**32 if kind == "u32" else 2**64) == size
    assert not list(passed)


@pytest.mark.parametrize("place", range(len(CALLS)), ids=CALLS)
def test_the_copy_engine_is_told_the_weights_layout(
    record: list[dict[str, Any]], place: int
) -> None:
    expected, maps, _ = list(launches(record))[place]
    descriptors = [one for one in expected["arguments"] if one["kind"] == "map"]
    for descriptor, told in zip(descriptors, maps, strict=True):
        assert told["address"] == descriptor["value"]
        assert told["dims"] == descriptor["shape"][::-1]  # fastest first
        assert told["strides"] == [2 * stride for stride in descriptor["strides"][-2::-1]]
        assert all(1 <= width <= 256 for width in told["box"])
        assert 2 * told["box"][0] <= 128  # one row of a box fits the 128-byte swizzle
