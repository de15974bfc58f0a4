"""What tasks of the stages FFN and combine mean, in plain PyTorch.

Functions take ``(m, tile, block)`` like those of ``device/``, ``m`` being the machine's memory.
They are written from the table of tasks, not from the device code, and share none of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, relu, silu

from megakernel.plan.machine_memory import Memory, columns_of, span, tokens_of
from megakernel.plan.order import plain
from megakernel.plan.rules import ExpertRule


def activated(z_CI: list[Tensor], rule: ExpertRule) -> Tensor:
    """Return h_CI from the sums of gate and up, or of up alone."""
    *gated, up_CI = z_CI
    if rule.activation == "clamped_swiglu":
        (gate_CI,) = gated
        gate_CI, up_CI = gate_CI.clamp(max=rule.limit), up_CI.clamp(-rule.limit, rule.limit)
        return (up_CI + 1) * gate_CI * torch.sigmoid(1.702 * gate_CI)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": silu,
        "gelu": gelu,
        "gelu_tanh": lambda values: gelu(values, approximate="tanh"),
        "relu": relu,
        "relu2": lambda values: relu(values).square(),
    }
    activate = functions[rule.activation]
    return activate(gated[0]) * up_CI if gated else activate(up_CI)


def filled_rows(m: Memory, tile: int) -> tuple[slice, slice, int]:
    """Return a routed row tile's rows in the tables, its rows in h_CI and y_CH, its expert."""
    routed_tile = tile - m.size.shared_tiles
    height = m.spec.block_rows
    filled = int(m.read("rows.rows_of_tile", routed_tile))
    rows = slice(routed_tile * height, routed_tile * height + filled)
    own = slice(tile * height, tile * height + filled)
    return rows, own, int(m.read("rows.expert_of_tile", routed_tile))


def halves_of(rule: ExpertRule, place_I: Tensor, width: int) -> list[Tensor]:
    """Return where the rows of gate and of up lie that make columns of I; of up, without a gate.

    Args:
        rule: says whether they take turns.
        place_I: the columns.
        width: I.
    """
    if not rule.has_gate:
        return [place_I]
    step, apart = (2, 1) if rule.interleaved else (1, width)
    return [step * place_I, step * place_I + apart]


def ffn1(m: Memory, tile: int, block: int) -> None:
    """z = gate_up · x + bias and h = activation(gate) * up, for a row tile and its task's columns.

    A forward writes h, and z where a backward will want it; a backward writes z alone.
    """
    rule, I = m.spec.expert, m.spec.intermediate
    rows, own, expert = filled_rows(m, tile)
    assignment_C = m.read("rows.assignment_of_C", rows)
    x_CH = m.read("x_TH", assignment_C // m.spec.top_k)
    columns = columns_of(block, plain.ffn1_end_of(block, m.size, m.spec), m.spec.block_i, I)
    halves = halves_of(rule, torch.arange(I, device=x_CH.device)[columns], I)
    z_CI = []
    for place_I in halves:
        sum_CI = x_CH @ m.read("experts.gate_up_E2IH", (expert, place_I)).T
        if "experts.gate_up_bias_E2I" in m:
            sum_CI = sum_CI + m.read("experts.gate_up_bias_E2I", (expert, place_I))
        z_CI.append(sum_CI)
        if "saved.z_A2I" in m:
            m.write("saved.z_A2I", (assignment_C[:, None], place_I[None, :]), sum_CI)
    if not m.spec.is_backward:
        m.write("scratch.h_CI", (own, columns), activated(z_CI, rule))


def h_columns_of(m: Memory, block: int) -> slice:
    """Return the columns of H of an FFN2 task, named by its first block."""
    end = plain.ffn2_end_of(block, m.size, m.spec)
    return columns_of(block, max(block, end), m.spec.block_h, m.spec.hidden)


def ffn2(m: Memory, tile: int, block: int) -> None:
    """y = down · h + bias, for one row tile and its task's blocks of H."""
    columns = h_columns_of(m, block)
    if columns.start == columns.stop:
        return
    _, own, expert = filled_rows(m, tile)
    y_CH = m.read("scratch.h_CI", own) @ m.read("experts.down_EHI", (expert, columns)).T
    if "experts.down_bias_EH" in m:
        y_CH = y_CH + m.read("experts.down_bias_EH", (expert, columns))
    m.write("scratch.y_CH", (own, columns), y_CH)


# The shared expert: slices as wide as a routed one, each over all tokens, in the first row tiles.


def shared_rows(m: Memory, tile: int) -> tuple[slice, slice, int]:
    """Return a shared row tile's tokens, its rows in h_CI and y_CH, and its slice."""
    height = m.spec.block_rows
    tiles = -(-m.size.num_tokens // height)
    tokens = tokens_of(m, tile % tiles, height)
    return span(tokens), slice(tile * height, tile * height + len(tokens)), tile // tiles


def inside_slice(m: Memory, index: int, columns: slice) -> slice:
    """Return where columns of a slice lie in the whole shared expert, none past its end."""
    first, J = index * m.spec.intermediate, m.spec.shared_width
    return slice(min(first + columns.start, J), min(first + columns.stop, J))


def shared_ffn1(m: Memory, tile: int, block: int) -> None:
    """z and h of a slice for one row tile and one block of I; zero past the last of its columns.

    What is written is what :func:`ffn1` says.
    """
    I = m.spec.intermediate
    at, own, index = shared_rows(m, tile)
    columns = columns_of(block, block + 1, m.spec.block_i, I)
    inside = inside_slice(m, index, columns)
    x_TH = m.read("x_TH", at)
    missing = columns.stop - columns.start - (inside.stop - inside.start)
    names = ("gate_JH", "up_JH") if m.spec.expert.has_gate else ("up_JH",)
    z_TI = [pad(x_TH @ m.read(f"shared.{name}", inside).T, (0, missing)) for name in names]
    if "saved.shared_z_S2I" in m:
        kept = slice(index * m.size.num_tokens + at.start, index * m.size.num_tokens + at.stop)
        for half, sum_TI in enumerate(z_TI):
            place = slice(half * I + columns.start, half * I + columns.stop)
            m.write("saved.shared_z_S2I", (kept, place), sum_TI)
    if not m.spec.is_backward:
        m.write("scratch.h_CI", (own, columns), activated(z_TI, m.spec.expert))


def shared_ffn2(m: Memory, tile: int, block: int) -> None:
    """y of a slice for one row tile and one block of H."""
    columns = h_columns_of(m, block)
    if columns.start == columns.stop:
        return
    _, own, index = shared_rows(m, tile)
    down_HI = m.read(
        "shared.down_HJ",
        (columns, columns_of(index, index + 1, m.spec.intermediate, m.spec.shared_width)),
    )
    h_TI = m.read("scratch.h_CI", own)[:, : down_HI.shape[1]]
    m.write("scratch.y_CH", (own, columns), h_TI @ down_HI.T)


def combine(m: Memory, tile: int, group: int) -> None:
    """Sum each token's weighted rows in k order, then the shared expert's, for a column group."""
    spec = m.spec
    columns = columns_of(group, group + 1, spec.group_blocks * spec.block_h, spec.hidden)
    first_row = m.size.shared_tiles * spec.block_rows
    padded_tokens = -(-m.size.num_tokens // spec.block_rows) * spec.block_rows
    for token in tokens_of(m, tile, spec.combine_tokens):
        total_H = torch.zeros(columns.stop - columns.start, dtype=m.wide)
        for choice, row in enumerate(m.read("rows.row_of_TK", token).tolist()):
            if row >= 0:
                y_H = m.read("scratch.y_CH", (first_row + row, columns))
                total_H = total_H + m.read("routing.gate_TK", (token, choice)) * y_H
        weight = m.read("scratch.sigmoid_T", token) if "shared.token_gate_1H" in m else 1.0
        for index in range(spec.num_slices):
            y_H = m.read("scratch.y_CH", (index * padded_tokens + token, columns))
            total_H = total_H + weight * y_H
        m.write("y_TH", (token, columns), total_H)
