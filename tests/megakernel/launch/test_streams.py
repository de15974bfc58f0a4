"""Which device and stream are asked, and that one launches at a time."""

import os
import time
from threading import Event, Thread

import pytest
import torch

from megakernel.launch.streams import TURN, is_capturing, stream_of, with_index

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LIMIT_SECONDS = 20


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert with_index(GPU) == torch.device("cuda", 2)
    assert with_index(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert with_index(CPU) == CPU


@pytest.mark.parametrize("capturing", [0, 1])
def test_a_capture_is_that_of_the_device_asked_about(capturing: int, monkeypatch):
    """PyTorch answers for the current device: it is made to be the one in question, for a time."""
    current = [0]

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == capturing)
    seen = [is_capturing(torch.device("cuda", index)) for index in (0, 1)]
    assert seen == [capturing == 0, capturing == 1] and current == [0]


def test_the_cpu_has_one_stream_and_captures_nothing():
    assert stream_of(CPU) == 0 and not is_capturing(CPU)


def test_a_turn_is_one_threads_who_may_take_it_again():
    taken = []
    with TURN, TURN:
        other = Thread(target=lambda: taken.append(TURN.acquire(timeout=0.05)))
        other.start()
        other.join(LIMIT_SECONDS)
    assert taken == [False]
    assert TURN.acquire(timeout=LIMIT_SECONDS)
    TURN.release()


def test_a_forked_process_finds_the_turn_free():
    """Another thread has it when this one asks for a fork; the child has no such thread."""
    taken = Event()

    def take_for_a_while() -> None:
        with TURN:
            taken.set()
            time.sleep(0.3)

    other = Thread(target=take_for_a_while)
    other.start()
    assert taken.wait(LIMIT_SECONDS)
    child = os.fork()
    if not child:
        os._exit(0 if TURN.acquire(timeout=1) else 1)
    other.join(LIMIT_SECONDS)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
