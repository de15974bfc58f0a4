"""The text the demo's model learns from: what every Python interpreter brings along.

Four kinds, so that routing differs by kind: library modules, their tests, the language manual
behind ``help()``, and the tables of ``encodings``. All of it is under the PSF licence.
"""

import importlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

SHARE_OF_KIND = {"modules": 0.5, "tests": 0.2, "manual": 0.2, "tables": 0.1}
HELD_OUT_EVERY = 20
LEAST_BYTES = 100_000


class Windows:
    """Random windows of text, each kind with its share, from training or held-out documents."""

    def __init__(self, texts: dict[str, list[bytes]], held_out: bool, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.bytes_of_kind = {}
        for kind, documents in texts.items():
            chosen = [d for i, d in enumerate(documents) if (i % HELD_OUT_EVERY == 0) == held_out]
            text = bytearray(b"\n".join(chosen))
            self.bytes_of_kind[kind] = torch.frombuffer(text, dtype=torch.uint8)

    def draw(self, kind: str, count: int, length: int) -> Tensor:
        """Return ``count`` windows of ``length`` bytes as int64."""
        text = self.bytes_of_kind[kind]
        start = torch.randint(len(text) - length, (count, 1), generator=self.random)
        return text[start + torch.arange(length)].long()

    def draw_mixed(self, count: int, length: int) -> Tensor:
        """Return ``count`` windows in all, each kind with its share of them."""
        kinds = list(SHARE_OF_KIND)
        share = torch.tensor([SHARE_OF_KIND[kind] for kind in kinds])
        drawn = torch.multinomial(share, count, replacement=True, generator=self.random)
        count_of_kind = drawn.bincount(minlength=len(kinds)).tolist()
        windows = zip(kinds, count_of_kind, strict=True)
        return torch.cat([self.draw(kind, number, length) for kind, number in windows])


def read_texts() -> dict[str, list[bytes]]:
    """Return the documents of each kind of text, from this interpreter's own library.

    Raises:
        FileNotFoundError: if the interpreter came without a kind (some distributions drop test/).
    """
    library = Path(sysconfig.get_path("stdlib"))
    manual = importlib.import_module("pydoc_data.topics").topics
    texts = {
        "modules": _read_files(library, "*.py"),
        "tests": _read_files(library, "test/test_[a-i]*.py"),
        "manual": [manual[topic].encode() for topic in sorted(manual)],
        "tables": _read_files(library, "encodings/cp*.py"),
    }
    for kind, documents in texts.items():
        if sum(map(len, documents)) < LEAST_BYTES:
            raise FileNotFoundError(f"this interpreter's library lacks the {kind}: {library}")
    return texts


def _read_files(library: Path, pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(library.glob(pattern))]
