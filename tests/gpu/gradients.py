"""One forward and backward of the layer on a device, and what its gradients must be."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megakernel import (
    Experts,
    KernelConfig,
    MainGrad,
    Router,
    moe,
    moe_routed,
    prepare_replay,
)
from tests.gpu.checks import assert_within, fail, times_eager_error
from tests.helpers import gradients as oracle
from tests.helpers.compare import assert_same_bits, relative_error
from tests.helpers.inputs import Inputs, poison_scratch

# Against float64, whatever eager PyTorch achieves.
MOST_GRADIENT_ERROR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2.5e-2}
ROUTES = ("live", "replay", "given")
WEIGHTS = ("experts.gate_up_E2IH", "experts.down_EHI")
ADDED_TO = 0.5
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """How a layer is trained: what of it may change no bit.

    Attributes:
        route: of ROUTES; a given routing has weights of its own, and no router.
        save: see ``megakernel.moe``.
        main_grad: whether gradients of weights go into float32 buffers.
        adds: to how much of what is there they are added; None to overwrite.
    """

    route: str = "live"
    save: str = "preactivations"
    main_grad: bool = False
    adds: float | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """What one forward and backward gave.

    Attributes:
        expert_of_TK, gate_TK: the routing.
        dy_TH: the gradient that came in.
        gradients: by name, as the oracle has them.
    """

    expert_of_TK: Tensor
    gate_TK: Tensor
    dy_TH: Tensor
    gradients: Gradients


PLAIN = Way()


def upstream(inputs: Inputs) -> Tensor:
    """Return dy_TH, the same for the same inputs."""
    random = torch.Generator(inputs.x_TH.device).manual_seed(7)
    drawn = torch.randn(inputs.x_TH.shape, generator=random, device=inputs.x_TH.device)
    return drawn.to(inputs.x_TH.dtype)


def train(
    inputs: Inputs,
    config: KernelConfig,
    way: Way = PLAIN,
    routing: Trained | None = None,
    between: Callable[[], object] = poison_scratch,
) -> Trained:
    """Run one forward and backward, all scratch being NaN before each.

    Args:
        inputs: the layer.
        config: how to cut the work.
        way: how it is trained.
        routing: of a live run, for a way that replays it or is given it.
        between: done between the two.
    """
    leaves = make_leaves(inputs, way, routing)
    buffers = make_buffers(inputs.experts, way)
    experts = Experts(*(leaves[name] for name in WEIGHTS), main_grad=buffers)
    dy_TH = upstream(inputs)
    poison_scratch()
    y_TH, ids_TK, gate_TK = forward(leaves, experts, inputs.router, config, way, routing)
    between()
    found = torch.autograd.grad(y_TH, list(leaves.values()), dy_TH, allow_unused=True)
    gradients = dict(zip(leaves, found, strict=True))
    if buffers is not None:
        gradients |= {WEIGHTS[0]: buffers.gate_up_E2IH, WEIGHTS[1]: buffers.down_EHI}
    return Trained(ids_TK, gate_TK.detach(), dy_TH, gradients)


def make_leaves(inputs: Inputs, way: Way, routing: Trained | None) -> Gradients:
    """Return the layer's tensors, each asking for a gradient, by name."""
    tensors = {
        "x_TH": inputs.x_TH, "router.weight_EH": inputs.router_EH,
        WEIGHTS[0]: inputs.experts.gate_up_E2IH, WEIGHTS[1]: inputs.experts.down_EHI,
    }  # fmt: skip
    if way.route == "given":
        assert routing is not None
        del tensors["router.weight_EH"]
        tensors["routing.gate_TK"] = routing.gate_TK
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def forward(
    leaves: Gradients,
    experts: Experts,
    router: Router,
    config: KernelConfig,
    way: Way,
    routing: Trained | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the ids and the weights; arguments as those of :func:`train`."""
    x_TH, options = leaves["x_TH"], {"config": config, "save": way.save}
    if way.route == "given":
        given = routing.expert_of_TK, leaves["routing.gate_TK"]
        return moe_routed(x_TH, *given, experts, **options), *given
    if way.route == "replay":
        ids_TK = routing.expert_of_TK
        options["replay"] = prepare_replay(ids_TK, experts.num_experts, config=config)
    out = moe(x_TH, leaves["router.weight_EH"], experts, router, **options)
    return out.y_TH, out.expert_of_TK, out.gate_TK


def make_buffers(experts: Experts, way: Way) -> MainGrad | None:
    """Return float32 buffers, full of what is to be added to, or of NaN; None for none."""
    if not way.main_grad:
        return None
    there = torch.nan if way.adds is None else way.adds
    weights = experts.gate_up_E2IH, experts.down_EHI
    made = (torch.full_like(one, there, dtype=torch.float32) for one in weights)
    return MainGrad(*made, grad_added_to_main_grad=way.adds is not None)


def oracle_of(inputs: Inputs, trained: Trained, dtype: torch.dtype) -> Gradients:
    """Return the gradients by autograd through the reference: float64, or eager's own dtype."""
    ids_TK, experts = trained.expert_of_TK.long(), inputs.experts
    if "routing.gate_TK" in trained.gradients:
        routing = ids_TK, trained.gate_TK
        return oracle.oracle_routed(inputs.x_TH, *routing, experts, trained.dy_TH, dtype)
    return oracle.oracle_moe(
        inputs.x_TH, inputs.router_EH, experts, inputs.router, trained.dy_TH,
        expert_of_TK=ids_TK, dtype=dtype,
    )  # fmt: skip


def assert_right(label: str, inputs: Inputs, trained: Trained) -> float:
    """Return the worst error; fail, naming the gradient, if one is further off than eager's."""
    dtype = inputs.x_TH.dtype
    true, eager = (oracle_of(inputs, trained, one) for one in (torch.float64, dtype))
    errors = []
    for name, truth in true.items():
        eager_error = relative_error(actual=eager[name], expected=truth)
        room = times_eager_error(dtype, inputs.x_TH.device) * eager_error
        # Eager may keep a gradient wider than ours is rounded to.
        most = min(max(room, torch.finfo(dtype).eps / 2), MOST_GRADIENT_ERROR[dtype])
        errors.append(assert_within(f"{label} {name}", trained.gradients[name], truth, most))
    return max(errors)


def assert_same_gradients(
    label: str, actual: Trained, expected: Trained, names: Iterable[str] = ()
) -> None:
    """Fail, naming the gradient, unless those of some names are the same to the bit.

    Args:
        label: of what is compared.
        actual, expected: two steps.
        names: of the gradients; all of the expected ones if none is named.
    """
    for name in names or expected.gradients:
        try:
            assert_same_bits(actual=actual.gradients[name], expected=expected.gradients[name])
        except AssertionError as error:
            fail(f"{label}: {name} differs: {error}")


def assert_buffers_are_kept(
    label: str, inputs: Inputs, config: KernelConfig, plain: Trained
) -> None:
    """Fail unless float32 buffers are overwritten, or added to, by what the layer would return."""
    over = train(inputs, config, Way(main_grad=True))
    added = train(inputs, config, Way(main_grad=True, adds=ADDED_TO))
    compare_buffers(label, over, added, plain)


def compare_buffers(label: str, over: Trained, added: Trained, plain: Trained) -> None:
    """Fail unless what was written rounds to the plain gradients, and is what was added.

    The sums are the same float32 ones, and adding is one rounding of float32 more.
    """
    for name in WEIGHTS:
        whole, dtype = over.gradients[name], plain.gradients[name].dtype
        rounded = replace(over, gradients={name: whole.to(dtype)})
        assert_same_gradients(f"{label} to float32", rounded, plain, [name])
        summed = replace(over, gradients={name: whole + ADDED_TO})
        assert_same_gradients(f"{label} added to float32", added, summed, [name])
