"""The public face: what it refuses and how, what it launches, what happens after a failure."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megakernel
from megakernel import (
    Experts,
    KernelConfig,
    MegakernelStall,
    Placement,
    Router,
    moe,
    moe_routed,
    prepare_replay,
)
from megakernel.device.kernel import moe_kernel
from megakernel.launch.workspace import workspace_for
from megakernel.plan.spec import KernelSpec
from tests.helpers.cases import SHAPES
from tests.helpers.compare import assert_refused, assert_same_bits, relative_error
from tests.helpers.inputs import SMALL, make_inputs, run, truth

PLAIN = SHAPES[0]  # T 40, K 2, E 4, H 64, I 32
INPUTS = make_inputs(PLAIN)
X, ROUTER, EXPERTS = INPUTS.x_TH, INPUTS.router_EH, INPUTS.experts
IDS = torch.tensor([[0, 3], [1, 2]]).repeat(20, 1)
GATES = torch.full((40, 2), 0.5)
GATE_UP, DOWN = EXPERTS.gate_up_E2IH, EXPERTS.down_EHI


def with_id(place: tuple[int, int], value: int) -> torch.Tensor:
    """Return the ids with one of them replaced."""
    ids = IDS.clone()
    ids[place] = value
    return ids


def routed(ids=IDS, gates=GATES, x=X, experts=EXPERTS, **options):
    """Call moe_routed with one argument changed."""
    return moe_routed(x, ids, gates, experts, config=SMALL, **options)


def live(x=X, router_weight=ROUTER, experts=EXPERTS, router=INPUTS.router, **options):
    """Call moe with one argument changed."""
    return moe(x, router_weight, experts, router, config=SMALL, **options)


def replay(ids=IDS, num_experts=4, **options):
    """Call moe with a replay of these ids."""
    return live(replay=prepare_replay(ids, num_experts, config=SMALL), **options)


SWAPPED = Placement(torch.tensor([1, 0, 3, 2]))
REFUSED = {
    "id too large": (lambda: routed(with_id((7, 1), 9)), r"expert_of_TK\[7, 1\].*\[0, 4\).*9"),
    "id below -1": (lambda: routed(with_id((0, 0), -2)), r"expert_of_TK\[0, 0\].*-2"),
    "id twice": (lambda: routed(with_id((1, 0), 2)), r"expert_of_TK\[1\].*twice.*\[2, 2\]"),
    "replayed id too large": (lambda: replay(with_id((3, 0), 4)), r"expert_of_TK\[3, 0\].*4"),
    "replayed id twice": (lambda: replay(with_id((1, 0), 2)), r"expert_of_TK\[1\].*twice"),
    "ids not integer": (lambda: routed(IDS.float()), r"expert_of_TK.*int32 or int64.*float32"),
    "ids of another length": (
        lambda: routed(IDS[:3], GATES),
        r"expert_of_TK.*\(40, 2\).*\(3, 2\)",
    ),
    "gates of another shape": (
        lambda: routed(gates=GATES[:, :1].contiguous()),
        r"gate_TK.*\(40, 2\)",
    ),
    "gates integer": (lambda: routed(gates=IDS), r"gate_TK.*float32.*int64"),
    "top_k above E": (lambda: live(router=Router(5)), r"top_k.*E=4.*5"),
    "top_k zero": (lambda: Router(0), r"top_k.*integer.*0"),
    "unknown score": (lambda: Router(2, score="tanh"), r"score.*'tanh'"),
    "width of x": (lambda: live(X[:, :32].contiguous()), r"x_TH.*H=64.*32"),
    "axes of x": (lambda: live(X[None]), r"x_TH.*2 axes.*\(1, 40, 64\)"),
    "shape of router": (lambda: live(router_weight=ROUTER[:3]), r"router_weight_EH.*\(4, 64\)"),
    "shape of gate_up": (
        lambda: Experts(GATE_UP[:, 1:].contiguous(), DOWN),
        r"gate_up_E2IH.*\(4, 64, 64\)",
    ),
    "dtype of x": (lambda: live(X.half()), r"x_TH.*dtype.*float32.*float16"),
    "dtype of weights": (lambda: Experts(GATE_UP.half(), DOWN), r"gate_up_E2IH.*dtype.*float16"),
    "integer x": (lambda: live(X.long()), r"x_TH.*float32, float16 or bfloat16.*int64"),
    "strided x": (lambda: live(X.T.contiguous().T), r"x_TH.*contiguous.*\(1, 40\)"),
    "strided weights": (
        lambda: Experts(torch.cat([GATE_UP, GATE_UP], 2)[:, :, ::2], DOWN),
        r"gate_up_E2IH.*contiguous",
    ),
    "other device": (lambda: live(X.to("meta")), r"x_TH.*device.*cpu.*meta"),
    "expert without a slot": (
        lambda: live(placement=Placement(torch.tensor([0, 2, 3]))),
        r"expert_of_P.*4 experts.*no slot for expert 1",
    ),
    "last expert without a slot": (
        lambda: live(placement=Placement(torch.tensor([0, 1, 2]))),
        r"expert_of_P.*4 experts.*no slot for expert 3",
    ),
    "slot of an unknown expert": (
        lambda: live(placement=Placement(torch.arange(5))),
        r"expert_of_P.*\[0, 4\).*4",
    ),
    "expert_of_P below -1": (lambda: Placement(torch.tensor([0, -2])), r"expert_of_P.*-2"),
    "slot of another expert": (
        lambda: routed(placement=Placement(SWAPPED.expert_of_P, IDS)),
        r"slot_of_TK\[0, 0\].*chosen expert.*0",
    ),
    "slot out of range": (
        lambda: routed(placement=Placement(SWAPPED.expert_of_P, IDS + 4)),
        r"slot_of_TK\[0, 0\].*4",
    ),
    "slots of another length": (
        lambda: live(placement=Placement(SWAPPED.expert_of_P, IDS[:3])),
        r"slot_of_TK.*\(40, 2\).*\(3, 2\)",
    ),
    "replay of another length": (lambda: replay(IDS[:39]), r"replay.*\(40, 2\).*\(39, 2\)"),
    "replay of another E": (lambda: replay(num_experts=5), r"replay.*E=4.*5"),
    "replay of another tile height": (
        lambda: live(replay=prepare_replay(IDS, 4, config=replace(SMALL, block_rows=32))),
        r"replay.*block_rows=16.*32",
    ),
    "replay of another placement": (lambda: replay(placement=SWAPPED), r"placement.*prepared"),
    "no experts": (lambda: prepare_replay(IDS, 0), r"num_experts.*positive.*0"),
    "block not a power of two": (lambda: KernelConfig(block_rows=48), r"block_rows.*two.*48"),
    "tile too large to interpret": (
        lambda: moe(X, ROUTER, EXPERTS, Router(2), config=KernelConfig(step=128)),
        r"config.*1048576 in the interpreter, got 4194304",
    ),
    "no workers": (lambda: KernelConfig(num_workers=0), r"num_workers.*positive.*0"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_argument_rule_and_value(call, message):
    launches = count_launches()
    assert_refused(call, message)
    assert launches == []


def test_a_replay_must_come_from_prepare_replay():
    with pytest.raises(TypeError, match=r"replay.*prepare_replay.*Tensor"):
        live(replay=IDS)


def test_grad_is_welcome_where_nobody_asks_for_it():
    with torch.no_grad():
        assert live(X.clone().requires_grad_()).y_TH.shape == X.shape


def count_launches() -> list[int]:
    """Return a list that grows with every launch of the kernel."""
    launches: list[int] = []
    moe_kernel.pre_run_hooks[:] = [lambda *args, **kwargs: launches.append(1)]
    return launches


class CountedOps(TorchDispatchMode):
    """Counts the torch operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        live,
        routed,
        lambda: live(placement=NAMED),
        lambda: routed(placement=SPREAD),
        lambda: live(replay=PREPARED),
    ],
    ids=["live", "given", "live, named slots", "given, replicas", "replay"],
)
def test_a_warm_call_is_one_launch_and_nothing_else(call, monkeypatch):
    call()
    # On the CPU the ids are looked at, because it costs no synchronisation there.
    monkeypatch.setattr("megakernel.launch.run.check_given", lambda call: None)
    monkeypatch.setattr("megakernel.launch.workspace.Workspace.raise_errors", lambda self: None)
    monkeypatch.setattr(type(moe_kernel), "run", lambda *args, **kwargs: launches.append(1))
    launches: list[int] = []
    with CountedOps() as ops:
        call()
    assert launches == [1]
    assert set(ops.count) <= {"empty", "new_empty", "empty_like"}, "only outputs are allocated"


SPREAD = Placement(torch.tensor([0, 3, 1, 2, 0]))
NAMED = Placement(torch.arange(4), live().expert_of_TK)
PREPARED = prepare_replay(IDS, 4, config=SMALL)


def test_an_unchecked_bad_id_is_skipped_in_the_launch_and_reported(monkeypatch):
    """On a GPU nobody looks at ids before the launch; here the look is switched off."""
    monkeypatch.setattr("megakernel.launch.run.check_given", lambda call: None)
    expected = routed(with_id((7, 1), -1))
    outputs = []
    monkeypatch.setattr(
        torch, "empty_like", lambda x: outputs.append(torch.zeros_like(x)) or outputs[-1]
    )
    for ids, rule in [
        (with_id((7, 1), 4), r"expert_of_TK\[7, 1\].*or -1, got 4"),
        (with_id((7, 1), 1 << 40), r"expert_of_TK\[7, 1\] must be an expert id"),
        (with_id((7, 1), int(IDS[7, 0])), r"expert_of_TK\[7, 1\].*differ.*got 1"),
    ]:
        with pytest.raises(ValueError, match=rule + r".*\(skipped by an earlier launch\)"):
            routed(ids)
        assert_same_bits(actual=outputs[-1], expected=expected)


def test_a_live_choice_with_the_wrong_slot_is_skipped_and_reported():
    chosen = live().expert_of_TK
    slots = chosen.clone()
    slots[11, 0] = 3 - slots[11, 0] if slots[11, 0] != 3 - slots[11, 0] else 0
    with pytest.raises(ValueError, match=r"slot_of_TK\[11, 0\].*chosen expert"):
        live(placement=Placement(torch.arange(4), slots))
    assert live(placement=Placement(torch.arange(4), chosen)).y_TH.isfinite().all()


BROKEN = {
    "scatter": (KernelSpec.SCATTER_DONE, r"needs the row tables\).*\(scatter tasks\).*reach 3"),
    "route": (
        KernelSpec.ROUTE_DONE,
        r"\(prefix, block of bins 0\).*\(route tasks\).*reach 3, saw -7",
    ),
    "column group": (
        KernelSpec.FIRST_COLUMN_GROUP,
        r"\(combine, .*group 0\).*FFN2 of column group 0",
    ),
}


@pytest.mark.parametrize(("counter", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("num_workers", [1, 5])
def test_a_broken_dependency_stalls_by_name_and_the_next_call_works(counter, message, num_workers):
    config = replace(SMALL, num_workers=num_workers)
    expected = run(INPUTS, config=config)
    counters = workspace_for(X.device).control.counters
    counters[counter * KernelSpec.COUNTER_STRIDE] = -10
    with pytest.raises(MegakernelStall, match=message):
        run(INPUTS, config=config)
    assert int(counters.count_nonzero()) == 0
    assert_same_bits(actual=run(INPUTS, config=config).y_TH, expected=expected.y_TH)


def test_check_raises_what_a_launch_reported_once():
    report = workspace_for(X.device).control.report
    report[8:12] = torch.tensor([1, 5, 0, 77], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expert_of_TK\[5, 0\].*77"):
        megakernel.check()
    megakernel.check()


def test_an_interrupted_launch_leaves_nothing_behind(monkeypatch):
    expected = live().y_TH

    def interrupted(*args, **kwargs):
        workspace_for(X.device).control.counters[:100] = 5
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(type(moe_kernel), "run", interrupted)
        with pytest.raises(RuntimeError, match="interrupted"):
            live()
    assert_same_bits(actual=live().y_TH, expected=expected)


def test_cpu_tensors_without_the_interpreter_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("megakernel.checks.calls.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1.*reference\.moe"):
        live()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in inductor's imports
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_torch_compile_takes_the_whole_layer(backend):
    compiled = torch.compile(
        lambda x: moe(x * 2, ROUTER, EXPERTS, Router(2), config=SMALL), fullgraph=True,
        backend=backend,
    )  # fmt: skip
    expected = live(X * 2)
    for got, want in zip(compiled(X), expected, strict=True):
        assert_same_bits(actual=got, expected=want)


def test_torch_compile_takes_given_and_replayed_routing_and_named_slots():
    def all_three(x):
        given = moe_routed(x, IDS, GATES, EXPERTS, placement=SPREAD, config=SMALL)
        named = moe(x, ROUTER, EXPERTS, Router(2), placement=NAMED, config=SMALL).y_TH
        replayed = moe(x, ROUTER, EXPERTS, Router(2), replay=PREPARED, config=SMALL).y_TH
        return given, named, replayed

    given, named, replayed = torch.compile(all_three, fullgraph=True, backend="aot_eager")(X)
    assert_same_bits(actual=named, expected=live().y_TH)
    assert_same_bits(actual=given, expected=routed())
    assert_same_bits(actual=replayed, expected=live(replay=PREPARED).y_TH)


def test_half_precision_gates_and_int32_ids_are_read_in_place():
    y_TH = routed(IDS.int(), GATES.bfloat16())
    assert_same_bits(actual=y_TH, expected=routed())
    assert relative_error(actual=live().y_TH, expected=truth(INPUTS, live().expert_of_TK)) < 1e-6
