"""What the machine is, and what it can at most do."""

import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib import metadata

from perf.gpu.child import Context
from perf.sources import digest

COMMAND_S = 10.0
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "pytest-timeout", "hypothesis",
            "matplotlib", "tqdm", "scipy", "liger-kernel", "moe-ops")  # fmt: skip
COMMANDS = (
    ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free,clocks.sm,clocks.mem,"
     "power.draw,temperature.gpu", "--format=csv,noheader"),
    ("cc", "--version"),
)  # fmt: skip


def describe(context: Context) -> dict:
    """Say which machine, software and sources this is.

    Raises:
        RuntimeError: without a GPU, unless this is a rehearsal.
    """
    import torch

    details: dict = {name: version_of(name) for name in PACKAGES}
    details |= {command[0]: output_of(*command) for command in COMMANDS}
    details["python"] = platform.python_version()
    details["cores"] = len(os.sched_getaffinity(0))
    details["disk_free_gb"] = shutil.disk_usage(context.work).free >> 30
    details["sources"] = digest()
    for name, value in details.items():
        context.say(f"{name}: {value}")
    if not (torch.cuda.is_available() or context.rehearse):
        raise RuntimeError("no GPU here: --rehearse runs every step on the CPU")
    if not context.rehearse:
        properties = torch.cuda.get_device_properties(context.device)
        free, total = torch.cuda.mem_get_info(context.device)
        details |= {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "free_gb": round(free / 2**30, 1),
            "total_gb": round(total / 2**30, 1),
        }
    shown = ("gpu", "free_gb", "python", "torch", "triton", "numpy", "cores")
    details["text"] = ", ".join(f"{name} {details[name]}" for name in shown if name in details)
    return details


def roofs(context: Context) -> dict:
    """Measure the copy, the dense product and the reads from L2, and keep them for later steps."""
    from perf.measuring.measure import Protocol
    from perf.measuring.roofline import ASSUMED_H200, measure_roofs

    if context.rehearse:
        measured = ASSUMED_H200
    else:
        start = time.monotonic()
        measured = measure_roofs(context.device, Protocol(warm_ups=3, rounds=10))
        context.say(f"{time.monotonic() - start:.1f} s")
    context.keep("roofs", asdict(measured))
    text = (f"{measured.dense_flops_per_s * 1e-12:.0f} TFLOP/s, copy "
            f"{measured.copy_bytes_per_s * 1e-9:.0f} GB/s, {measured.source}")  # fmt: skip
    return asdict(measured) | {"text": text}


def version_of(package: str) -> str:
    """Return an installed version, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def output_of(*command: str) -> str:
    """Return the first line that a program prints, or why it prints none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    return (done.stdout or done.stderr).partition("\n")[0]
