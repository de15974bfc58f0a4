"""The smallest case through every route, for a sanitizer: ``python -m tests.gpu.smallest``."""

from dataclasses import replace

import torch

import megakernel
from megakernel import KernelConfig, moe_routed, prepare_replay
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import SMALL, make_inputs, run

SAID = "three routes agree"


def main(device: torch.device, config: KernelConfig = SMALL) -> None:
    """Run live, replayed and given routing, and fail unless they agree.

    Args:
        device: where.
        config: as :data:`tests.helpers.inputs.SMALL`, but for what changes no bit.
    """
    case = next(case for case in SHAPES if case.name == "one-token")
    inputs = make_inputs(case, device)
    live = run(inputs, config=config)
    replay = prepare_replay(live.expert_of_TK, case.E, config=config)
    replayed = run(inputs, replay=replay, config=config)
    routing = live.expert_of_TK, live.gate_TK
    given_TH = moe_routed(inputs.x_TH, *routing, inputs.experts, config=config)
    megakernel.check()
    same = torch.equal(replayed.y_TH, live.y_TH) and torch.equal(given_TH, live.y_TH)
    assert same, f"three routes differ: {live.y_TH}, {replayed.y_TH}, {given_TH}"


if __name__ == "__main__":
    has_gpu = torch.cuda.is_available()
    polls = 1 << 19 if has_gpu else None  # 0.7 s
    here = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    main(here, replace(SMALL, max_polls=polls))
    print(SAID)
