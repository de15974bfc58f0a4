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


def activated(gate_CI: Tensor | None, up_CI: Tensor, rule: ExpertRule) -> Tensor:
    """Return h_CI from the sums of gate and up, or of up alone."""
    if rule.activation == "clamped_swiglu":
        assert gate_CI is not None
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
    return activate(up_CI) if gate_CI is None else activate(gate_CI) * up_CI


def filled_rows(m: Memory, tile: int) -> tuple[slice, slice, int]:
    """Return a routed row tile's rows in the tables, its rows in h_CI and y_CH, its expert."""
    routed_tile = tile - m.size.shared_tiles
    height = m.spec.block_rows
    filled = int(m.read("rows.rows_of_tile", routed_tile))
    rows = slice(routed_tile * height, routed_tile * height + filled)
    own = slice(tile * height, tile * height + filled)
    return rows, own, int(m.read("rows.expert_of_tile", routed_tile))


def ffn1(m: Memory, tile: int, block: int) -> None:
    """h = activation(gate · x) * (up · x), for one row tile and its task's blocks of I."""
    rule, I = m.spec.expert, m.spec.intermediate
    rows, own, expert = filled_rows(m, tile)
    x_CH = m.read("x_TH", m.read("rows.assignment_of_C", rows) // m.spec.top_k)
    columns = columns_of(block, plain.ffn1_end_of(block, m.size, m.spec), m.spec.block_i, I)
    place_I = torch.arange(I, device=x_CH.device)[columns]
    step, apart = (2, 1) if rule.interleaved else (1, I)

    def sums(place_I: Tensor) -> Tensor:
        sum_CI = x_CH @ m.read("experts.gate_up_E2IH", (expert, place_I)).T
        if "experts.gate_up_bias_E2I" in m:
            sum_CI = sum_CI + m.read("experts.gate_up_bias_E2I", (expert, place_I))
        return sum_CI

    if rule.has_gate:
        h_CI = activated(sums(step * place_I), sums(step * place_I + apart), rule)
    else:
        h_CI = activated(None, sums(place_I), rule)
    m.write("scratch.h_CI", (own, columns), h_CI)


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


def shared_ffn1(m: Memory, tile: int, block: int) -> None:
    """h of a slice for one row tile and one block of I; zero past the last of its columns."""
    I, J = m.spec.intermediate, m.spec.shared_width
    at, own, index = shared_rows(m, tile)
    columns = columns_of(block, block + 1, m.spec.block_i, I)
    inside = slice(min(index * I + columns.start, J), min(index * I + columns.stop, J))
    x_TH = m.read("x_TH", at)
    up_TI = x_TH @ m.read("shared.up_JH", inside).T
    gate_TI = x_TH @ m.read("shared.gate_JH", inside).T if m.spec.expert.has_gate else None
    h_TI = activated(gate_TI, up_TI, m.spec.expert)
    missing = columns.stop - columns.start - h_TI.shape[1]
    m.write("scratch.h_CI", (own, columns), pad(h_TI, (0, missing)))


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
