"""Microseconds of processor time that a call of the layer takes on the host, without a GPU.

``python -m tests.helpers.driver.host_time`` builds the library that stands in for libcuda, and
times warm calls through Triton's real launcher in a process of its own. Processor time, not wall
time, and the least of many rounds: other work on the machine disturbs it little. The stand-in
writes what it hears to nowhere.
"""

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.driver.stand_in import build

ROUNDS, CALLS_A_ROUND, WARM_UP = 60, 50, 50


def time_us(call: Callable[[], object]) -> tuple[float, float]:
    """Return the least and the median processor time of a warm call."""
    for _ in range(WARM_UP):
        call()
    rounds = []
    gc.disable()
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in range(CALLS_A_ROUND):
            call()
        rounds.append((time.process_time() - started) / CALLS_A_ROUND * 1e6)
    gc.enable()
    return min(rounds), statistics.median(rounds)


def time_calls() -> None:
    """Time calls whose tensors are made beforehand."""
    # Imported here, in the process that has the stand-in.
    from megakernel import moe
    from tests.helpers.driver.calls import CONFIG, draw_layer, draw_replay, stand_in

    stand_in()
    layer, replay = draw_layer(), draw_replay(CONFIG)
    for name, call in {
        "live": lambda: moe(*layer, config=CONFIG),
        "replay": lambda: moe(*layer, replay=replay, config=CONFIG),
    }.items():
        least, median = time_us(call)
        print(f"{name}: {least:.0f} us at least, {median:.0f} us in the median")


def main() -> int:
    """Build the stand-in and time the calls on it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = build(Path(folder), Path(os.devnull)) | {"RECORD_PARAMETERS": "0"}
        command = [sys.executable, "-m", "tests.helpers.driver.host_time", "--here"]
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(time_calls() if sys.argv[1:] == ["--here"] else main())
