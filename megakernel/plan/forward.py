"""The task lists of the forward pass, as data: which kinds of task, in which order.

A list is a row of *segments*. How many tasks a segment has, what they wait for and what they
signal is said once, in ``order.py``, for all lists; a wait counts only where the list holds who
signals.

==================  ==============================================================================
stage               segments
==================  ==============================================================================
route               ROUTE: logits, choices, weights; ids that are given are checked or only weighed
dispatch            PREFIX, SCATTER: from choices to rows
FFN                 SHARED_FFN1, FFN1, then FFN2 (the shared expert's row tiles among it)
combine             COMBINE; with FFN2 in one list the two are interleaved, which is TAIL
==================  ==============================================================================
"""

from megakernel.plan.buffers import Gradients, Saved
from megakernel.plan.protocol import Protocol

DISPATCH = (Protocol.ROUTE, Protocol.PREFIX, Protocol.SCATTER)
FFN1 = (Protocol.SHARED_FFN1, Protocol.FFN1)

# By stages and route: see KernelSpec. A replay starts with its experts, since it has the rows.
SEGMENTS = {
    ("layer", "live"): (*DISPATCH, *FFN1, Protocol.TAIL),
    ("layer", "given"): (*DISPATCH, *FFN1, Protocol.TAIL),
    ("layer", "replay"): (*FFN1, Protocol.ROUTE, Protocol.TAIL),
    ("rows", "given"): (*DISPATCH, *FFN1, Protocol.FFN2),
    ("rows", "replay"): (*FFN1, Protocol.FFN2),
    ("combine", "replay"): (Protocol.COMBINE,),
}
STAGES = ("layer", "rows", "combine")


def held_kinds(segments: tuple[int, ...]) -> frozenset[int]:
    """Return the kinds of task in a list."""
    held = set(segments)
    if Protocol.TAIL in held:
        held |= {Protocol.FFN2, Protocol.COMBINE}
    if Protocol.SHARED_FFN1 in held:
        held.add(Protocol.SHARED_FFN2)
    return frozenset(held - {Protocol.TAIL})


def outputs_of(stages: str, route: str) -> set[str]:
    """Return the dotted names of the arguments that a launch writes, where it has them."""
    if stages == "backward":
        return {f"gradients.{name}" for name in Gradients._fields}
    if stages == "rows":
        return {"scratch.y_CH"}
    written = {"y_TH"}
    if stages == "layer":
        written |= {"routing.logits_TE", "routing.load_E"}
        written |= {f"saved.{name}" for name in Saved._fields}
        if route != "given":
            written.add("routing.gate_TK")
        if route == "live":
            written.add("routing.expert_of_TK")
    return written
