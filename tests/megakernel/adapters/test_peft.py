"""LoRA of peft on swapped models; against a stand-in of its wrapper where it is not installed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import megakernel.launch.op
from megakernel.adapters.transformers import use_megakernel
from megakernel.launch.call import make_spec
from megakernel.plan.spec import KernelSpec
from tests.helpers.gradients import relative_error
from tests.megakernel.adapters.tiny import FEW, GPT_OSS, QWEN2, Family, blocks_of, each
from tests.megakernel.adapters.training import FLOAT32_ERROR, make_small, step

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
Adapt = Callable[[Any], Any]


class Delta(nn.Module):
    """What is added to a weight."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


class ParamWrapper(nn.Module):
    """As peft wraps a module to adapt one of its parameters: during a call, and not outside."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        module: Any = base_layer
        while isinstance(module, ParamWrapper):
            module = module.base_layer
        weight = getattr(module, name)
        num_experts, rows, columns = weight.shape
        self.lora_A = nn.Parameter(torch.randn(num_experts, 2, columns) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(num_experts, rows, 2) * 0.1)
        self.inner = (module,)  # registers nothing

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        with self.active():
            return self.base_layer(hidden, *arguments, **options)

    @contextmanager
    def active(self) -> Iterator[None]:
        module = self.inner[0]
        parametrize.register_parametrization(module, self.name, Delta(self.lora_B @ self.lora_A))
        module.parametrizations[self.name].original.requires_grad_(False)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(module, self.name, leave_parametrized=False)


def adapt_experts(model: Any) -> Any:
    """Freeze a model and wrap its experts, once for each weight."""
    torch.manual_seed(3)
    model.requires_grad_(False)
    for block in blocks_of(model):
        for name in EXPERT_WEIGHTS:
            block.experts = ParamWrapper(block.experts, name)
    return model


def adapt_experts_by_peft(model: Any) -> Any:
    """Let peft do the same."""
    return by_peft(model, target_parameters=[f"mlp.experts.{name}" for name in EXPERT_WEIGHTS])


def by_peft(model: Any, **targets: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    with warnings.catch_warnings(action="ignore"):  # it asks for what transformers deprecates
        return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **targets))


def check_adapted(family: Family, adapt: Adapt, swap_first: bool, fuse_gate: bool) -> None:
    """Hold the gradients of the adapter to eager's; nothing else has any."""
    expected = step(adapt(make_small(family)))
    model = make_small(family)
    order = [adapt, lambda model: use_megakernel(model, fuse_gate)]
    for change in reversed(order) if swap_first else order:
        model = change(model)
    actual = step(model)
    trained = {name for name, gradient in expected.items() if gradient is not None}
    assert {name for name, gradient in actual.items() if gradient is not None} == trained
    assert trained and all("lora" in name for name in trained)
    for name in trained:
        assert relative_error(actual[name], expected[name]) < FLOAT32_ERROR


SLOW = pytest.mark.slow
WAYS = pytest.mark.parametrize(
    ("swap_first", "fuse_gate"),
    [
        pytest.param(True, True, id="swapped, adapted"),
        pytest.param(False, True, id="adapted, swapped", marks=SLOW),
        pytest.param(True, False, id="experts alone, adapted", marks=SLOW),
        pytest.param(False, False, id="adapted, experts alone"),
    ],
)


@WAYS
def test_a_wrapper_that_adapts_experts_is_heard(swap_first: bool, fuse_gate: bool) -> None:
    check_adapted(FEW, adapt_experts, swap_first, fuse_gate)


@SLOW
@WAYS
@each([FEW, GPT_OSS])
def test_lora_on_experts(family: Family, swap_first: bool, fuse_gate: bool) -> None:
    check_adapted(family, adapt_experts_by_peft, swap_first, fuse_gate)


def test_an_adapted_model_can_go_back_to_its_own_gate() -> None:
    model = use_megakernel(adapt_experts(make_small(FEW)))
    use_megakernel(model, fuse_gate=False)
    plain = adapt_experts(make_small(FEW))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_a_parametrization_of_torch_is_heard() -> None:
    """It changes the class of the experts, for good."""
    found = []
    for swap in (use_megakernel, lambda model: model):
        model = swap(make_small(GPT_OSS))
        experts = blocks_of(model)[0].experts
        delta = nn.Parameter(torch.full_like(experts.down_proj, 0.01))
        module = Delta(torch.empty(0))
        module.delta = delta
        parametrize.register_parametrization(experts, "down_proj", module)
        step(model)
        found.append(delta.grad)
    assert relative_error(*found) < FLOAT32_ERROR


# Frozen experts


def freeze_experts(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj.weight" in name)
    return model


def test_nothing_is_computed_for_frozen_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = specs_of(monkeypatch)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = step(freeze_experts(make_small(QWEN2)))
    actual = step(freeze_experts(use_megakernel(make_small(QWEN2))))
    assert {n for n, gradient in actual.items() if gradient is not None} == {name}
    assert relative_error(actual[name], expected[name]) < FLOAT32_ERROR
    backward = specs[-1]
    assert backward.is_backward
    asked = {name for name, is_asked in vars(backward.gradients).items() if is_asked is True}
    assert asked == {"x", "weighs", "token_gated"}  # the last two are no gradients
    weights = {backward.DGATE_UP, backward.DDOWN, backward.DROUTER}
    assert backward.DX_SUM in backward.held and not weights & backward.held


def specs_of(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """Note the spec of each launch to come."""
    specs: list[KernelSpec] = []
    launch = megakernel.launch.op.launch

    def watched(call: Any) -> None:
        specs.append(make_spec(call))
        launch(call)

    monkeypatch.setattr("megakernel.autograd.launcher", lambda: watched)
    return specs


@SLOW
@pytest.mark.parametrize("swap_first", [True, False], ids=["swapped first", "adapted first"])
def test_lora_on_attention(swap_first: bool) -> None:
    def adapt(model: Any) -> Any:
        return by_peft(model, target_modules=["q_proj", "v_proj"])

    check_adapted(FEW, adapt, swap_first, fuse_gate=True)


# What a fused block does not hear


class Wrapper(nn.Module):
    """Stands around a module and hands on its attributes, as some of peft's do."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        inside = self._modules["base_layer"]
        return inside if name == "base_layer" else getattr(inside, name)


@pytest.mark.parametrize("swap_first", [True, False], ids=["swapped first", "adapted first"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shared_expert.up_proj", r"shared_expert must be made of plain linear.*got Wrapper"),
        ("shared_expert_gate", r"shared_expert must be made of plain linear.*got Wrapper"),
        ("gate", r"fuse_gate must be False with a.* gate .*got Wrapper"),
    ],
    ids=["shared expert", "its gate", "router"],
)
def test_other_adapted_modules_are_refused_by_name(
    name: str, message: str, swap_first: bool
) -> None:
    model = make_small(QWEN2)
    if swap_first:
        use_megakernel(model)
    block = blocks_of(model)[0]
    *above, last = name.split(".")
    owner = block.get_submodule(".".join(above))
    setattr(owner, last, Wrapper(getattr(owner, last)))
    with pytest.raises(ValueError, match=message):
        step(model if swap_first else use_megakernel(model))


def test_other_experts_than_those_of_the_swap_are_refused() -> None:
    model = use_megakernel(make_small(FEW))
    blocks_of(model)[0].experts = blocks_of(make_small(FEW))[0].experts
    with pytest.raises(ValueError, match="another experts than the model's own, got Qwen3Moe"):
        step(model)
