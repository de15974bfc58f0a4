"""Predict the backward, from its own task list: the same queue, the costs of its tasks.

Layers without biases and without a shared expert; everything is asked for: x, the router and both
weights.
"""

from dataclasses import replace

import numpy as np

from megakernel.autograd import backward_call, kept_of, with_saved
from megakernel.config import KernelConfig
from megakernel.launch.call import make_spec
from megakernel.plan.backward_spec import BackwardSpec
from megakernel.plan.schedule import Schedule
from megakernel.tools.compile_cases import CompileCase, make_call
from megakernel.tools.models import ModelShape
from megakernel.tools.timeline import Timeline
from perf.simulator.backward_costs import BackwardCosts
from perf.simulator.costs import H200, Machine
from perf.simulator.predict import Launch, make_tiles, simulate

ASKED_FOR = ["x_TH", "router.weight_EH", "experts.gate_up_E2IH", "experts.down_EHI"]


def backward_spec_of(
    model: ModelShape, route: str, config: KernelConfig, save: str
) -> BackwardSpec:
    """Return what the backward of a layer would be specialised on.

    Args:
        model: sizes of the layer.
        route: live, or replay, whose tables come with the call.
        config: how the work is cut.
        save: as in ``megakernel.moe``.
    """
    call = with_saved(make_call(CompileCase("predicted", config, model, "live")), save)
    kept = kept_of(call.buffers)
    spec = make_spec(backward_call(kept, call.rule, None, ASKED_FOR, (call.tokens,)))
    assert isinstance(spec, BackwardSpec)
    return replace(spec, route="replay" if route == "replay" else "given", interpreted=False)


def make_backward_launch(
    model: ModelShape,
    num_tokens: int,
    load_E: np.ndarray,
    config: KernelConfig,
    route: str = "live",
    save: str = "preactivations",
    machine: Machine = H200,
) -> Launch:
    """Describe the backward launch of a config for a routing; see ``predict.make_launch``."""
    tiles = make_tiles(load_E, config.block_rows)
    workers = config.num_workers or machine.num_sms * config.workers_per_sm
    spec = backward_spec_of(model, route, config, save)
    return Launch(Schedule(spec, num_tokens, len(tiles.rows_of_tile)), tiles, workers)


def predict_backward(
    model: ModelShape,
    num_tokens: int,
    load_E: np.ndarray,
    config: KernelConfig,
    route: str = "live",
    save: str = "preactivations",
    gradients: str = "bfloat16",
    machine: Machine = H200,
) -> Timeline:
    """Predict a backward launch with roofline costs.

    Args:
        model: sizes of the layer.
        num_tokens: T, at least 1.
        load_E: assignments of each expert.
        config: how the work is cut.
        route: live or replay.
        save: as in ``megakernel.moe``.
        gradients: key of GRADIENT_BYTES, how gradients of expert weights are kept.
        machine: the GPU.
    """
    launch = make_backward_launch(model, num_tokens, load_E, config, route, save, machine)
    spec = launch.schedule.spec
    assert isinstance(spec, BackwardSpec)
    costs = BackwardCosts(
        spec, num_tokens, launch.tiles, launch.num_workers, machine, gradients=gradients
    )
    return simulate(launch, costs, machine)
