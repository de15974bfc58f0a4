"""The recording of gpt-oss-20b, which is too large for the repository: found here, or skipped."""

from pathlib import Path

import numpy as np
import pytest

from balance.recorded.packing import Order, pack
from balance.trace import Trace
from tests.helpers.sources import ROOT

RECORDING = ROOT.parent / "shared" / "traces" / "gptoss20b.npz"


def recording_path() -> Path:
    """Where the recording lies, or skip the test that asks and say what is lost."""
    if not RECORDING.exists():
        pytest.skip(
            "NOT CHECKED: the rows 'recorded' of the README's table of what the planner reaches, "
            "and docs/planner.md, need a recording of gpt-oss-20b (107,920 tokens, 24 layers, "
            "top-4 of 32), which is not part of the repository; it is looked for as "
            f"../{RECORDING.relative_to(ROOT.parent)} beside the repository and is not there"
        )
    return RECORDING


def packed_recording(order: Order, num_ranks: int, every_nth_layer: int = 1) -> Trace:
    """The recording, whole sequences packed to 3,400 tokens per micro-batch; or skip."""
    with np.load(recording_path()) as arrays:
        return pack(
            arrays["ids_TLK"][:, ::every_nth_layer],
            arrays["sequence_start"],
            num_experts=int(arrays["num_experts"]),
            num_ranks=num_ranks,
            order=order,
            domain_S=arrays["domain"],
        )
