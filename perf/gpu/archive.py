"""The one file that a run leaves: logs, figures, and the compiled kernels as far as they fit."""

import io
import json
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_BYTES = 15_000_000
END_BYTES = 50_000  # of the archive itself
MOST_TEXT_BYTES = 2_000_000  # a log that is longer is cut to its end
KEPT_OF_KERNELS = {".cubin", ".json", ".so"}  # what Triton reads of a kernel that it finds
BINARY = {*KEPT_OF_KERNELS, ".npz"}
CACHE, CACHE_PATH = "triton-cache", "triton-cache-path.txt"


def pack(path: Path, work: Path, cache: Path, others: Sequence[Path] = ()) -> list[str]:
    """Pack a run into one file of at most MOST_BYTES; return the folders that did not fit.

    Args:
        path: the archive to be.
        work: folder of the run.
        cache: of Triton, not inside ``work``.
        others: files elsewhere that belong to the run.
    """
    left_out, size_bytes = [], END_BYTES
    groups = [("", [other for other in others if other.exists()])]
    groups += folders_of(work, "run")
    groups += folders_of(cache, CACHE, KEPT_OF_KERNELS)
    new = path.with_suffix(".new")
    with tarfile.open(new, mode="w:gz", compresslevel=6) as tar:
        add(tar, CACHE_PATH, str(cache).encode())
        for name, files in groups:
            contents = {f"{name}/{one.name}".lstrip("/"): content_of(one) for one in files}
            group_bytes = sum(most_packed_bytes(content) for content in contents.values())
            if size_bytes + group_bytes > MOST_BYTES:
                left_out.append(name)
                continue
            size_bytes += group_bytes
            for place, content in contents.items():
                add(tar, place, content)
    new.replace(path)
    return left_out


def folders_of(
    root: Path, name: str, suffixes: set[str] | None = None
) -> Iterator[tuple[str, list[Path]]]:
    """Yield the name of each folder in the archive, and its files.

    Args:
        root: where to look; may be missing.
        name: of the root in the archive.
        suffixes: of the files that count; None for all.
    """
    for folder in sorted({path.parent for path in root.rglob("*") if path.is_file()}):
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        wanted = [path for path in files if suffixes is None or path.suffix in suffixes]
        if wanted:
            yield str(Path(name) / folder.relative_to(root)), wanted


def content_of(path: Path) -> bytes:
    """Return what is packed of a file: only the end of a long text, nothing if it vanished."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content if path.suffix in BINARY else content[-MOST_TEXT_BYTES:]


def most_packed_bytes(content: bytes) -> int:
    """Return what a file takes at most: packed less well than it will be, and its header."""
    return len(zlib.compress(content, 1)) + 1024


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file by its content."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))


def unpack_cache(path: Path, cache: Path) -> int:
    """Bring the compiled kernels of an earlier run to this one's cache; return how many files.

    Triton notes the absolute path of every file that it keeps, so those of a cache that lay
    elsewhere are changed.

    Args:
        path: archive of that run.
        cache: where Triton shall look.

    Raises:
        ValueError: if the file is no archive of a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(path) as tar:
                tar.extractall(folder, filter="data")
            was = (Path(folder) / CACHE_PATH).read_text()
        except (OSError, tarfile.TarError) as error:
            raise ValueError(
                f"--cache must be the archive of a run, got {path}: {error}"
            ) from None
        root = Path(folder) / CACHE
        files = [one for one in root.rglob("*") if one.is_file()]
        for one in files:
            target = cache / one.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(moved(one, was, str(cache)))
    return len(files)


def moved(path: Path, was: str, now: str) -> bytes:
    """Return a file's content; that of a list of files with their paths at the new place."""
    content = path.read_bytes()
    if not path.name.startswith("__grp__"):
        return content
    group = json.loads(content)
    paths = group["child_paths"]
    group["child_paths"] = {name: child.replace(was, now, 1) for name, child in paths.items()}
    return json.dumps(group).encode()
