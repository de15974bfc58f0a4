"""What the tasks mean that write gradients of expert weights, in plain PyTorch."""

from torch import Tensor

from megakernel.plan.machine_backward import backward_spec, dx_columns_of
from megakernel.plan.machine_ffn import inside_slice
from megakernel.plan.machine_memory import Index, Memory, columns_of


def rows_of_expert(m: Memory, expert: int) -> tuple[slice, slice]:
    """Return an expert's rows in the tables, and in the launch's own buffers."""
    first = int(m.read("rows.first_row_of_E", expert))
    end = first + int(m.read("rows.rows_of_E", expert))
    shared = m.size.shared_tiles * m.spec.block_rows
    return slice(first, end), slice(shared + first, shared + end)


def tokens_of_rows(m: Memory, rows: slice) -> Tensor:
    """Return the tokens that rows of the tables serve."""
    return m.read("rows.assignment_of_C", rows) // m.spec.top_k


def write_or_add(m: Memory, name: str, at: Index, rows: slice, product: Tensor) -> None:
    """Write a tile of an expert's gradient, or add it; without rows nothing is added."""
    if not m.is_added:
        m.write(name, at, product)
    elif rows.stop > rows.start:
        m.write(name, at, m.before(name, at) + product)


def dgate_up(m: Memory, expert: int, block: int) -> None:
    """dzᵀ · x over an expert's rows, for a block of rows of gate_up and some blocks of H."""
    spec = backward_spec(m)
    rows, own = rows_of_expert(m, expert)
    part, of_row = divmod(block, spec.dx_tasks)
    height = columns_of(part, part + 1, spec.block_i, spec.z_width)
    columns = dx_columns_of(m, of_row * spec.dx_per_task)
    x_CH = m.read("x_TH", (tokens_of_rows(m, rows), columns))
    product = m.read("scratch.dz_C2I", (own, height)).T @ x_CH
    write_or_add(m, "gradients.gate_up_E2IH", (expert, height, columns), rows, product)


def down_columns_of(m: Memory, part: int) -> slice:
    """Return the columns of I of the tasks of dDown that stand at one place in their row."""
    spec = backward_spec(m)
    first = part * spec.down_per_task
    end = min(first + spec.down_per_task, spec.i_blocks)
    return columns_of(first, end, spec.block_i, spec.intermediate)


def ddown(m: Memory, expert: int, block: int) -> None:
    """dyᵀ · (weighted h) over an expert's rows, for a block of H and some blocks of I."""
    spec = backward_spec(m)
    rows, own = rows_of_expert(m, expert)
    part, of_row = divmod(block, spec.down_columns)
    height = columns_of(part, part + 1, spec.block_h, spec.hidden)
    columns = down_columns_of(m, of_row)
    dy_CH = m.read("incoming.dy_TH", (tokens_of_rows(m, rows), height))
    product = dy_CH.T @ m.read("scratch.a_CI", (own, columns))
    write_or_add(m, "gradients.down_EHI", (expert, height, columns), rows, product)


def rows_of_slice(m: Memory, index: int) -> slice:
    """Return the rows of a slice of the shared expert that hold a token."""
    height = m.spec.block_rows
    first = index * -(-m.size.num_tokens // height) * height
    return slice(first, first + m.size.num_tokens)


def shared_dgate_up(m: Memory, tile: int, block: int) -> None:
    """dzᵀ · x over all tokens, for a block of rows of a slice's gate or up and some of H."""
    spec, I = backward_spec(m), m.spec.intermediate
    names = ("shared_gate_JH", "shared_up_JH") if spec.expert.has_gate else ("shared_up_JH",)
    asked = [half for half, name in enumerate(names) if f"gradients.{name}" in m]
    index, matrix = divmod(tile, len(asked))
    half = asked[matrix]
    part, of_row = divmod(block, spec.dx_tasks)
    height = columns_of(part, part + 1, spec.block_i, I)
    columns = dx_columns_of(m, of_row * spec.dx_per_task)
    inside = inside_slice(m, index, height)
    first = half * I + height.start
    place = slice(first, first + inside.stop - inside.start)
    dz_TI = m.read("scratch.dz_C2I", (rows_of_slice(m, index), place))
    x_TH = m.read("x_TH", (slice(None), columns))
    m.write(f"gradients.{names[half]}", (inside, columns), dz_TI.T @ x_TH)


def shared_ddown(m: Memory, index: int, block: int) -> None:
    """dyᵀ · (weighted h) over all tokens, for a block of H and some blocks of a slice."""
    spec = backward_spec(m)
    part, of_row = divmod(block, spec.down_columns)
    height = columns_of(part, part + 1, spec.block_h, spec.hidden)
    columns = down_columns_of(m, of_row)
    inside = inside_slice(m, index, columns)
    place = slice(columns.start, columns.start + inside.stop - inside.start)
    a_TI = m.read("scratch.a_CI", (rows_of_slice(m, index), place))
    dy_TH = m.read("incoming.dy_TH", (slice(None), height))
    m.write("gradients.shared_down_HJ", (height, inside), dy_TH.T @ a_TI)


def dbias(m: Memory, expert: int, block: int) -> None:
    """Sums of an expert's dz, or of its weighted dy, for one block of columns of a bias."""
    spec = backward_spec(m)
    rows, own = rows_of_expert(m, expert)
    if block < spec.gate_up_bias_blocks:
        columns = columns_of(block, block + 1, spec.block_h, spec.z_width)
        total = m.read("scratch.dz_C2I", (own, columns)).sum(0)
        m.write("gradients.gate_up_bias_E2I", (expert, columns), total)
        return
    second = block - spec.gate_up_bias_blocks
    columns = columns_of(second, second + 1, spec.block_h, spec.hidden)
    assignment_C = m.read("rows.assignment_of_C", rows)
    choice = assignment_C // spec.top_k, assignment_C % spec.top_k
    dy_CH = m.read("incoming.dy_TH", (assignment_C // spec.top_k, columns))
    total = m.read("routing.gate_TK", choice) @ dy_CH
    m.write("gradients.down_bias_EH", (expert, columns), total)
