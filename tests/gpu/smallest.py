"""The smallest case through every route, for a sanitizer: ``python -m tests.gpu.smallest``."""

import torch

import megakernel
from megakernel import moe_routed, prepare_replay
from tests.helpers.cases import SHAPES
from tests.helpers.inputs import SMALL, make_inputs, run


def main() -> None:
    """Run live, replayed and given routing, and print that they agree."""
    case = next(case for case in SHAPES if case.name == "one-token")
    inputs = make_inputs(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    live = run(inputs)
    replayed = run(inputs, replay=prepare_replay(live.expert_of_TK, case.E, config=SMALL))
    routing = live.expert_of_TK, live.gate_TK
    given_TH = moe_routed(inputs.x_TH, *routing, inputs.experts, config=SMALL)
    megakernel.check()
    assert torch.equal(replayed.y_TH, live.y_TH) and torch.equal(given_TH, live.y_TH)
    print("three routes agree")


if __name__ == "__main__":
    main()
