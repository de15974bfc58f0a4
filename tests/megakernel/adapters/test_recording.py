import pytest
import torch
from torch import nn

from balance import Topology, Trace, make_plan
from megakernel import KernelConfig, Placement
from megakernel.adapters.transformers import record_routing, replay_routing, use_megakernel
from tests.helpers.compare import assert_same_bits
from tests.megakernel.adapters.tiny import (
    FUSED,
    LOGITS_TOLERANCE,
    MIXTRAL,
    OLMOE,
    QWEN3,
    Family,
    each,
    eager,
    make,
    prompt,
    run,
)


@each(FUSED)
def test_replayed_logits_are_the_live_ones(family: Family) -> None:
    model = use_megakernel(make(family))
    with record_routing(model) as record:
        live = run(model).logits
    with replay_routing(model, record.ids_TLK):
        replayed = run(model).logits
    assert record.ids_TLK.shape[:2] == (prompt().numel(), family.moe_layers)
    assert_same_bits(actual=replayed, expected=live)


def test_swapped_and_plain_models_record_the_same_routing() -> None:
    plain, fused = make(OLMOE), use_megakernel(make(OLMOE))
    with record_routing(plain) as expected, record_routing(fused) as actual:
        run(plain)
        run(fused)
    assert torch.equal(actual.ids_TLK, expected.ids_TLK)
    torch.testing.assert_close(actual.weights_TLK, expected.weights_TLK, rtol=1e-5, atol=1e-6)
    assert actual.num_experts == expected.num_experts == 7
    run(plain)
    assert len(expected.ids_TLK) == prompt().numel()  # nothing is recorded afterwards


def test_other_ids_give_the_logits_of_those_experts() -> None:
    """Forced ids reach the output, and their weights come from the live gate."""
    model = use_megakernel(make(MIXTRAL))
    with record_routing(model) as record:
        run(model)
    forced_TLK = (record.ids_TLK + 1) % 5
    with replay_routing(model, forced_TLK.numpy()), record_routing(model) as replayed:
        actual = run(model).logits
    assert torch.equal(replayed.ids_TLK, forced_TLK)
    plain = make(MIXTRAL)
    for layer, ids_TK in enumerate(forced_TLK.long().unbind(1)):
        plain.model.layers[layer].mlp.gate.register_forward_hook(force(ids_TK))
    assert float((actual - run(plain).logits).abs().max()) < LOGITS_TOLERANCE


def force(ids_TK: torch.Tensor):
    def reweigh(_: nn.Module, __: tuple, output: tuple) -> tuple:
        weights_TK = output[0].softmax(-1).gather(1, ids_TK)
        return output[0], weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    return reweigh


def test_a_recorded_batch_is_planned_and_replayed_with_the_plan() -> None:
    model = use_megakernel(make(QWEN3))
    with record_routing(model) as record:
        live = run(model).logits
    source_rank_T = torch.arange(len(record.ids_TLK)) % 2
    trace = Trace(
        record.ids_TLK.numpy(), torch.zeros_like(source_rank_T).numpy(), source_rank_T.numpy(),
        record.num_experts,
    )  # fmt: skip
    plan = make_plan(trace, Topology(num_nodes=1, ranks_per_node=2, spare_slots_per_rank=1))
    placements = [
        Placement(
            torch.as_tensor(plan.expert_of_P(0, layer)), torch.as_tensor(plan.slot_of_TK(0, layer))
        )
        for layer in range(trace.num_layers)
    ]
    assert max(placement.max_copies for placement in placements) > 1
    with replay_routing(model, record.ids_TLK, placements):
        planned = run(model).logits
    assert_same_bits(actual=planned, expected=live)


def test_config_is_used_by_live_calls_and_replay() -> None:
    config = KernelConfig(
        num_workers=3, block_rows=16, block_i=16, block_h=32, step=32, block_tokens=16,
        block_experts=16, select_tokens=16,
    )  # fmt: skip
    model = use_megakernel(make(MIXTRAL), config=config)
    with record_routing(model) as record:
        live = run(model).logits
    with replay_routing(model, record.ids_TLK):
        assert_same_bits(actual=run(model).logits, expected=live)
    assert float((live - eager(MIXTRAL).logits).abs().max()) < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("ids_TLK", "message"),
    [
        (torch.zeros(18, 3, 2).int(), r"shape \[T, L, K\] with L=2, got \(18, 3, 2\)"),
        (torch.zeros(18, 2).int(), r"shape \[T, L, K\] with L=2, got \(18, 2\)"),
        (torch.tensor([0, 5]).expand(18, 2, 2), r"must be .*, got 5"),
    ],
    ids=["layers", "axes", "range"],
)  # fmt: skip
def test_bad_ids_are_refused_on_entering(ids_TLK: torch.Tensor, message: str) -> None:
    model = use_megakernel(make(MIXTRAL))
    with pytest.raises(ValueError, match=message), replay_routing(model, ids_TLK):
        pass


def test_replay_of_another_number_of_tokens_is_refused_and_leaves_the_model_live() -> None:
    model = use_megakernel(make(MIXTRAL))
    ids_TLK = torch.tensor([0, 1]).expand(17, 2, 2)
    refused = pytest.raises(ValueError, match=r"replay must be prepared for \[T, K\] = \(18, 2\)")
    with refused, replay_routing(model, ids_TLK):
        run(model)
    assert float((run(model).logits - eager(MIXTRAL).logits).abs().max()) < LOGITS_TOLERANCE


def test_replay_needs_a_fused_gate() -> None:
    refused = pytest.raises(ValueError, match=r"gates fused.*MixtralSparseMoeBlock in .*mlp")
    with refused, replay_routing(make(MIXTRAL), torch.zeros(18, 2, 2, dtype=torch.int32)):
        pass


def test_a_model_is_recorded_once_at_a_time() -> None:
    model = use_megakernel(make(MIXTRAL))
    with record_routing(model):
        refused = pytest.raises(ValueError, match="must not be recorded twice")
        with refused, record_routing(model):
            pass
    with record_routing(model) as record:
        pass
    with pytest.raises(ValueError, match=r"whole calls of the model, got .*\[0, 0\]"):
        assert record.ids_TLK is None
