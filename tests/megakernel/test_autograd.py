"""The layer under autograd: what is launched and kept, torch's own tools, refusals."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from megakernel import (
    Experts,
    KernelConfig,
    MainGrad,
    MegakernelStall,
    Router,
    moe,
    moe_routed,
)
from megakernel.autograd import DIFFERENTIABLE, backward_call, differentiable_of, kept_of
from megakernel.device.kernel import moe_kernel
from megakernel.launch.call import make_spec
from megakernel.launch.workspace import workspace_for
from megakernel.plan.buffers import flatten
from megakernel.plan.protocol import Protocol
from tests.helpers.compare import assert_refused, assert_same_bits
from tests.helpers.dialects import make_dialect
from tests.helpers.gradients import LAYERS, Incoming, make_problem
from tests.helpers.training import (
    CONFIG,
    count_launches,
    experts_of,
    train,
    with_leaves,
)

DIALECT = {dialect.name: dialect for dialect in LAYERS}


@pytest.fixture(scope="module")
def baseline():
    dialect = DIALECT["live"]
    problem = make_problem(dialect)
    return dialect, problem, train(problem, dialect)


def given_problem(ids_TK: torch.Tensor):
    """Return a problem whose routing is given so."""
    problem = make_problem(DIALECT["given"])
    return replace(problem, expert_of_TK=ids_TK.int().contiguous())


# What is asked for, and what is launched.


def test_one_launch_forward_and_one_backward(baseline):
    dialect, problem, _ = baseline
    launches = count_launches()
    train(problem, dialect)
    assert launches == ["forward", "backward"]


def test_without_gradients_nothing_is_kept(baseline):
    _, problem, _ = baseline
    inputs = problem.inputs
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
    assert out.y_TH.grad_fn is None
    problem, _ = with_leaves(problem)
    inputs = problem.inputs
    with torch.no_grad():
        out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
    assert out.y_TH.grad_fn is None


WANTED = {
    "tokens alone": ({"x_TH"}, {Protocol.DX, Protocol.DS, Protocol.DX_SUM}),
    "router alone": ({"router.weight_EH"}, {Protocol.DS, Protocol.DROUTER}),
    "gate and up alone": ({"experts.gate_up_E2IH"}, {Protocol.DGATE_UP}),
    "down alone": ({"experts.down_EHI"}, {Protocol.DDOWN}),
}


@pytest.mark.parametrize("case", WANTED)
def test_only_what_is_asked_for_is_computed(case: str, baseline):
    dialect, problem, expected = baseline
    names, kinds = WANTED[case]
    call = make_dialect(dialect)
    backward = backward_call(kept_of(call.buffers), call.rule, None, sorted(names), (None,) * 3)
    dispatch = {Protocol.ROUTE, Protocol.PREFIX, Protocol.SCATTER}
    ahead = {Protocol.FFN1, Protocol.DH} | dispatch
    assert make_spec(backward).held == kinds | ahead
    problem, leaves = with_leaves(problem)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in names)
    inputs = problem.inputs
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
    results = [r for r in (out.y_TH, out.gate_TK, out.logits_TE) if r.requires_grad]
    torch.autograd.backward(results, list(problem.incoming))
    for name, leaf in leaves.items():
        if name in names:
            assert_same_bits(actual=leaf.grad, expected=expected.gradients[name])
        else:
            assert leaf.grad is None


def test_main_grad_is_overwritten_first_and_then_added_to():
    """An expert without rows: zeros at first, and nothing changes afterwards."""
    problem = given_problem(torch.tensor([[1, 2]]).repeat(37, 1))
    single = train(problem, DIALECT["given"]).gradients
    problem, leaves = with_leaves(problem)
    gate_up, down = leaves["experts.gate_up_E2IH"], leaves["experts.down_EHI"]
    buffers = [torch.full_like(weight.detach(), 0.25) for weight in (gate_up, down)]
    main_grad = MainGrad(*buffers)
    experts = replace(experts_of(problem.inputs.experts, leaves), main_grad=main_grad)
    inputs = problem.inputs
    for count in (1, 2, 3):
        ids_TK, gate_TK = problem.expert_of_TK, problem.given_TK
        y_TH = moe_routed(inputs.x_TH, ids_TK, gate_TK, experts, config=CONFIG)
        y_TH.backward(problem.incoming.y_TH)
        assert main_grad.grad_added_to_main_grad
        assert gate_up.grad is None and down.grad is None
        names = ("experts.gate_up_E2IH", "experts.down_EHI")
        for buffer, name in zip(buffers, names, strict=True):
            torch.testing.assert_close(buffer, count * single[name])
            assert torch.equal(buffer[[0, 3]], torch.zeros_like(buffer[[0, 3]]))
    buffers[0][0] = 0.5  # another writer's
    problem.incoming.y_TH.zero_()
    y_TH = moe_routed(inputs.x_TH, problem.expert_of_TK, problem.given_TK, experts, config=CONFIG)
    y_TH.backward(problem.incoming.y_TH)
    assert bool((buffers[0][0] == 0.5).all())


def test_main_grad_of_16_bit_weights_is_not_rounded():
    dialect = DIALECT["bfloat16"]
    problem = make_problem(dialect)
    rounded = train(problem, dialect).gradients["experts.down_EHI"]
    problem, leaves = with_leaves(problem)
    weights = leaves["experts.gate_up_E2IH"], leaves["experts.down_EHI"]
    main_grad = MainGrad(*(torch.full(w.shape, torch.nan) for w in weights))
    inputs = problem.inputs
    experts = replace(inputs.experts, main_grad=main_grad)
    out = moe(inputs.x_TH, inputs.router_EH, experts, problem.router, config=CONFIG)
    torch.autograd.backward([out.y_TH, out.gate_TK, out.logits_TE], list(problem.incoming))
    assert_same_bits(actual=main_grad.down_EHI.bfloat16(), expected=rounded)
    assert not torch.equal(main_grad.down_EHI, rounded.float())


def test_no_token_gives_zero_gradients():
    problem, leaves = with_leaves(make_problem(DIALECT["live"]))
    inputs = problem.inputs
    x_0H = inputs.x_TH.detach()[:0].requires_grad_()
    out = moe(x_0H, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
    launches = count_launches()
    (out.y_TH.sum() + out.logits_TE.sum()).backward()
    assert launches == [] and x_0H.grad is not None
    gradient = leaves["experts.down_EHI"].grad
    assert gradient is not None and not gradient.any()


def test_a_view_as_incoming_gradient_is_taken(baseline):
    """``y.sum()`` hands back one number, expanded."""
    dialect, problem, _ = baseline
    ones = torch.ones_like(problem.incoming.y_TH)
    expected = train(replace(problem, incoming=Incoming(ones, None, None)), dialect).gradients
    problem, leaves = with_leaves(problem)
    inputs = problem.inputs
    moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router,
        config=CONFIG).y_TH.sum().backward()  # fmt: skip
    for name, leaf in leaves.items():
        assert_same_bits(actual=leaf.grad, expected=expected[name])


def test_a_loss_of_logits_alone_trains_the_router(baseline):
    _, problem, _ = baseline
    problem, leaves = with_leaves(problem)
    inputs = problem.inputs
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
    dlogits_TE = problem.incoming.logits_TE
    out.logits_TE.backward(dlogits_TE)
    torch.testing.assert_close(leaves["router.weight_EH"].grad, dlogits_TE.T @ inputs.x_TH)
    torch.testing.assert_close(leaves["x_TH"].grad, dlogits_TE @ inputs.router_EH)
    assert not leaves["experts.down_EHI"].grad.any()


# Under torch's own tools.


def layer_of(problem):
    """Return the layer as a function of tokens, its leaves, and a backward through it.

    What is around the launches is exact: a compiler may round everything else in its own way.
    """
    incoming = list(problem.incoming[:2])
    problem, leaves = with_leaves(problem)
    inputs = problem.inputs

    def layer(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = moe(2 * x_TH, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
        return out.y_TH, 0.5 * out.gate_TK

    def go_back(results: tuple[torch.Tensor, ...]) -> None:
        torch.autograd.backward(results, incoming)

    return layer, leaves, go_back


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in inductor's imports
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_torch_compile_takes_forward_and_backward(backend: str, baseline):
    layer, expected, go_back = layer_of(baseline[1])
    go_back(layer(expected["x_TH"]))
    layer, leaves, go_back = layer_of(baseline[1])
    go_back(torch.compile(layer, fullgraph=True, backend=backend)(leaves["x_TH"]))
    for name, leaf in leaves.items():
        assert_same_bits(actual=leaf.grad, expected=expected[name].grad)


def test_torch_compile_refuses_main_grad_whose_flag_it_would_take_for_a_constant(baseline):
    _, problem, _ = baseline
    problem, _ = with_leaves(problem)
    inputs, experts = problem.inputs, problem.inputs.experts
    main_grad = MainGrad(experts.gate_up_E2IH.detach().clone(), experts.down_EHI.detach().clone())

    def layer(x_TH: torch.Tensor) -> torch.Tensor:
        own = Experts(experts.gate_up_E2IH, experts.down_EHI, main_grad=main_grad)
        return moe(x_TH, inputs.router_EH, own, problem.router, config=CONFIG).y_TH

    with pytest.raises(Exception, match="main_grad must be None"):
        torch.compile(layer, fullgraph=True, backend="eager")(inputs.x_TH)


@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointing_runs_the_forward_again_with_the_same_bits(use_reentrant: bool, baseline):
    layer, expected, go_back = layer_of(baseline[1])
    go_back(layer(expected["x_TH"]))
    layer, leaves, go_back = layer_of(baseline[1])
    launches = count_launches()
    checkpointed = torch.utils.checkpoint.checkpoint(
        layer, leaves["x_TH"], use_reentrant=use_reentrant
    )
    go_back(checkpointed)
    assert launches == ["forward", "forward", "backward"]
    for name, leaf in leaves.items():
        assert_same_bits(actual=leaf.grad, expected=expected[name].grad)


# What is refused, and what goes wrong.


@pytest.fixture
def result(baseline):
    """Return the layer's output and its leaves."""
    problem, leaves = with_leaves(baseline[1])
    inputs = problem.inputs
    out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
    return out, leaves


def test_a_saved_tensor_changed_in_place_is_noticed(result):
    out, leaves = result
    with torch.no_grad():
        leaves["experts.down_EHI"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.y_TH.sum().backward()


def test_a_second_backward_needs_retain_graph(result):
    out, leaves = result
    loss = out.y_TH.sum()
    loss.backward(retain_graph=True)
    first = leaves["x_TH"].grad.clone()
    loss.backward()
    torch.testing.assert_close(leaves["x_TH"].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused_by_name(result):
    out, leaves = result
    with pytest.raises(NotImplementedError, match=r"no derivative.*create_graph"):
        torch.autograd.grad(out.y_TH.sum(), leaves["x_TH"], create_graph=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its decompositions
def test_forward_mode_is_refused_by_name(baseline):
    inputs = baseline[1].inputs
    with forward_ad.dual_level():
        x_TH = forward_ad.make_dual(inputs.x_TH, torch.ones_like(inputs.x_TH))
        assert_refused(
            lambda: moe(x_TH, inputs.router_EH, inputs.experts, Router(2), config=CONFIG),
            "x_TH must have no tangent.*forward-mode",
        )


def test_what_can_have_no_gradient_is_refused_by_name(baseline):
    inputs = baseline[1].inputs
    correction = torch.zeros(4, requires_grad=True)
    experts = inputs.experts
    weights = experts.gate_up_E2IH, experts.down_EHI
    x_TH = inputs.x_TH
    refused = {
        "correction_bias_E must not require grad": lambda: moe(
            x_TH, inputs.router_EH, experts, Router(2, correction_bias_E=correction)
        ),
        "save must be one of .*'all'": lambda: moe(
            x_TH, inputs.router_EH, experts, Router(2), save="all"
        ),
        "x_TH must be float32, float16 or bfloat16, got torch.float64": lambda: moe(
            x_TH.double().requires_grad_(), inputs.router_EH, experts, Router(2)
        ),
        "main_grad.down_EHI must be float32, got torch.bfloat16": lambda: Experts(
            *weights, main_grad=MainGrad(weights[0].clone(), weights[1].bfloat16())
        ),
        r"main_grad.gate_up_E2IH must have shape \(4, 48, 40\)": lambda: Experts(
            *weights, main_grad=MainGrad(weights[1].clone(), weights[1].clone())
        ),
        "main_grad.down_EHI must have the strides": lambda: Experts(
            *weights, main_grad=MainGrad(weights[0].clone(), weights[1].mT.contiguous().mT)
        ),
    }
    for message, call in refused.items():
        assert_refused(call, message)


def test_a_stall_in_the_backward_is_named(result):
    out, _ = result
    counters = workspace_for(torch.device("cpu")).control.counters
    counters[Protocol.DH_DONE * Protocol.COUNTER_STRIDE] = -100
    with pytest.raises(MegakernelStall, match=r"\(dS, token tile 0\) waited for .*\(dH tasks\)"):
        out.y_TH.sum().backward()


def test_tiles_that_the_interpreter_cannot_hold_are_refused_ahead_of_the_forward(baseline):
    inputs = baseline[1].inputs
    config = KernelConfig(step=64, block_rows=64, block_h=256, block_i=128)
    x_TH = inputs.x_TH.clone().requires_grad_()
    assert_refused(
        lambda: moe(x_TH, inputs.router_EH, inputs.experts, Router(2), config=config),
        r"tile product within 1048576 in the interpreter, got 2097152",
    )


# Allocations and views.
NOTHING = {
    "aten.empty", "aten.new_empty", "aten.empty_like", "aten.transpose", "aten.detach",
    "aten.slice", "aten.view",
}  # fmt: skip


def test_nothing_but_the_launches_touches_memory(baseline, monkeypatch):
    """No zero, cast, copy or sum beside them, forward or backward."""
    launches = []
    monkeypatch.setattr(type(moe_kernel), "run", lambda *args, **kwargs: launches.append(1))
    _, problem, _ = baseline
    problem, _ = with_leaves(problem)
    inputs = problem.inputs
    done = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            done.append(str(function).rsplit(".", 1)[0])
            return function(*args, **(kwargs or {}))

    with Watch():
        out = moe(inputs.x_TH, inputs.router_EH, inputs.experts, problem.router, config=CONFIG)
        forward = len(done)
        torch.autograd.backward([out.y_TH, out.gate_TK, out.logits_TE], list(problem.incoming))
    assert launches == [1, 1] and 0 < forward < len(done)
    assert set(done) <= NOTHING, set(done) - NOTHING


@pytest.mark.parametrize("name", ["shared-live", "shared-given", "gpt-oss", "over-all"])
def test_what_can_have_a_gradient_is_found_by_the_names_of_the_record(name: str):
    call = make_dialect(DIALECT[name])
    tensors = flatten(call.buffers)
    made = set() if DIALECT[name].route == "given" else {"routing.gate_TK"}
    found = differentiable_of(call)
    assert set(found) == set(tensors) & set(DIFFERENTIABLE) - made
    assert all(tensor is tensors[name] for name, tensor in found.items())
