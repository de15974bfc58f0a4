"""What the backward's tasks on rows mean, in plain PyTorch: dH, dX, and dx of tokens.

Derivatives of activations are autograd's, of the functions in ``machine_ffn.py``: they share no
formula with the device code.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.machine_ffn import (
    activated,
    filled_rows,
    halves_of,
    inside_slice,
    shared_rows,
)
from megakernel.plan.machine_memory import Index, Memory, columns_of, tokens_of


def backward_spec(m: Memory) -> BackwardSpec:
    """Return the spec of the launch, which is a backward's."""
    assert isinstance(m.spec, BackwardSpec)
    return m.spec


def finish_dh(
    m: Memory, at: tuple[slice, int], z_CI: list[Tensor], da_CI: Tensor, weight_C: Tensor
) -> list[Tensor]:
    """Write h weighted and a block's part of <dA', h>; return the gradients of z.

    Args:
        m: memory.
        at: filled rows of the launch's own buffers, and which block of I.
        z_CI: gate and up, or up alone.
        da_CI: dA' = dy · down, not weighted.
        weight_C: of each row.
    """
    rows, block = at
    columns = columns_of(block, block + 1, m.spec.block_i, m.spec.intermediate)
    with torch.enable_grad():
        leaves = [half_CI.detach().requires_grad_() for half_CI in z_CI]
        h_CI = activated(leaves, m.spec.expert)
        dz_CI = torch.autograd.grad(h_CI, leaves, weight_C[:, None] * da_CI)
    h_CI = h_CI.detach()
    if "scratch.ds_CB" in m:
        m.write("scratch.ds_CB", (rows, block), (da_CI * h_CI).sum(1))
    place_I = torch.arange(columns.start, columns.stop, device=m.device)
    write_tile(m, "scratch.a_CI", (rows, place_I), weight_C[:, None] * h_CI)
    return list(dz_CI)


def write_tile(m: Memory, name: str, at: tuple[slice, Tensor], values: Tensor) -> None:
    """Write columns of a whole row tile, where they are wanted: zeros in rows that it lacks.

    The gradients of weights are sums over rows in steps, and count on those zeros.

    Args:
        m: memory.
        name: of the buffer.
        at: filled rows, and which columns.
        values: of the filled rows.
    """
    rows, place_I = at
    if name in m:
        height = m.spec.block_rows
        row_C = torch.arange(rows.start, rows.start + height, device=m.device)
        missing = height - len(values)
        m.write(name, (row_C[:, None], place_I[None, :]), pad(values, (0, 0, 0, missing)))


def write_dz(m: Memory, rows: slice, halves: list[Tensor], dz_CI: list[Tensor]) -> None:
    """Write the gradients of gate and up where their sums lie among the columns of z."""
    for place_I, half_CI in zip(halves, dz_CI, strict=True):
        write_tile(m, "scratch.dz_C2I", (rows, place_I), half_CI)


def dh(m: Memory, tile: int, block: int) -> None:
    """dA' = dy · down, dA = weight · dA', dz = dA · activation', for a row tile, a block of I."""
    spec, I = m.spec, m.spec.intermediate
    rows, own, expert = filled_rows(m, tile)
    assignment_C = m.read("rows.assignment_of_C", rows)
    columns = columns_of(block, block + 1, spec.block_i, I)
    dy_CH = m.read("incoming.dy_TH", assignment_C // spec.top_k)
    da_CI = dy_CH @ m.read("experts.down_EHI", (expert, slice(None), columns))
    halves = halves_of(spec.expert, torch.arange(I, device=m.device)[columns], I)
    z_CI = [m.read("saved.z_A2I", (assignment_C[:, None], place_I[None, :])) for place_I in halves]
    choice = assignment_C // spec.top_k, assignment_C % spec.top_k
    dz_CI = finish_dh(m, (own, block), z_CI, da_CI, m.read("routing.gate_TK", choice))
    write_dz(m, own, halves, dz_CI)


def shared_dh(m: Memory, tile: int, block: int) -> None:
    """Do the same for a row tile of the shared expert; zero past the last column of a slice."""
    I = m.spec.intermediate
    at, own, index = shared_rows(m, tile)
    columns = columns_of(block, block + 1, m.spec.block_i, I)
    inside = inside_slice(m, index, columns)
    dy_TH = m.read("incoming.dy_TH", at)
    da_TI = dy_TH.new_zeros(len(dy_TH), columns.stop - columns.start)
    da_TI[:, : inside.stop - inside.start] = dy_TH @ m.read(
        "shared.down_HJ", (slice(None), inside)
    )
    kept = slice(index * m.size.num_tokens + at.start, index * m.size.num_tokens + at.stop)
    place_I = torch.arange(I, device=m.device)[columns]
    # Gate and up of the shared expert are matrices of their own: they never take turns.
    halves = [place_I, I + place_I] if m.spec.expert.has_gate else [place_I]
    z_TI = [m.read("saved.shared_z_S2I", kept)[:, half] for half in halves]
    weight_T = torch.ones(len(dy_TH), dtype=m.wide, device=m.device)
    if "saved.sigmoid_T" in m:
        weight_T = m.read("saved.sigmoid_T", at)
    write_dz(m, own, halves, finish_dh(m, (own, block), z_TI, da_TI, weight_T))


def dx_columns_of(m: Memory, first: int) -> slice:
    """Return the columns of H of a task that begins with a block: those of dX and of dGateUp."""
    spec = backward_spec(m)
    end = min(first + spec.dx_per_task, spec.h_blocks)
    return columns_of(first, end, spec.block_h, spec.hidden)


def dx(m: Memory, tile: int, block: int) -> None:
    """Each row's gradient of its token, dz · gate_up, for a row tile and its task's columns."""
    _, own, expert = filled_rows(m, tile)
    columns = dx_columns_of(m, block)
    weight_2IH = m.read("experts.gate_up_E2IH", (expert, slice(None), columns))
    m.write("scratch.dx_CH", (own, columns), m.read("scratch.dz_C2I", own) @ weight_2IH)


def shared_dx(m: Memory, tile: int, block: int) -> None:
    """Do the same for a row tile of a slice: dz of gate · gate, plus dz of up · up."""
    I = m.spec.intermediate
    _, own, index = shared_rows(m, tile)
    columns = dx_columns_of(m, block)
    inside = columns_of(index, index + 1, I, m.spec.shared_width)
    dz_T2I = m.read("scratch.dz_C2I", own)
    total_TH: Tensor | float = 0.0
    names = ("gate_JH", "up_JH") if m.spec.expert.has_gate else ("up_JH",)
    for half, name in enumerate(names):
        weight_IH = m.read(f"shared.{name}", (inside, columns))
        total_TH = total_TH + dz_T2I[:, half * I : half * I + len(weight_IH)] @ weight_IH
    m.write("scratch.dx_CH", (own, columns), total_TH)


def dx_sum(m: Memory, tile: int, group: int) -> None:
    """dx = each token's rows in k order + shared ones + dlogits · router + dtoken · token gate."""
    spec = backward_spec(m)
    columns = columns_of(group, group + 1, spec.group_blocks * spec.block_h, spec.hidden)
    for token in tokens_of(m, tile, spec.combine_tokens):
        total_H = torch.zeros(columns.stop - columns.start, dtype=m.wide, device=m.device)
        for row in rows_of_token(m, token):
            total_H = total_H + m.read("scratch.dx_CH", (row, columns))
        if spec.gradients.weighs:
            total_H = total_H + through_router(m, token, columns)
        if spec.gradients.token_gated:
            gate_H = m.read("shared.token_gate_1H", (0, columns))
            total_H = total_H + m.read("scratch.dtoken_T", token) * gate_H
        m.write("gradients.x_TH", (token, columns), total_H)


def rows_of_token(m: Memory, token: int) -> list[int]:
    """Return the rows of a token in the launch's own buffers: in k order, then by slice."""
    height = m.spec.block_rows
    padded_tokens = -(-m.size.num_tokens // height) * height
    first_row = m.size.shared_tiles * height
    routed = [first_row + row for row in m.read("rows.row_of_TK", token).tolist() if row >= 0]
    return routed + [index * padded_tokens + token for index in range(m.spec.num_slices)]


def through_router(m: Memory, token: int, columns: Index) -> Tensor:
    """Return dlogits · router, the former rounded to the latter's dtype as a product asks."""
    dlogits_E = m.rounded_as("router.weight_EH", m.read("scratch.dlogits_TE", token))
    return dlogits_E @ m.read("router.weight_EH", (slice(None), columns))
