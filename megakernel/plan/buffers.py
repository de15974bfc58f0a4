"""The one record that a launch is given: every tensor, grouped by who owns it.

The kernel receives these as they are, named tuples inside a named tuple; what a launch does not
use is None. :class:`Sizes` is made on the device, from the integers of the launch.
"""

from typing import Any, NamedTuple

from torch import Tensor


class RouterTensors(NamedTuple):
    """How logits are made; all None when the routing is given."""

    weight_EH: Tensor | None = None
    bias_E: Tensor | None = None  # added to the logits
    correction_bias_E: Tensor | None = None  # added to the scores, for choosing only


class ExpertTensors(NamedTuple):
    """The routed experts."""

    # The kernel gets the weights beside this record; here too only if half_tails need pointers.
    gate_up_E2IH: Tensor | None = None
    down_EHI: Tensor | None = None
    gate_up_bias_E2I: Tensor | None = None
    down_bias_EH: Tensor | None = None


class SharedTensors(NamedTuple):
    """The shared expert; all None without one."""

    gate_JH: Tensor | None = None
    up_JH: Tensor | None = None
    down_HJ: Tensor | None = None
    token_gate_1H: Tensor | None = None  # weighs it per token; None for weight 1


class Routing(NamedTuple):
    """Which experts serve each token."""

    expert_of_TK: Tensor | None = None  # integer; input when given or replayed, else int32 output
    gate_TK: Tensor | None = None  # float input when given, else fp32 output
    logits_TE: Tensor | None = None  # fp32 output
    slot_of_TK: Tensor | None = None  # int32 input when split is "slot"
    load_E: Tensor | None = None  # int32 output of a live launch: choices per expert


class Slots(NamedTuple):
    """Where experts lie; all None when slots are experts.

    Example: expert_of_P [1, 0, 1] has copy_of_P [0, 0, 1], copies_of_E [1, 2] and
    slots_of_EV [[1, -1], [0, 2]].
    """

    expert_of_P: Tensor | None = None  # int32, -1 for an empty slot
    copy_of_P: Tensor | None = None  # int32, which of its expert's copies a slot holds
    copies_of_E: Tensor | None = None  # int32, at least 1
    slots_of_EV: Tensor | None = None  # int32, ends in -1


class Rows(NamedTuple):
    """The row tables: a replay's, or written by the launch.

    Rows are sorted by slot, each slot's padded to whole tiles of ``block_rows``. Example: 3
    tokens, K = 2, 2 experts, tiles of 2 rows, expert_of_TK [[0, 1], [1, -1], [1, 0]]. Expert 0
    has assignments 0 and 5, expert 1 has 1, 2 and 4::

        row                0  1 | 2  3 | 4  5
        assignment_of_C    0  5 | 1  2 | 4  .       token = assignment // K
        expert_of_tile     0    | 1    | 1
        rows_of_tile       2    | 2    | 1
        row_of_TK          [[0, 2], [3, -1], [4, 1]]
    """

    row_of_TK: Tensor | None = None  # int32, -1 if skipped
    assignment_of_C: Tensor | None = None  # int32, defined for filled rows
    expert_of_tile: Tensor | None = None  # int32
    rows_of_tile: Tensor | None = None  # int32, filled rows, at least 1
    first_row_of_E: Tensor | None = None  # int32, of a backward launch, whose slots are experts
    rows_of_E: Tensor | None = None  # int32, filled rows of an expert; so too


class Saved(NamedTuple):
    """What a forward launch keeps for the backward, beside its arguments and results.

    One row per choice, not per row of the tables: no padding is kept, and nothing depends on where
    experts lie. Without a gate the width is I.
    """

    z_A2I: Tensor | None = None  # what the activation is applied to, in the order of gate_up
    shared_z_S2I: Tensor | None = None  # of the shared expert, row slice · T + token
    sigmoid_T: Tensor | None = None  # fp32, the shared expert's weight
    chosen_TK: Tensor | None = None  # int32, ids before any was dropped; None if none can be


class Incoming(NamedTuple):
    """Gradients of the layer's results, as the backward gets them."""

    dy_TH: Tensor | None = None
    dgate_TK: Tensor | None = None  # fp32; None for zero
    dlogits_TE: Tensor | None = None  # fp32; None for zero


class Gradients(NamedTuple):
    """Gradients that a backward launch writes; None for what is not asked for.

    Each has shape and strides of what it is the gradient of, and its dtype, but for expert weights
    whose gradient is kept in float32.
    """

    x_TH: Tensor | None = None
    router_weight_EH: Tensor | None = None
    router_bias_E: Tensor | None = None
    gate_up_E2IH: Tensor | None = None
    down_EHI: Tensor | None = None
    gate_up_bias_E2I: Tensor | None = None
    down_bias_EH: Tensor | None = None
    gate_TK: Tensor | None = None
    shared_gate_JH: Tensor | None = None
    shared_up_JH: Tensor | None = None
    shared_down_HJ: Tensor | None = None
    token_gate_1H: Tensor | None = None


class Scratch(NamedTuple):
    """What tasks hand to later tasks of the same launch.

    The shared expert's rows come first where rows are those of row tiles; rows of the tables
    follow.
    """

    h_CI: Tensor | None = None  # after the activation
    y_CH: Tensor | None = None  # each row's output; an argument where it is what is asked for
    sigmoid_T: Tensor | None = None  # fp32, the shared expert's weight
    base_GB: Tensor | None = None  # int32, per token tile and bin: count, then first ordinal
    total_B: Tensor | None = None  # int32, assignments per bin
    rank_TK: Tensor | None = None  # int32, rank in its bin within the token tile, -1 if skipped
    tile_start_GP: Tensor | None = None  # int32, a scatter task's copy of slots' first tiles
    num_tiles_1: Tensor | None = None  # int32, row tiles of the launch, shared ones among them
    # Of a backward launch.
    dz_C2I: Tensor | None = None  # gradient of z, in the order of gate_up
    a_CI: Tensor | None = None  # after the activation, weighted
    dx_CH: Tensor | None = None  # each row's gradient of its token
    ds_CB: Tensor | None = None  # fp32, each I block's part of a row's gradient of its weight
    dlogits_TE: Tensor | None = None  # fp32
    dtoken_T: Tensor | None = None  # fp32, gradient of token_gate · x


class Control(NamedTuple):
    """Counters, 128 bytes apart and zero between launches; error words; a timed launch's times."""

    counters: Tensor
    error: Tensor
    report: Tensor  # error words on the host
    times: Tensor | None = None  # int64, see tools/timeline.py; None unless the launch is timed


class Buffers(NamedTuple):
    """Every tensor of a launch."""

    x_TH: Tensor | None = None
    router: RouterTensors = RouterTensors()
    experts: ExpertTensors = ExpertTensors()
    shared: SharedTensors = SharedTensors()
    routing: Routing = Routing()
    slots: Slots = Slots()
    rows: Rows = Rows()
    scratch: Scratch = Scratch()
    control: Control | None = None
    y_TH: Tensor | None = None
    saved: Saved = Saved()
    incoming: Incoming = Incoming()
    gradients: Gradients = Gradients()


class Sizes(NamedTuple):
    """The integers of a launch, and what follows from them; made by ``order.sizes_of``."""

    num_tokens: int  # T
    num_tiles: int  # row tiles, those of the shared expert among them
    capacity: int
    seed: int
    token_tiles: int  # of route and scatter
    combine_tiles: int  # token tiles of one column group's combine
    shared_tiles: int  # row tiles of the shared expert, which come before all others
    wide_ffn1: bool  # whether routed FFN1 tasks take several column blocks
    wide_ffn2: bool  # whether FFN2 tasks do, ahead of the last column group


def flatten(record: tuple, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested named tuples by dotted name, absent ones left out."""
    tensors: dict[str, Tensor] = {}
    for name, value in zip(record._fields, record, strict=True):  # type: ignore[attr-defined]
        if isinstance(value, tuple):
            tensors |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            tensors[prefix + name] = value
    return tensors


def unflatten(tensors: dict[str, Tensor]) -> Buffers:
    """Invert :func:`flatten`."""

    def fill(record: Any, prefix: str) -> Any:
        values = {
            name: fill(value, f"{prefix}{name}.")
            if isinstance(value, tuple)
            else tensors.get(prefix + name)
            for name, value in record._asdict().items()
        }
        return record._replace(**values)

    return fill(Buffers(), "")
