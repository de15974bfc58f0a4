"""One archive, never over its size, whose kernels are found again elsewhere."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from perf.gpu import archive
from perf.gpu.archive import MOST_BYTES, pack, unpack_cache


def noise(size_bytes: int, seed: int = 0) -> bytes:
    """Return bytes that cannot be packed."""
    return np.random.default_rng(seed).bytes(size_bytes)


def make_kernel(cache: Path, name: str, content: bytes = b"code") -> Path:
    """Leave a kernel as Triton does: files, and a list with their absolute paths."""
    folder = cache / name
    folder.mkdir(parents=True)
    for suffix in ("cubin", "ptx", "ttir", "json"):
        (folder / f"moe_kernel.{suffix}").write_bytes(content)
    paths = {path.name: str(path) for path in folder.iterdir()}
    group = folder / "__grp__moe_kernel.json"
    group.write_text(json.dumps({"child_paths": paths}))
    return group


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_everything_small_is_packed_and_of_kernels_what_triton_reads(tmp_path: Path) -> None:
    work, cache = tmp_path / "work", tmp_path / "triton-cache"
    (work / "steps" / "one").mkdir(parents=True)
    (work / "steps" / "one" / "log").write_text("a line")
    (work / "roofs.json").write_text("{}")
    make_kernel(cache, "abc")
    log = tmp_path / "first.log"
    log.write_text("x")
    assert pack(tmp_path / "first.tgz", work, cache, [log, tmp_path / "missing"]) == []
    assert sorted(names_in(tmp_path / "first.tgz")) == [
        "first.log",
        "run/roofs.json",
        "run/steps/one/log",
        "triton-cache-path.txt",
        "triton-cache/abc/__grp__moe_kernel.json",
        "triton-cache/abc/moe_kernel.cubin",
        "triton-cache/abc/moe_kernel.json",
    ]


def test_the_archive_is_never_too_large_and_says_what_is_missing(tmp_path: Path) -> None:
    work, cache = tmp_path / "work", tmp_path / "triton-cache"
    (work / "steps" / "one").mkdir(parents=True)
    (work / "steps" / "one" / "log").write_text("a line")
    for number in range(9):
        make_kernel(cache, f"kernel{number}", noise(1_000_000, number))
    left_out = pack(tmp_path / "first.tgz", work, cache)
    assert (tmp_path / "first.tgz").stat().st_size <= MOST_BYTES
    assert left_out == ["triton-cache/kernel7", "triton-cache/kernel8"]
    names = names_in(tmp_path / "first.tgz")
    assert "run/steps/one/log" in names and "triton-cache/kernel6/moe_kernel.cubin" in names


def test_of_a_long_log_the_end_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_TEXT_BYTES", 10)
    (tmp_path / "work" / "one").mkdir(parents=True)
    (tmp_path / "work" / "one" / "log").write_text("0123456789the end!!!")
    (tmp_path / "work" / "one" / "t.npz").write_bytes(bytes(100))
    pack(tmp_path / "a.tgz", tmp_path / "work", tmp_path / "triton-cache")
    with tarfile.open(tmp_path / "a.tgz") as tar:
        assert tar.extractfile("run/one/log").read() == b"the end!!!"
        assert tar.getmember("run/one/t.npz").size == 100


def test_kernels_are_found_at_another_place(tmp_path: Path) -> None:
    was, now = tmp_path / "was" / "triton-cache", tmp_path / "now" / "triton-cache"
    make_kernel(was, "abc")
    (tmp_path / "work").mkdir()
    pack(tmp_path / "a.tgz", tmp_path / "work", was)
    assert unpack_cache(tmp_path / "a.tgz", now) == 3
    paths = json.loads((now / "abc" / "__grp__moe_kernel.json").read_text())["child_paths"]
    assert paths["moe_kernel.cubin"] == str(now / "abc" / "moe_kernel.cubin")
    assert Path(paths["moe_kernel.cubin"]).read_bytes() == b"code"


@pytest.mark.parametrize("content", [None, b"no archive"], ids=["missing", "not an archive"])
def test_what_is_no_archive_of_a_run_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.tgz"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"--cache must be the archive of a run, got .*a\.tgz"):
        unpack_cache(path, tmp_path / "cache")
