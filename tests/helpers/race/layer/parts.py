"""Launches of a part of the layer: the experts' rows alone, and the combine of given rows."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megakernel import KernelConfig, prepare_replay
from megakernel.launch.call import Call, CallRule
from megakernel.launch.collect import shared_of, slots_of, tensors_of
from megakernel.launch.run import launch as run
from megakernel.plan.buffers import Buffers, Routing, Rows, Scratch
from megakernel.plan.rules import RouterRule
from megakernel.plan.schedule import bound_tiles

if TYPE_CHECKING:
    from tests.helpers.race.layer.launches import Launch


def call_part(launch: "Launch", config: KernelConfig) -> Tensor:
    """Run the stages of a launch that is not a whole layer, and return what it writes."""
    experts = launch.layer.experts
    num_experts, height = experts.num_experts, config.block_rows
    rows, num_tiles = Rows(), bound_tiles(launch.ids_TK.numel(), num_experts, height)
    if launch.route == "replay":
        replay = prepare_replay(launch.ids_TK, num_experts, launch.placement, config)
        replay = replay.of_height(height)
        rows, num_tiles = replay.rows, replay.num_tiles
    _, split, _ = slots_of(launch.placement)
    rule = CallRule(
        launch.stages, launch.route, split, RouterRule(), experts.rule, experts.transposed, config
    )
    # An output whose padding nobody has to write, or an input.
    y_CH = torch.full((num_tiles * height, experts.down_EHI.shape[1]), 0.5)
    if launch.stages == "combine":
        buffers = combine_buffers(launch, rows, y_CH)
        run(Call(buffers, rule))
        return buffers.y_TH
    run(Call(rows_buffers(launch, rows, y_CH), rule, num_tiles))
    return y_CH


def rows_buffers(launch: "Launch", rows: Rows, y_CH: Tensor) -> Buffers:
    """Collect the tensors of the experts' stage."""
    experts = launch.layer.experts
    slots, _, slot_of_TK = slots_of(launch.placement)
    return Buffers(
        launch.layer.x_TH,
        experts=tensors_of(experts),
        shared=shared_of(experts),
        routing=Routing(launch.ids_TK, slot_of_TK=slot_of_TK),
        slots=slots,
        rows=rows,
        scratch=Scratch(y_CH=y_CH),
    )


def combine_buffers(launch: "Launch", rows: Rows, y_CH: Tensor) -> Buffers:
    """Collect the tensors of the combine."""
    return Buffers(
        routing=Routing(gate_TK=torch.full(launch.ids_TK.shape, 0.5)),
        rows=Rows(rows.row_of_TK),
        scratch=Scratch(y_CH=y_CH),
        y_TH=torch.empty(launch.tokens, y_CH.shape[1]),
    )
