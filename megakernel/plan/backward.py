"""The task list of the backward pass, as data: which kinds of task, in which order.

==========  =======================================================================================
kind        what it does
==========  =======================================================================================
ROUTE ..    rows by expert in token order, whatever the placement, where no replay brings them
FFN1        run again, where its sums were not kept
dH          dA' = dy · down; A and dz by the activation; the part of <dA', A> that its block holds
dX          dz · gate_up, for each row
dS          gradients of weights from the parts in block order, and of logits by the router's rule
dx          each token's rows in k order, shared rows, dlogits · router; rounded once
dRouter ..  gradients of weights: one owner per output tile, rows in token order
==========  =======================================================================================
"""

from megakernel.plan.protocol import Protocol
from megakernel.plan.rules import GradientRule


def backward_segments(asked: GradientRule, makes_rows: bool, has_shared: bool) -> tuple[int, ...]:
    """Return the segments of a backward list.

    Args:
        asked: gradients that are asked for.
        makes_rows: whether no replay brings the row tables.
        has_shared: whether there is a shared expert.
    """
    P = Protocol
    segments = [P.ROUTE, P.PREFIX, P.SCATTER] if makes_rows else []
    if asked.recomputes:
        segments += [P.SHARED_FFN1, P.FFN1]
    segments += [P.SHARED_DH, P.DH]
    if asked.x:
        segments += [P.SHARED_DX, P.DX]
    if needs_ds(asked):
        segments.append(P.DS)
    wanted = {
        P.DROUTER: asked.router or asked.router_bias,
        P.DTOKEN_GATE: asked.token_gate,
        P.DGATE_UP: asked.gate_up,
        P.MIXED: asked.x and asked.down,
        P.DX_SUM: asked.x and not asked.down,
        P.DDOWN: asked.down and not asked.x,
        P.SHARED_DGATE_UP: asked.shared_gate or asked.shared_up,
        P.SHARED_DDOWN: asked.shared_down,
        P.DBIAS: asked.gate_up_bias or asked.down_bias,
    }
    segments += [segment for segment, is_wanted in wanted.items() if is_wanted]
    shared = {P.SHARED_FFN1, P.SHARED_DH, P.SHARED_DX}
    return tuple(segment for segment in segments if has_shared or segment not in shared)


def needs_ds(asked: GradientRule) -> bool:
    """Whether anything asked for depends on the gradients of weights."""
    through_x = asked.x and (asked.weighs or asked.token_gated)
    return through_x or asked.router or asked.router_bias or asked.gates or asked.token_gate
