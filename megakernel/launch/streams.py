"""Whose turn it is to launch, and on which device and stream."""

import os
from threading import RLock

import torch

# One thread launches at a time, and whoever touches what launches share holds this too. Triton's
# interpreter replaces the language for all threads while it runs, and launches on one stream share
# its workspace. A thread that has the turn may take it again.
TURN = RLock()
# A fork waits for the launch of another thread, so that the child finds the turn free and every
# workspace whole.
os.register_at_fork(before=TURN.acquire, after_in_parent=TURN.release, after_in_child=TURN.release)


def with_index(device: torch.device) -> torch.device:
    """Return the device as its tensors name it: ``cuda`` is the current GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def stream_of(device: torch.device) -> int:
    """Return the handle of the device's current stream, 0 where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # PyTorch answers for the current device alone
        return torch.cuda.is_current_stream_capturing()
