"""The launch in plain PyTorch: runs a Schedule task by task and checks every wait on the way."""

from collections import Counter, defaultdict

import torch
from torch import Tensor

import reference
from megakernel.plan.schedule import Schedule, Task
from tests.helpers.inputs import Inputs


class TaskRunner:
    """Buffers of one live launch with slots = experts, named as the kernel names them."""

    def __init__(self, inputs: Inputs, schedule: Schedule) -> None:
        """Fill every buffer with what no task may leave behind."""
        self.inputs, self.schedule, self.spec = inputs, schedule, schedule.spec
        spec, num_tokens, num_tiles = self.spec, schedule.num_tokens, schedule.num_tiles
        num_rows = num_tiles * spec.block_rows
        self.counters: Counter[int] = Counter()
        self.expert_of_TK = torch.full((num_tokens, spec.top_k), -7)
        self.gate_TK = torch.full((num_tokens, spec.top_k), torch.nan)
        self.logits_TE = torch.full((num_tokens, spec.num_experts), torch.nan)
        self.base_GB = torch.full((schedule.token_tiles, spec.num_bins), -7)
        self.total_B = torch.full((spec.num_bins,), -7)
        self.rank_TK = torch.full((num_tokens, spec.top_k), -7)
        self.row_of_TK = torch.full((num_tokens, spec.top_k), -7)
        self.assignment_of_C = torch.full((num_rows,), -7)
        self.expert_of_tile = torch.full((num_tiles,), -7)
        self.rows_of_tile = torch.full((num_tiles,), -7)
        self.h_CI = torch.full((num_rows, spec.intermediate), torch.nan)
        self.y_CH = torch.full((num_rows, spec.hidden), torch.nan)
        self.y_TH = torch.full_like(inputs.x_TH, torch.nan)

    def run(self) -> Tensor:
        """Run the list in order, one worker; a wait that would block is an error."""
        spec = self.spec
        steps = {
            spec.GATE: self.gate,
            spec.PREFIX: self.prefix,
            spec.SCATTER: self.scatter,
            spec.FFN1: self.ffn1,
            spec.FFN2: self.ffn2,
            spec.COMBINE: self.combine,
        }
        for task in self.schedule.tasks():
            for counter, target in self.schedule.waits(task):
                assert self.counters[counter] >= target, (task, counter)
            steps[task.kind](task)
            if (counter := self.schedule.signal(task)) is not None:
                self.counters[counter] += 1
        return self.y_TH

    def tokens(self, tile: int, height: int) -> slice:
        """Return the tokens of a tile."""
        return slice(tile * height, min((tile + 1) * height, self.schedule.num_tokens))

    def gate(self, task: Task) -> None:
        """Logits, ids, weights, and ranks by counting within the tile."""
        tokens = self.tokens(task.tile, self.spec.block_tokens)
        logits_TE = self.inputs.x_TH[tokens] @ self.inputs.router_EH.T
        self.logits_TE[tokens] = logits_TE
        ids_TK = reference.select(logits_TE, self.spec.top_k)
        self.expert_of_TK[tokens] = ids_TK
        self.gate_TK[tokens] = reference.weigh(logits_TE, ids_TK, self.spec.gate.renormalize)
        seen: dict[int, int] = defaultdict(int)
        for token, experts in enumerate(ids_TK.tolist(), start=tokens.start):
            for choice, expert in enumerate(experts):
                self.rank_TK[token, choice] = seen[expert]
                seen[expert] += 1
        self.base_GB[task.tile] = torch.tensor([seen[b] for b in range(self.spec.num_bins)])

    def prefix(self, task: Task) -> None:
        """Counts of all tiles to first ordinals and totals, for one block of bins."""
        first = task.tile * self.spec.PREFIX_BINS
        bins = slice(first, first + self.spec.PREFIX_BINS)
        count_GB = self.base_GB[:, bins].clone()
        self.base_GB[:, bins] = count_GB.cumsum(0) - count_GB
        self.total_B[bins] = count_GB.sum(0)

    def scatter(self, task: Task) -> None:
        """Rows of one token tile, and a share of the row tile table."""
        spec = self.spec
        tiles_P = -(-self.total_B // spec.block_rows)
        start_P = tiles_P.cumsum(0) - tiles_P
        share = -(-self.schedule.num_tiles // self.schedule.token_tiles)
        last = min((task.tile + 1) * share, self.schedule.num_tiles)
        for tile in range(task.tile * share, last):
            holder = ((start_P <= tile) & (tile < start_P + tiles_P)).nonzero().flatten().tolist()
            self.expert_of_tile[tile] = holder[0]
            left = self.total_B[holder[0]] - (tile - start_P[holder[0]]) * spec.block_rows
            self.rows_of_tile[tile] = left.clamp(max=spec.block_rows)
        tokens = self.tokens(task.tile, spec.block_tokens)
        ids_TK = self.expert_of_TK[tokens]
        ordinal_TK = self.rank_TK[tokens] + self.base_GB[task.tile][ids_TK]
        row_TK = start_P[ids_TK] * spec.block_rows + ordinal_TK
        self.row_of_TK[tokens] = row_TK
        assignment_TK = torch.arange(self.row_of_TK.numel()).view_as(self.row_of_TK)
        self.assignment_of_C[row_TK] = assignment_TK[tokens]

    def rows(self, tile: int) -> slice:
        """Return the filled rows of a row tile."""
        first = tile * self.spec.block_rows
        return slice(first, first + int(self.rows_of_tile[tile]))

    def ffn1(self, task: Task) -> None:
        """h = silu(x · gateᵀ) * (x · upᵀ) for one row tile and one block of I."""
        rows = self.rows(task.tile)
        x_CH = self.inputs.x_TH[self.assignment_of_C[rows] // self.spec.top_k]
        gate_up_2IH = self.inputs.experts.gate_up_E2IH[int(self.expert_of_tile[task.tile])]
        gate_IH, up_IH = gate_up_2IH.chunk(2)
        columns = slice(task.block * self.spec.block_i, (task.block + 1) * self.spec.block_i)
        gate_CI = x_CH @ gate_IH[columns].T
        self.h_CI[rows, columns] = torch.nn.functional.silu(gate_CI) * (x_CH @ up_IH[columns].T)

    def ffn2(self, task: Task) -> None:
        """y = h · downᵀ for one row tile and one block of H."""
        rows = self.rows(task.tile)
        down_HI = self.inputs.experts.down_EHI[int(self.expert_of_tile[task.tile])]
        columns = slice(task.block * self.spec.block_h, (task.block + 1) * self.spec.block_h)
        self.y_CH[rows, columns] = self.h_CI[rows] @ down_HI[columns].T

    def combine(self, task: Task) -> None:
        """Sum the weighted rows of one token tile in one column group."""
        width = self.spec.group_blocks * self.spec.block_h
        columns = slice(task.block * width, (task.block + 1) * width)
        tokens = self.tokens(task.tile, self.spec.combine_tokens)
        y_TKH = self.y_CH[:, columns][self.row_of_TK[tokens]]
        self.y_TH[tokens, columns] = (self.gate_TK[tokens][..., None] * y_TKH).sum(1)
