"""Threads that call the layer at once: ``python -m tests.helpers.threads [--all]``.

For a process of its own, with a time limit: a fault here has ended processes, and may hang one. It
prints what differed from the same call made alone, and exits with 1 if anything did.
"""

import os
import sys
import threading
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn

from megakernel import Experts, KernelConfig, Placement, Router, moe, moe_routed, prepare_replay
from megakernel.stages import combine_rows, ffn_rows
from tests.helpers.interpreter import make_fast

Call = Callable[[], Tensor]
T, K, E, H, I = 9, 2, 5, 16, 8
SMALL = KernelConfig(
    num_workers=2, block_rows=16, block_i=16, block_h=16, step=16, block_tokens=16,
    block_experts=16, select_tokens=16, combine_tokens=16, column_groups=1,
)  # fmt: skip
ROUNDS = 1


def make_calls(every: bool) -> dict[str, Call]:
    """Return calls of several sizes, so that scratch grows between them."""
    experts = Experts(torch.randn(E, 2 * I, H) / 3, torch.randn(E, H, I) / 3)
    router_EH, router = torch.randn(E, H), Router(K)
    few_TH, many_TH = torch.randn(T, H), torch.randn(5 * T, H)
    live = moe(few_TH, router_EH, experts, router, config=SMALL)
    ids_TK, gate_TK = live.expert_of_TK, live.gate_TK
    placement = Placement(torch.tensor([4, 3, 2, 1, 0, 2]))

    def replayed() -> Tensor:
        replay = prepare_replay(ids_TK, E, placement, SMALL)
        return moe(few_TH, router_EH, experts, router, replay=replay, config=SMALL).y_TH

    def staged() -> Tensor:
        replay = prepare_replay(ids_TK, E, config=SMALL)
        y_CH = ffn_rows(few_TH, replay, experts, SMALL)
        return combine_rows(y_CH, replay.rows.row_of_TK, gate_TK, SMALL)

    def refused() -> Tensor:
        try:
            moe_routed(few_TH, torch.full_like(ids_TK, E), gate_TK, experts, config=SMALL)
        except ValueError as error:
            return torch.tensor("expert_of_TK" in str(error))
        return torch.tensor(False)

    calls = {
        "moe": lambda: moe(few_TH, router_EH, experts, router, config=SMALL).y_TH,
        "moe of many tokens": lambda: moe(many_TH, router_EH, experts, router, config=SMALL).y_TH,
        "moe_routed": lambda: moe_routed(few_TH, ids_TK, gate_TK, experts, config=SMALL),
        "replayed": replayed,
        "stages": staged,
        "refused": refused,
    }
    if every:
        compiled = torch.compile(calls["moe"], fullgraph=True, backend="eager")
        model = swapped_model()
        calls |= {
            "compiled": lambda: compiled() + 0,
            "swapped model": lambda: model(torch.arange(12).view(2, 6)).logits,
        }
    return calls


def swapped_model() -> nn.Module:
    """Return a tiny transformers model whose sparse blocks are one launch each."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from megakernel.adapters.transformers import use_megakernel

    config = Qwen3MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    use_megakernel(model, config=SMALL)
    return model


def run_at_once(calls: dict[str, Call], expected: dict[str, Tensor], wrong: list[str]) -> None:
    """Let a thread make each call, all starting together, and compare bits."""
    start = threading.Barrier(len(calls))

    def repeat(name: str, call: Call) -> None:
        start.wait()
        for _ in range(ROUNDS):
            try:
                if not torch.equal(call(), expected[name]):
                    wrong.append(f"{name}: other numbers")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=without_grad(repeat), args=item) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def without_grad(function: Callable[..., None]) -> Callable[..., None]:
    """Return the function, which then asks for no gradients: a mode is one thread's own."""

    def run(*arguments: object) -> None:
        with torch.no_grad():
            function(*arguments)

    return run


def main(every: bool) -> int:
    """Make each call alone, then all at once."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not every:  # which is slow anyway, and runs the interpreter as it comes
        make_fast()
    wrong: list[str] = []
    with torch.no_grad():
        calls = make_calls(every)
        expected = {name: call().clone() for name, call in calls.items()}
    run_at_once(calls, expected, wrong)
    print("\n".join(wrong) or f"{len(calls)} threads agree")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv))
