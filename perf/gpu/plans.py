"""The two runs as tables: what happens in which order, for how long.

``first`` finds out whether the layer runs, is right and how fast it is. ``second`` takes what
``first`` has compiled along, and runs the GPU's tests, the suites and the levers.
"""

from dataclasses import replace

from perf.gpu.steps import Plan, Step

FIRST_S, SECOND_S = 220.0, 400.0
# A rehearsal's machine may have two busy cores for what takes the GPU's sixteen.
REHEARSAL_FACTOR = 4.0
# What is timed: the layer of a model at some number of tokens.
TIMED = (("Qwen3-30B-A3B", 8192), ("Qwen3-30B-A3B", 64), ("Qwen3-30B-A3B", 1),
         ("Mixtral-8x7B", 8192))  # fmt: skip
# What of that is trained.
TRAINED = (TIMED[0], TIMED[3])
SUITE_SECONDS = {
    "forward": 40.0, "decode": 25.0, "replay": 25.0, "timeline": 25.0, "backward": 40.0,
    "train": 30.0,
}  # fmt: skip
# Other people's kernels may compile for minutes, or hang: they come last, and time ours beside
# them once more.
PEER_SECONDS = {"forward": 60.0, "decode": 40.0, "train": 40.0}
TEST_SECONDS = 140.0


def ladder(name: str, function: str, *arguments: str, explains: str = "") -> Step:
    """Return a rung of the ladder: the run ends where one breaks."""
    return Step(name, f"tests.gpu.ladder:{function}", arguments, explains=explains)


LADDER = (
    ladder("smallest", "smallest"),
    ladder("small-cases", "small_cases"),
    ladder("rows16-T64", "one_layer", "rows16", "64"),
    ladder("rows64-T512", "one_layer", "rows64", "512"),
    ladder("rows128-T4096", "one_layer", "rows128", "4096"),
    ladder("same-bits", "same_bits"),
    ladder("repeats-rows16", "repeats", "rows16", "64"),
    ladder("repeats-rows128", "repeats", "rows128", "4096"),
    ladder("fences", "fences", explains="repeats-rows128"),
    replace(ladder("levers", "levers"), stops=False),
    ladder("stall", "stall"),
)


def backward_rung(name: str, function: str, *arguments: str) -> Step:
    """Return a rung of the backward's ladder, which comes when the forward has its times."""
    return Step(name, f"tests.gpu.backward_ladder:{function}", arguments)


BACKWARD_LADDER = (
    backward_rung("backward-small", "small_cases"),
    backward_rung("backward-rows16-T64", "one_layer", "rows16", "64"),
    backward_rung("backward-rows128-T4096", "one_layer", "rows128", "4096"),
    backward_rung("backward-bits", "same_bits"),
    backward_rung("backward-repeats", "repeats"),
    backward_rung("backward-stall", "stall"),
)


def training(model: str, num_tokens: int) -> Step:
    """Return the step that times a layer's backward by graph."""
    name = f"time-backward-{model}-T{num_tokens}"
    function = "perf.gpu.training:time_backward"
    return Step(name, function, (model, str(num_tokens)), stops=False)


def timing(model: str, num_tokens: int) -> Step:
    """Return the step that times a layer by graph."""
    name = f"time-{model}-T{num_tokens}"
    return Step(name, "perf.gpu.timing:time_layer", (model, str(num_tokens)), stops=False)


def suite(name: str, seconds: float, *who: str) -> Step:
    """Return the step that runs a suite; it starts no new case in the last fifth of its time."""
    arguments = (name, str(0.8 * seconds), *who)
    return Step("-".join([*who, name]), "perf.gpu.suites:run_one", arguments, seconds, stops=False)


FIRST = Plan(
    "first",
    FIRST_S,
    (
        Step("compile", "perf.gpu.compiling:compile_for", ("first",), 75.0, 75.0,
             beside=True, stops=False, interprets=False),
        Step("machine", "perf.gpu.machine:describe", waits=False),
        Step("roofs", "perf.gpu.machine:roofs", waits=False, stops=False),
        *LADDER,
        *(timing(*timed) for timed in TIMED),
        Step("timeline", "perf.gpu.timing:timed_launch", (TIMED[0][0], "8192"), stops=False),
        *BACKWARD_LADDER,
        *(training(*trained) for trained in TRAINED),
    ),
)  # fmt: skip

SECOND = Plan(
    "second",
    SECOND_S,
    (
        Step("compile", "perf.gpu.compiling:compile_for", ("second",), 90.0, 90.0,
             beside=True, stops=False, interprets=False),
        Step("machine", "perf.gpu.machine:describe", waits=False),
        Step("roofs", "perf.gpu.machine:roofs", waits=False, stops=False),
        Step("tests", "perf.gpu.testing:run_tests", (), TEST_SECONDS, stops=False),
        *(suite(name, seconds) for name, seconds in SUITE_SECONDS.items()),
        Step("levers-Qwen", "perf.gpu.levers:sweep", ("Qwen3-30B-A3B", "8192"), stops=False),
        Step("levers-Mixtral", "perf.gpu.levers:sweep", ("Mixtral-8x7B", "8192"), stops=False),
        *(suite(name, seconds, "peers") for name, seconds in PEER_SECONDS.items()),
    ),
)  # fmt: skip
PLANS = {plan.name: plan for plan in (FIRST, SECOND)}


def rehearsed(plan: Plan) -> Plan:
    """Return a plan with the patience that a slow machine needs."""
    steps = tuple(
        replace(step, limit_s=step.limit_s * REHEARSAL_FACTOR,
                silence_s=step.silence_s * REHEARSAL_FACTOR)
        for step in plan.steps
    )  # fmt: skip
    return replace(plan, seconds=plan.seconds * REHEARSAL_FACTOR, steps=steps)
