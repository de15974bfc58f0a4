"""Steps that do what a real one might: hang, fail, die, start others."""

import os
import signal
import subprocess
import sys
import time

from perf.gpu.child import Context


def passes(context: Context, *arguments: str) -> dict:
    """Say a word and report it."""
    context.say("a word")
    return {"text": f"seen {' '.join(arguments)}", "figure": 3}


def fails(context: Context) -> None:
    """Report what is wrong."""
    raise AssertionError("7 of 9 values differ")


def breaks(context: Context) -> None:
    """Raise what nobody expected."""
    raise KeyError("no such thing")


def dies(context: Context) -> None:
    """End without a word, as a crash does."""
    context.note("test 3 failed")
    print("the last line", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs_deaf(context: Context) -> None:
    """Hear no signal that can be ignored, as a process that waits for a GPU."""
    for one in (signal.SIGTERM, signal.SIGABRT, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    context.say("begun")
    time.sleep(600)


def hangs_with_a_child(context: Context) -> None:
    """Start a process and wait for it for ever; its id is in the folder."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.folder / "child").write_text(str(child.pid))
    child.wait()


def talks(context: Context, seconds: str) -> dict:
    """Say something again and again."""
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        context.say("still here")
        time.sleep(0.1)
    return {"text": "talked"}
