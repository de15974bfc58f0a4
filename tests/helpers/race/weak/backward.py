"""Weaknesses of the backward: what is awaited and signalled, which rows and cells are touched."""

from tests.helpers.race.weak.mutant import (
    DISPATCH,
    EARLY,
    ORDER,
    STALLS,
    UNSURE,
    UNWRITTEN,
    Mutant,
    edited,
)

KERNEL = "megakernel.device.backward_kernel.backward_kernel"
ROWS = "megakernel.device.backward"
WEIGHING = "megakernel.device.weighing"
GRADIENTS = "megakernel.device.gradients"
WAIT_OF, SIGNAL_OF, DH_COUNTER_OF = (
    f"megakernel.plan.backward_order.{name}"
    for name in ("backward_wait_of", "backward_signal_of", "dh_counter_of")
)
OUTSIDE = "outside every tensor"
BACK, SHARED, NOTHING = "backward", "backward-shared", "backward-nothing"


def weak(name: str, old: str, new: str, reads: str, launch: str = BACK, **more: object) -> Mutant:
    """Change what a task waits for; it then reads something that may not be there yet."""
    finding = f"reads .*{reads}.*{UNSURE}"
    return edited(name, finding, WAIT_OF, old, new, launch=launch, **more)


ALL_DH = "least = tl.where(after_dh, size.num_tiles * C.i_blocks, least)"


def without_dh(kind: str, name: str, reads: str, launch: str = BACK, **more: object) -> Mutant:
    """Let tasks of a kind not wait for dH."""
    spared = ALL_DH.replace("after_dh", f"after_dh & (kind != C.{kind})")
    return weak(f"{name} awaits no dH", ALL_DH, spared, reads, launch, **more)


WAITS = [
    weak("dX awaits no dH", "is_dx | (is_dh & C.recomputes)", "is_dh & C.recomputes", "dz_C2I",
         sampled=True),
    weak("dX of the shared expert awaits no dH", "(kind == C.DX) | (kind == C.SHARED_DX)",
         "kind == C.DX", "dz_C2I", SHARED),
    weak("dX awaits one dH block less", "(is_dh & C.recomputes), C.i_blocks",
         "(is_dh & C.recomputes), C.i_blocks - 1", "dz_C2I"),
    weak("dX awaits the row tile before its own", "dh_counter_of(tile, C)",
         "dh_counter_of(max(tile - 1, 0), C)", "dz_C2I"),
    without_dh("DS", "dS", "ds_CB"),
    without_dh("DGATE_UP", "dGateUp", "dz_C2I"),
    without_dh("DDOWN", "dDown", "a_CI"),
    without_dh("DBIAS", "dBias", "dz_C2I", "backward-biased"),
    without_dh("SHARED_DGATE_UP", "dGateUp of the shared expert", "dz_C2I", SHARED),
    without_dh("SHARED_DDOWN", "dDown of the shared expert", "a_CI", SHARED),
    weak("dS and weights await one dH task less", "size.num_tiles * C.i_blocks, least",
         "size.num_tiles * C.i_blocks - 1, least", "(ds_CB|dz_C2I|a_CI)", sampled=True),
    weak("dS and weights await one row tile less", "size.num_tiles * C.i_blocks, least",
         "(size.num_tiles - 1) * C.i_blocks, least", "(ds_CB|dz_C2I|a_CI)"),
    weak("dx awaits no dS", "(kind == C.DX_SUM) & C.has_ds", "kind < 0", "dlogits_TE"),
    weak("dx awaits no dX", "size.num_tiles * C.dx_tasks", "0", "dx_CH"),
    weak("dx awaits one dX task less", "size.num_tiles * C.dx_tasks",
         "size.num_tiles * C.dx_tasks - 1", "dx_CH"),
    weak("dx awaits dH for dX", "C.DX_SUM, C.DX_DONE, counter", "C.DX_SUM, C.DH_DONE, counter",
         "dx_CH"),
    weak("dRouter awaits no dS", "(kind == C.DROUTER) | (kind == C.DTOKEN_GATE)",
         "kind == C.DTOKEN_GATE", "dlogits_TE", "backward-router", sampled=True),
    weak("dTokenGate awaits no dS", "(kind == C.DROUTER) | (kind == C.DTOKEN_GATE)",
         "kind == C.DROUTER", "dtoken_T", SHARED),
    weak("dH awaits no FFN1 that is run again", "(is_dh & C.recomputes)", "(kind < 0)", "z_A2I",
         NOTHING),
    weak("dH of the shared expert awaits no FFN1", "(kind == C.DH) | (kind == C.SHARED_DH)",
         "kind == C.DH", "shared_z_S2I", SHARED),
    edited("the backward awaits its tables one task too late", f"(rows_of_tile|row_of).*{UNSURE}",
           KERNEL, "task >= tables_from:", "task > tables_from:", launch=BACK),
]  # fmt: skip

WORK = "        if kind == C.DH:\n"
SAY_SO = "        signal_task(kind, tile, block, b, C)\n"


def early(kind: str, **more: object) -> Mutant:
    """Let tasks of a kind signal before their work."""
    edits = (
        (KERNEL, WORK, f"        if kind == C.{kind}:\n    {SAY_SO}{WORK}"),
        (KERNEL, f"C)\n{SAY_SO}", f"C)\n        if kind != C.{kind}:\n    {SAY_SO}"),
    )
    name = f"d{kind.removeprefix('D')} signals before its stores"
    return Mutant(name, EARLY, edits, BACK, **more)  # type: ignore[arg-type]


def silent(name: str, old: str, new: str, **more: object) -> Mutant:
    """Let tasks of a kind not signal."""
    return edited(f"{name} does not signal", STALLS, SIGNAL_OF, old, new, launch=BACK, **more)


SIGNALS = [
    early("DH"),
    early("DX"),
    early("DS"),
    silent("dH of a row tile", "is_dh, dh_counter_of(tile, C), counter",
           "is_dh, -1, counter", sampled=True),
    silent("dH of the whole launch", "is_dh, C.DH_DONE, -1", "kind < 0, C.DH_DONE, -1"),
    silent("dX", "is_dx, C.DX_DONE, counter", "kind < 0, C.DX_DONE, counter"),
    silent("dS", "C.DS, C.DS_DONE, counter", "C.DS, -1, counter"),
    edited("dX signals where dS does too", f"dlogits_TE.*{UNSURE}", SIGNAL_OF,
           "    if NUMBER == 0:\n",
           "    counter = tl.where(kind == C.DX, C.DS_DONE, counter)\n    if NUMBER == 0:\n",
           launch=BACK),
    edited("dH signals a second time", f"(ds_CB|dz_C2I).*{UNSURE}", SIGNAL_OF,
           "is_dh, dh_counter_of(tile, C), counter", "is_dh, C.DH_DONE, counter",
           launch="backward-weights"),
    edited("FFN1 and dH of a row tile share a counter", UNSURE, DH_COUNTER_OF,
           "C.first_tile_counter + 2 * tile + 1", "C.first_tile_counter + 2 * tile",
           launch=NOTHING),
]  # fmt: skip

FILLED = ("inside = row < filled", "inside = row <= filled")
COUNTED = ("inside = ordinal < num_rows", "inside = ordinal <= num_rows")
EXISTS = "exists = token < size.num_tokens"
ACCESSES = [
    edited("dH takes a padded row for a token's", OUTSIDE, f"{ROWS}.dh_tile", *FILLED,
           launch=BACK),
    edited("dGateUp and dDown go past an expert's last row tile", f"(dz_C2I|a_CI).*{UNWRITTEN}",
           f"{GRADIENTS}.rows_product", "tl.range(0, num_rows,",
           "tl.range(0, num_rows + C.grad_step,", launch=BACK),
    edited("dH leaves rows that do not exist as they were", f"(dz_C2I|a_CI).*{UNWRITTEN}",
           f"{ROWS}.finish_dh", "every = row < C.block_rows", "every = inside",
           launch="backward-weights", sampled=True),
    edited("dBias goes past an expert's rows", f"dz_C2I.*{UNWRITTEN}", f"{GRADIENTS}.dbias_tile",
           *COUNTED, launch="backward-biased"),
    edited("a dH block leaves out its gradient of z", f"dz_C2I.*{UNWRITTEN}", f"{ROWS}.finish_dh",
           "if b.scratch.dz_C2I is not None:",
           "if b.scratch.dz_C2I is not None and first == 0:", launch=BACK),
    edited("dH's blocks put their parts of dS in one place", "ds_CB.*writes",
           f"{ROWS}.store_ds", "* C.i_blocks + block", "* C.i_blocks", launch=BACK),
    edited("dS leaves out the last token", f"dlogits_TE.*{UNWRITTEN}",
           f"{WEIGHING}.store_dlogits", "(token < size.num_tokens)[:, None] & (expert",
           "(token < size.num_tokens - 1)[:, None] & (expert", launch=BACK),
    edited("dS reads a part that choices without a row do not have", f"dS, .* reads .*{UNWRITTEN}",
           f"{WEIGHING}.dgate_of", "held = row >= 0", "held = inside", launch="backward-given"),
    edited("dx reads a row that a choice does not have", f"dx, .* reads .*{UNWRITTEN}",
           f"{ROWS}.rows_of_token", "(row >= 0)[:, None]", "exists[:, None]",
           launch="backward-given"),
    edited("dx leaves out the last token", "nobody wrote .*x_TH", f"{ROWS}.dx_sum_tile",
           EXISTS, f"{EXISTS} - 1", launch=BACK),
    edited("dx goes past the last token", OUTSIDE, f"{ROWS}.dx_sum_tile", EXISTS,
           f"{EXISTS} + 1", launch=BACK),
    edited("dRouter leaves out the last expert", "nobody wrote .*router_weight_EH",
           f"{GRADIENTS}.dweight_tile", "(expert < C.num_experts)",
           "(expert < C.num_experts - 1)", launch="backward-router"),
    edited("dRouter reads logits of tokens that are not there", f"{OUTSIDE}|{UNWRITTEN}",
           f"{GRADIENTS}.load_dlogits", "< size.num_tokens)", "<= size.num_tokens)",
           launch="backward-router"),
    edited("an expert without rows gets no gradient", "nobody wrote .*gate_up_E2IH",
           f"{GRADIENTS}.dgate_up_tile", "(num_rows > 0) | (is_added == 0)", "num_rows > 0",
           launch=BACK),
    edited("two tasks own one tile of dDown", "down_EHI.*writes|nobody wrote .*down_EHI",
           f"{GRADIENTS}.ddown_tile", "h_block = block // C.down_columns",
           "h_block = block // C.down_columns // 2", launch=BACK),
    edited("gradients are added to what nobody wrote", f"gradients.*{UNWRITTEN}",
           f"{GRADIENTS}.store_gradient", "inside & (is_added != 0)", "inside", launch=BACK),
    edited("scatter does not say where an expert's rows start", f"row.*_of_E.*{UNWRITTEN}",
           f"{DISPATCH}.scatter_tile", "if b.rows.rows_of_E is not None:",
           "if b.rows.rows_of_E is None:", launch=BACK),
    edited("half of a backward's counters are not reset", "is not zero at the end",
           f"{ORDER}.count_counters", "C.counters_per_tile * size.num_tiles",
           "size.num_tiles", launch=BACK),
]  # fmt: skip
BACKWARD = [*WAITS, *SIGNALS, *ACCESSES]
