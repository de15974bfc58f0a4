"""Gradients of expert weights in Megatron's float32 buffers, on the stand-ins of its modules."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megakernel.adapters.megatron import MegatronMegakernel
from tests.helpers.compare import assert_same_bits
from tests.megakernel.adapters.test_megatron import Config, GroupedMLP, SequentialMLP, draw

H, I, E, K, T = 24, 16, 3, 2, 9
EMPTY = 1  # the expert that no token chooses
LAYOUTS = ["single grouped", "grouped", "sequential"]


@dataclass(frozen=True)
class FusedConfig(Config):
    """Gradients are to be added to ``main_grad`` where they are made."""

    num_moe_experts: int = E
    gradient_accumulation_fusion: bool = True


PLAIN = replace(FusedConfig(), gradient_accumulation_fusion=False)


def make_backend(layout: str, config: Config = FusedConfig(), pack: bool = True) -> Any:
    """Build a backend, the same weights each time, with its two lists of parameters."""
    torch.manual_seed(0)
    weights = draw(E, 2 * I, H), draw(E, H, I)
    is_sequential = layout == "sequential"
    experts = SequentialMLP(*weights) if is_sequential else GroupedMLP(
        *weights, single=layout == "single grouped"
    )  # fmt: skip
    backend = MegatronMegakernel(config, None, experts, None, E)
    if pack:
        backend.pack()
    linears = ("linear_fc1", "linear_fc2")
    if is_sequential:
        return backend, [[getattr(e, n).weight for e in experts.local_experts] for n in linears]
    return backend, [list(getattr(experts, name).parameters()) for name in linears]


def give_main_grad(parameters: list[nn.Parameter], value: float = 0.25) -> Tensor:
    """Give parameters buffers in a row, as Megatron's data parallelism does; return the row."""
    row = torch.full((sum(p.numel() for p in parameters),), value)
    parts = row.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.main_grad = part.view(parameter.shape)
        parameter.grad_added_to_main_grad = False
    return row


def train(backend: Any, seed: int) -> list[Tensor]:
    """Run one micro-batch in which an expert is idle; return the gradients of what went in."""
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(T, H, generator=generator).requires_grad_()
    logits_TE = torch.randn(T, E, generator=generator)
    logits_TE[:, EMPTY] = -1e4
    map_TE = torch.zeros(T, E, dtype=torch.bool).scatter_(1, logits_TE.topk(K).indices, True)
    map_TE[:, EMPTY] = False
    probs_TE = (logits_TE.softmax(-1) * map_TE).requires_grad_()
    backend(x_TH, probs_TE, map_TE).square().sum().backward()
    return [x_TH.grad, probs_TE.grad]


class Hook:
    """What Megatron's data parallelism does when a gradient has been accumulated."""

    def __init__(self, parameter: Any) -> None:
        self.parameter, self.fired = parameter, 0
        self.node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        self.node.register_hook(self)

    def __call__(self, *_: Any) -> None:
        self.fired += 1
        assert self.parameter.grad is not None  # or it would not overlap
        if not self.parameter.grad_added_to_main_grad:
            self.parameter.main_grad.add_(self.parameter.grad)
        self.parameter.grad = None


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS[1:])]
)
def test_the_first_micro_batch_overwrites_and_later_ones_add(layout: str) -> None:
    """In float32 each is what ``.grad`` would have been, added once more in the same order."""
    backend, linears = make_backend(layout)
    plain, plain_linears = make_backend(layout, PLAIN)
    rows = [give_main_grad(parameters) for parameters in linears]
    hooks = [Hook(parameter) for parameters in linears for parameter in parameters]
    for number in range(3):
        same = zip(train(backend, number), train(plain, number), strict=True)
        for actual, expected in same:
            assert_same_bits(actual=actual, expected=expected)
        for row, parameters in zip(rows, plain_linears, strict=True):
            expected = torch.cat([parameter.grad.flatten() for parameter in parameters])
            assert_same_bits(actual=row, expected=expected)
            assert bool((row.view(E, -1)[EMPTY] == 0.0).all())
    assert all(parameter.grad_added_to_main_grad for ps in linears for parameter in ps)
    assert {hook.fired for hook in hooks} == {3}


def test_an_idle_expert_stays_untouched_where_gradients_are_added() -> None:
    backend, linears = make_backend("grouped")
    rows = [give_main_grad(parameters) for parameters in linears]
    for parameters in linears:
        for parameter in parameters:
            parameter.grad_added_to_main_grad = True
    train(backend, 0)
    for row in rows:
        assert bool((row.view(E, -1)[EMPTY] == 0.25).all())
        assert not bool((row.view(E, -1)[0] == 0.25).any())


def test_every_kind_of_hook_runs_and_sees_zero() -> None:
    backend, linears = make_backend("grouped")
    seen: dict[str, list[bool]] = {"tensor": [], "accumulated": [], "node": []}
    nodes = []  # go with their hooks when nobody keeps them

    def note(kind: str, gradient: Tensor) -> None:
        seen[kind].append(bool((gradient == 0.0).all()))

    for parameters in linears:
        give_main_grad(parameters)
        for parameter in parameters:
            parameter.register_hook(lambda gradient: note("tensor", gradient))
            parameter.register_post_accumulate_grad_hook(lambda p: note("accumulated", p.grad))
            nodes.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
            nodes[-1].register_hook(lambda *_, p=parameter: note("node", p.grad))
    train(backend, 0)
    assert seen == dict.fromkeys(seen, [True] * 2 * E)


def test_without_a_hook_what_stays_in_grad_is_zero_and_shared_with_nobody() -> None:
    """Else the next gradient that is accumulated there would be wrong."""
    layers = [make_backend("grouped") for _ in range(2)]
    parameters = [p for _, linears in layers for ps in linears for p in ps]
    for backend, linears in layers:
        for ps in linears:
            give_main_grad(ps)
        train(backend, 0)
    for number, parameter in enumerate(parameters):
        assert bool((parameter.grad == 0.0).all()), number
        parameter.grad.fill_(number + 1.0)
    for number, parameter in enumerate(parameters):
        assert bool((parameter.grad == number + 1.0).all())


def test_a_graph_of_an_earlier_micro_batch_sees_the_flags_of_the_moment_it_goes_back() -> None:
    """As in a pipeline, where several forwards come before the first backward."""
    backend, linears = make_backend("single grouped")
    rows = [give_main_grad(parameters) for parameters in linears]
    map_TE = torch.tensor([[True, False, True]] * T)
    x_TH, probs_TE = torch.randn(T, H), torch.full((T, E), 0.5)
    losses = [backend(x_TH, probs_TE, map_TE).square().sum() for _ in range(2)]
    losses[1].backward()
    once = [row.clone() for row in rows]
    losses[0].backward()
    for row, first in zip(rows, once, strict=True):
        assert_same_bits(actual=row, expected=first + first)


def test_gradients_of_bf16_weights_are_not_rounded() -> None:
    backend, _ = make_backend("single grouped")
    experts = backend.owned_elsewhere[0].to(torch.bfloat16)
    rows = [give_main_grad(list(m.parameters())) for m in experts.children()]
    x_TH, probs_TE = torch.randn(T, H, dtype=torch.bfloat16), torch.full((T, E), 0.5)
    backend(x_TH, probs_TE, torch.tensor([[True, False, True]] * T)).sum().backward()
    for row in rows:
        assert row.dtype == torch.float32
        assert not torch.equal(row, row.bfloat16().float())


# Without fusion, and refused


@pytest.mark.parametrize(
    "pack", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in a row", "apart"]
)
def test_without_fusion_each_parameter_gets_its_own_gradient(pack: bool) -> None:
    backend, linears = make_backend("grouped", PLAIN, pack)
    single, (fc1, fc2) = make_backend("single grouped", PLAIN)
    for actual, expected in zip(train(backend, 0), train(single, 0), strict=True):
        assert_same_bits(actual=actual, expected=expected)
    for parameters, (stacked,) in zip(linears, (fc1, fc2), strict=True):
        for expert, parameter in enumerate(parameters):
            assert_same_bits(actual=parameter.grad, expected=stacked.grad[expert])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("no buffers", "linear_fc1 must have a main_grad for each weight .*got 0 for 3"),
        ("one without", "linear_fc2 must have a main_grad for each weight .*got 2 for 3"),
        ("buffers apart", "linear_fc1 must have its main_grad buffers in a row"),
        ("weights apart", "linear_fc1 must have its weights in a row"),
        ("bf16 buffers", r"main_grad\.gate_up_E2IH must be float32, got torch\.bfloat16"),
        ("one frozen", "requires_grad must be the same for all expert weights"),
    ],
    ids=lambda value: value if len(value) < 16 else "",
)
def test_what_can_not_be_fused_is_refused_by_name(spoil: str, message: str) -> None:
    backend, (fc1, fc2) = make_backend("grouped", pack=spoil != "weights apart")
    if spoil != "no buffers":
        give_main_grad(fc1), give_main_grad(fc2)
    if spoil == "one without":
        del fc2[1].main_grad
    if spoil == "buffers apart":
        fc1[1].main_grad = fc1[1].main_grad.clone()
    if spoil == "bf16 buffers":
        row = torch.zeros(E, 2 * I, H, dtype=torch.bfloat16)
        for parameter, buffer in zip(fc1, row, strict=True):
            parameter.main_grad = buffer
    if spoil == "one frozen":
        fc2[0].requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        train(backend, 0)


def test_flags_that_differ_are_refused() -> None:
    backend, linears = make_backend("grouped")
    for parameters in linears:
        give_main_grad(parameters)
    linears[0][1].grad_added_to_main_grad = True
    with pytest.raises(ValueError, match=r"must be the same .*got True for 1 of 6"):
        train(backend, 0)


@pytest.mark.slow
def test_frozen_experts_need_no_buffers() -> None:
    backend, linears = make_backend("grouped")
    for parameters in linears:
        for parameter in parameters:
            parameter.requires_grad_(False)
    plain, _ = make_backend("grouped", PLAIN)
    for actual, expected in zip(train(backend, 0), train(plain, 0), strict=True):
        assert_same_bits(actual=actual, expected=expected)
