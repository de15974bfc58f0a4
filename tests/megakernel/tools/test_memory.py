"""What the table of memory says is what a call really keeps alive for its backward."""

import gc
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megakernel import Experts, Placement, Router, SharedExpert, moe, moe_routed, prepare_replay
from megakernel.autograd import SAVES
from megakernel.launch.call import Call
from megakernel.tools.memory import MIB, Kept, kept_by, kept_by_model, main
from megakernel.tools.models import MODELS
from tests.helpers.inputs import SMALL

T, K, E, H, I, J = 17, 2, 4, 40, 24, 30


@dataclass
class Made(TorchDispatchMode):
    """Remembers the memory that PyTorch makes, without keeping it alive."""

    storages: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        # Triton's interpreter wraps memory that is there already.
        if function.overloadpacket is torch.ops.aten.set_:
            return made
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            storage = made.untyped_storage()
            self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return made

    def alive(self, besides: list[Tensor]) -> int:
        """Return the bytes that are alive, but for those of some tensors."""
        gc.collect()
        theirs = {tensor.untyped_storage().data_ptr() for tensor in besides}
        return sum(
            size
            for place, (storage, size) in self.storages.items()
            if not storage.expired() and place not in theirs
        )


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a small parameter."""
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()


def make_experts(*, is_shared: bool) -> Experts:
    """Return experts, with a shared one of another width and its token gate or without."""
    shared = SharedExpert(draw(J, H), draw(J, H), draw(H, J), draw(1, H)) if is_shared else None
    return Experts(draw(E, 2 * I, H), draw(E, H, I), shared=shared)


@dataclass(frozen=True)
class Way:
    """A kind of call: its route, what its router drops, and what else there is."""

    route: str
    capacity: int | None = None
    is_shared: bool = False
    is_placed: bool = False


WAYS = {
    "live": Way("live"),
    "replay": Way("replay"),
    "replay of a placement": Way("replay", is_placed=True),
    "given": Way("given"),
    "dropped over capacity": Way("live", capacity=5),
    "shared expert with a token gate": Way("live", is_shared=True),
}


def call_of(way: Way, save: str):
    """Return a call that asks for gradients; it returns its results."""
    experts, router = make_experts(is_shared=way.is_shared), Router(K, capacity=way.capacity)
    x_TH, weight_EH = draw(T, H), draw(E, H)
    ids_TK = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], 1).int()
    placement = Placement(torch.tensor([3, 1, 0, 2, 1])) if way.is_placed else None
    replay = prepare_replay(ids_TK, E, placement, SMALL) if way.route == "replay" else None
    gate_TK = draw(T, K, dtype=torch.float32)
    options = {"config": SMALL, "save": save, "placement": placement}
    if way.route == "given":
        return lambda: [moe_routed(x_TH, ids_TK, gate_TK, experts, **options)]
    return lambda: list(moe(x_TH, weight_EH, experts, router, replay=replay, **options))


def hear(call, monkeypatch) -> Call:
    """Return what a call hands to autograd."""
    import megakernel.autograd as autograd

    heard: list[Call] = []
    with_saved = autograd.with_saved
    with monkeypatch.context() as patch:
        patch.setattr(
            autograd, "with_saved", lambda call, save: heard.append(call) or with_saved(call, save)
        )
        call()
    (only,) = heard
    return only


# The others keep what these do.
QUICK = {("live", SAVES[0]), ("live", SAVES[1])} | {(name, SAVES[0]) for name in list(WAYS)[2:]}
CASES = [
    pytest.param(way, save, id=f"{name}, {save}",
                 marks=[] if (name, save) in QUICK else pytest.mark.slow)
    for name, way in WAYS.items() for save in SAVES
]  # fmt: skip


@pytest.mark.parametrize(("way", "save"), CASES)
def test_what_is_alive_between_forward_and_backward_is_what_is_counted(
    way: Way, save: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(way, save)
    counted = kept_by(hear(call, monkeypatch), save)  # and the workspace has grown
    with Made() as made:
        results = call()
    assert made.alive(besides=results) == counted.own
    saved = results[0].grad_fn.saved_tensors
    whole = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    assert whole == counted.activations + counted.parameters
    del saved, results
    assert made.alive(besides=[]) == 0


def test_what_is_kept_is_z_or_nothing_for_a_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for save, own in zip(SAVES, (T * K * 2 * I * 2, 0), strict=True):
        call = hear(call_of(WAYS["live"], save), monkeypatch)
        routing = T * K * (4 + 4) + T * E * 4
        weights = 2 * (E * H + 3 * E * H * I)
        assert kept_by(call, save) == Kept(own, routing, T * H * 2, weights)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_two_wide_rows_per_choice(name: str) -> None:
    model, num_tokens = MODELS[name], 64
    z = num_tokens * model.top_k * 2 * model.intermediate * 2
    shared = num_tokens * 2 * model.intermediate * 2 if name.startswith("DeepSeek") else 0
    assert kept_by_model(name, num_tokens, "preactivations").own == z + shared
    nothing = kept_by_model(name, num_tokens, "nothing")
    assert nothing.own == 0
    assert nothing.tokens == num_tokens * model.hidden * 2


def test_the_command_prints_a_row_for_each_model(capsys: pytest.CaptureFixture) -> None:
    assert main(["--tokens", "8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(MODELS)
    assert {line.count("|") for line in lines} == {8}
    qwen = [float(text) for text in lines[2].strip("| ").split(" | ")[1:]]
    z = 8192 * 8 * 2 * 768 * 2 / MIB
    assert qwen[:1] + qwen[2:5] == [32.0, z, pytest.approx(z + 32 + qwen[1], abs=0.1), 0.0]
    with pytest.raises(SystemExit):
        main(["--tokens", "0"])


def test_the_count_sees_a_tensor_that_is_kept_besides() -> None:
    with Made() as made:
        held = torch.empty(7, 3)
        torch.empty(5)
        view = held[1:]
    assert made.alive(besides=[]) == held.nbytes == 84
    assert made.alive(besides=[view]) == 0
