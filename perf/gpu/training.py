"""First times of the backward: by CUDA graph, beside that of PyTorch's grouped products."""

from functools import partial

from megakernel import KernelConfig
from megakernel.launch.call import Call
from perf.gpu.child import Context
from perf.gpu.plans import TRAINED
from perf.gpu.recording import GPU, recording, stand_in_problem
from perf.gpu.timing import bounded_config, make_bench, make_case, told
from perf.problems.cases import SHAPES, Case
from perf.problems.providers import Provider, configured_call, grouped_mm
from perf.problems.training import make_step
from perf.suites.training import time_steps


def ours(config: KernelConfig) -> tuple[Provider, ...]:
    """Return our layer with a config, as it may be trained."""

    def one(name: str, route: str, save: str = "preactivations", main_grad: str = "") -> Provider:
        prepare = partial(configured_call, route=route, config=config, save=save)
        return Provider(name, prepare, is_ours=True, trains=True, main_grad=main_grad)

    return (
        one("ours live", "live"),
        one("ours replay", "replay"),
        one("ours saving nothing", "live", save="nothing"),
        one("ours added to float32", "live", main_grad="added"),
    )


def time_backward(context: Context, model: str, num_tokens: str) -> dict:
    """Check every gradient of a layer, then time its backward.

    Raises:
        AssertionError: if something of ours is wrong, which then has no time.
    """
    case, bench = make_case(context, model, num_tokens), make_bench(context)
    providers = (
        *ours(bounded_config(case, context.device)),
        Provider("grouped_mm", grouped_mm, trains=True),
    )
    timing_of = time_steps(bench, "backward", case, providers)
    return told(context, bench, timing_of, f"backward_{case.model.name}_{num_tokens}")


def calls() -> list[Call]:
    """Return the calls of this module's steps."""
    with recording() as found:
        for model, num_tokens in TRAINED:
            case = Case(SHAPES[model], num_tokens)
            problem = stand_in_problem(case)
            for provider in ours(bounded_config(case, GPU)):
                make_step(provider, problem)()
    return found
