"""Every router: choices, weights, load and drops against the reference; replay; refusals."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reference
from megakernel import Experts, KernelConfig, MoEOutput, Placement, Router, moe, prepare_replay
from tests.helpers.compare import assert_refused, assert_same_bits
from tests.helpers.inputs import SMALL

T, E, H, I = 25, 12, 24, 16
generator = torch.Generator().manual_seed(3)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


X = draw(T, H)
WEIGHT = draw(E, H, scale=H**-0.5)
BIAS = draw(E)
CORRECTION = draw(E, scale=0.3)
EXPERTS = Experts(draw(E, 2 * I, H, scale=H**-0.5), draw(E, H, I, scale=I**-0.5))

ROUTERS = {
    "Mixtral": Router(2),
    "Qwen without renormalisation": Router(4, renormalize=False),
    "gpt-oss": Router(4, bias_E=BIAS),
    "sigmoid": Router(3, "sigmoid", renormalize=False),
    "Loss-Free": Router(3, "sigmoid", correction_bias_E=CORRECTION),
    "DeepSeek-V3": Router(
        4, "sigmoid", scale=2.5, correction_bias_E=CORRECTION, num_groups=4, top_groups=2
    ),
    "groups of one": Router(2, "sigmoid", num_groups=12, top_groups=5),
    "softmax in groups": Router(3, renormalize=False, num_groups=3, top_groups=1),
    "softmax corrected": Router(3, correction_bias_E=CORRECTION, bias_E=BIAS, scale=0.5),
    "Switch": Router(1, renormalize=False, capacity=2),
    "capacity of one": Router(3, capacity=1),
    "capacity that nobody reaches": Router(3, capacity=T),
    "GShard": Router(2, capacity=4, random_second_seed=5),
    "random second": Router(2, random_second_seed=5),
}
DROPPING = {"Switch", "capacity of one", "GShard"}
# Softmax over all experts does not change with a drop, so Switch replays what it dropped.
REPLAYABLE = ROUTERS.keys() - DROPPING - {"random second"} | {"Switch"}
all_routers = pytest.mark.parametrize("name", ROUTERS)


def run(router: Router, config: KernelConfig = SMALL, **options: object) -> MoEOutput:
    return moe(X, WEIGHT, EXPERTS, router, config=config, **options)  # type: ignore[arg-type]


def expected_routing(router: Router, x_TH: Tensor, weight_EH: Tensor) -> reference.Routing:
    return reference.route(
        x_TH,
        weight_EH,
        router.top_k,
        renormalize=router.renormalize,
        kind=router.score,
        bias_E=router.bias_E,
        correction_bias_E=router.correction_bias_E,
        groups=(router.num_groups, router.top_groups),
        scale=router.scale,
        capacity=router.capacity,
        random_second_seed=router.random_second_seed,
    )


@all_routers
def test_routing_and_output_agree_with_the_reference(name: str):
    router = ROUTERS[name]
    out = run(router)
    expected = expected_routing(router, X, WEIGHT)
    assert torch.equal(out.expert_of_TK.long(), expected.expert_of_TK)
    assert torch.equal(out.load_E, expected.load_E)
    torch.testing.assert_close(out.logits_TE, expected.logits_TE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.gate_TK, expected.gate_TK, rtol=1e-5, atol=1e-6)
    y_TH = reference.moe_by_token(
        X, out.expert_of_TK, expected.gate_TK, EXPERTS.gate_up_E2IH, EXPERTS.down_EHI
    )
    torch.testing.assert_close(out.y_TH.double(), y_TH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gpt-oss", "DeepSeek-V3", "softmax corrected", "Switch", "GShard"]
)
def test_bits_do_not_depend_on_workers_or_placement(name: str):
    router = ROUTERS[name]
    expected = run(router)
    rotated = torch.cat([torch.arange(E).roll(5), torch.tensor([-1, 3, 3, 7])])
    for options in (
        {"config": replace(SMALL, num_workers=1)},
        {"config": replace(SMALL, num_workers=7, column_groups=1, tile_group=1)},
        {"placement": Placement(rotated)},
    ):
        for got, want in zip(run(router, **options), expected, strict=True):
            assert_same_bits(actual=got, expected=want)


@all_routers
def test_replay_forces_ids_and_ignores_what_is_for_choosing(name: str):
    router = ROUTERS[name]
    ids_TK = torch.rand(T, E, generator=generator).argsort(1)[:, : router.top_k]
    ids_TK[::5, -1] = -1
    out = run(router, replay=prepare_replay(ids_TK, E, config=SMALL))
    logits_TE = X @ WEIGHT.T + (0 if router.bias_E is None else router.bias_E)
    gate_TK = reference.weigh(
        logits_TE, ids_TK, router.renormalize, kind=router.score, scale=router.scale
    )
    assert torch.equal(out.expert_of_TK.long(), ids_TK)
    assert torch.equal(out.load_E, reference.count_load(ids_TK, E))
    torch.testing.assert_close(out.gate_TK, gate_TK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(REPLAYABLE))
def test_replaying_what_was_chosen_gives_the_same_bits(name: str):
    router = ROUTERS[name]
    live = run(router)
    replayed = run(router, replay=prepare_replay(live.expert_of_TK, E, config=SMALL))
    for field in ("y_TH", "expert_of_TK", "gate_TK", "logits_TE"):
        assert_same_bits(actual=getattr(replayed, field), expected=getattr(live, field))


@pytest.mark.parametrize("name", sorted(DROPPING))
def test_tokens_over_capacity_are_dropped_in_token_order_and_reported(name: str):
    router = ROUTERS[name]
    free = run(replace(router, capacity=None))
    capped = run(router)
    dropped_TK = (free.expert_of_TK >= 0) & (capped.expert_of_TK < 0)
    assert dropped_TK.any() and (capped.gate_TK[dropped_TK] == 0).all()
    assert torch.equal(capped.load_E, free.load_E)
    for expert in range(E):
        chose_T = (free.expert_of_TK == expert).any(1)
        served_T = (capped.expert_of_TK == expert).any(1)
        first = chose_T.nonzero()[: router.capacity, 0]
        assert torch.equal(served_T.nonzero()[:, 0], first)
    untouched_T = ~dropped_TK.any(1)
    assert_same_bits(actual=capped.y_TH[untouched_T], expected=free.y_TH[untouched_T])


def test_capacity_with_copies_keeps_the_same_tokens():
    """Copies take turns among the tokens that stay, whichever slots hold them."""
    router = Router(2, capacity=3)
    expert_of_P = torch.cat([torch.arange(E), torch.arange(E), torch.tensor([0, 0, 1])])
    for got, want in zip(run(router, placement=Placement(expert_of_P)), run(router), strict=True):
        assert_same_bits(actual=got, expected=want)


def test_load_counts_the_copies_of_an_expert_together_when_the_caller_names_slots():
    plain = run(Router(3))
    copy_TK = (torch.arange(T) % 2)[:, None] * E
    placement = Placement(torch.arange(E).repeat(2), plain.expert_of_TK + copy_TK)
    named = run(Router(3), placement=placement)
    for got, want in zip(named, plain, strict=True):
        assert_same_bits(actual=got, expected=want)


def test_a_correction_changes_choices_but_never_weights():
    """Experts 0 and 1 get all tokens, with the weights they would have on their own."""
    correction_E = torch.zeros(E)
    correction_E[:2] = 10.0
    out = run(Router(2, "sigmoid", renormalize=False, correction_bias_E=correction_E))
    assert torch.equal(out.expert_of_TK.sort(1).values, torch.tensor([0, 1]).expand(T, 2).int())
    scores_TK = out.logits_TE.sigmoid().gather(1, out.expert_of_TK.long())
    torch.testing.assert_close(out.gate_TK, scores_TK, rtol=1e-6, atol=0)
    assert out.load_E.tolist() == [T, T] + [0] * (E - 2)


def test_the_seed_decides_which_seconds_serve():
    first, again, other = (
        run(Router(2, random_second_seed=seed)).expert_of_TK for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first[:, 0] >= 0).all() and 0 < int((first[:, 1] < 0).sum()) < T


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("group_count", [1, 4])
def test_ties_go_to_the_lower_expert_and_the_lower_group(top_k: int, group_count: int):
    router = Router(top_k, "sigmoid", num_groups=group_count, top_groups=1)
    out = moe(torch.zeros(3, H), WEIGHT, EXPERTS, router, config=SMALL)
    assert torch.equal(out.expert_of_TK, torch.arange(top_k).expand(3, top_k).int())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["DeepSeek-V3", "groups of one", "softmax corrected", "GShard"])
def test_any_logits_give_distinct_ids_in_range(name: str, value: float):
    weight_EH = WEIGHT.clone()
    weight_EH[3] = value
    weight_EH[4] = torch.nan
    out = moe(X, weight_EH, EXPERTS, replace(ROUTERS[name], capacity=None), config=SMALL)
    ids_TK = out.expert_of_TK.where(
        out.expert_of_TK >= 0, -1 - torch.arange(out.expert_of_TK.shape[1])
    )
    assert (out.expert_of_TK < E).all()
    assert (ids_TK.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_router_reads_16_bit_tokens(dtype: torch.dtype):
    """The logits are those of the exact products: a rounded router would be off by 1e-3."""
    experts = Experts(EXPERTS.gate_up_E2IH.to(dtype), EXPERTS.down_EHI.to(dtype))
    x_TH = X.to(dtype)
    out = moe(x_TH, WEIGHT, experts, Router(3), config=SMALL)
    logits_TE = x_TH.double() @ WEIGHT.double().T
    torch.testing.assert_close(out.logits_TE.double(), logits_TE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_router_biases_may_have_any_float_type(dtype: torch.dtype):
    router = Router(3, "sigmoid", bias_E=BIAS.to(dtype), correction_bias_E=CORRECTION.to(dtype))
    wide = Router(3, "sigmoid", bias_E=BIAS.to(dtype).float(),
                  correction_bias_E=CORRECTION.to(dtype).float())  # fmt: skip
    for got, want in zip(run(router), run(wide), strict=True):
        assert_same_bits(actual=got, expected=want)


def test_torch_compile_carries_every_field_of_the_router():
    router = Router(
        2, "sigmoid", False, 2.5, BIAS, CORRECTION, num_groups=4, top_groups=2,
        capacity=4, random_second_seed=5,
    )  # fmt: skip
    compiled = torch.compile(
        lambda x_TH: moe(x_TH, WEIGHT, EXPERTS, router, config=SMALL),
        fullgraph=True,
        backend="aot_eager",
    )
    for got, want in zip(compiled(X), run(router), strict=True):
        assert_same_bits(actual=got, expected=want)


REFUSED = {
    "unknown score": (lambda: Router(2, "relu"), "score.*softmax.*relu"),
    "scale zero": (lambda: Router(2, scale=0.0), "scale.*positive.*0"),
    "no groups": (lambda: Router(2, num_groups=0), "num_groups.*positive.*0"),
    "too many top groups": (lambda: Router(2, top_groups=2), "top_groups.*num_groups=1.*2"),
    "capacity zero": (lambda: Router(2, capacity=0), "capacity.*positive.*0"),
    "capacity a float": (lambda: Router(2, capacity=1.5), "capacity.*integer.*1.5"),
    "negative seed": (lambda: Router(2, random_second_seed=-1), r"random_second_seed.*-1"),
    "second of three": (lambda: Router(3, random_second_seed=1), "top_k must be 2.*3"),
    "integer bias": (lambda: Router(2, bias_E=torch.zeros(E).int()), "bias_E.*float.*int32"),
    "short bias": (lambda: run(Router(2, bias_E=torch.zeros(3))), r"bias_E.*shape.*\(12,\).*3"),
    "short correction": (
        lambda: run(Router(2, correction_bias_E=torch.zeros(3))),
        r"correction_bias_E.*shape.*\(12,\).*3",
    ),
    "correction that wants grad": (
        lambda: run(Router(2, correction_bias_E=torch.zeros(E, requires_grad=True))),
        "correction_bias_E must not require grad",
    ),
    "groups that do not divide": (lambda: run(Router(2, num_groups=5)), "num_groups.*E=12.*5"),
    "too few in the groups": (
        lambda: run(Router(4, num_groups=4)), "top_k.*3 experts of 1 groups.*4"
    ),
    "capacity with named slots": (
        lambda: run(
            Router(1, capacity=2),
            placement=Placement(torch.arange(E), torch.zeros(T, 1, dtype=torch.int32)),
        ),
        r"slot_of_TK.*capacity.*\(25, 1\)",
    ),
    "a float16 router for float32": (
        lambda: moe(X, WEIGHT.half(), EXPERTS, Router(2)),
        "router_weight_EH.*dtype.*float32.*float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_router_cannot_do_is_refused_with_argument_rule_and_value(name: str):
    call, message = REFUSED[name]
    assert_refused(call, message)
