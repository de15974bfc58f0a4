"""Building the library that stands in for libcuda, and telling a process to use it."""

import os
import shutil
import subprocess
from pathlib import Path

import triton

CC = shutil.which("cc") or shutil.which("gcc")
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
SOURCE = Path(__file__).with_name("recording_driver.c")


def build(folder: Path, record_to: Path) -> dict[str, str]:
    """Build the library in a folder; return the environment of a process that shall use it.

    Args:
        folder: for the library, and for what Triton compiles: nothing linked against it is kept.
        record_to: the file that the library writes what it hears to.
    """
    command = [str(CC), "-shared", "-fPIC", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(SOURCE), "-o", str(folder / "libcuda.so.1")], check=True)
    environment = os.environ | {
        "RECORD_TO": str(record_to),
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    environment.pop("TRITON_INTERPRET", None)
    return environment
