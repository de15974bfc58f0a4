"""What a launch reported, in words."""

from dataclasses import replace

from megakernel.plan.protocol import Protocol
from megakernel.plan.schedule import Schedule


def describe_stall(words: list[int], schedule: Schedule | None) -> str:
    """Say which task waited for which counter, by number alone where the schedule is forgotten."""
    _, task, counter, seen, target, num_tiles = words[Protocol.STALL_AT :][:6]
    name, awaited = f"task {task}", f"counter {counter}"
    if schedule is not None:
        # A launch that makes its rows counts its row tiles itself.
        schedule = replace(schedule, num_tiles=num_tiles, counted=True)
        name, awaited = schedule.describe_task(task), schedule.describe_counter(counter)
    if counter == Protocol.SCATTER_DONE:  # what the task is only the row tables would say
        name = f"task {task} (the first of a worker that needs the row tables)"
    return (
        f"{name} waited for {awaited} to reach {target}, saw {seen}; "
        "the outputs of that call are not valid"
    )


def describe_bad_input(words: list[int]) -> str:
    """Say which id or slot the launch skipped, and the rule it broke."""
    reason, token, choice, value = words[Protocol.INPUT_AT :][:4]
    rule = {
        Protocol.ID_OUT_OF_RANGE: "expert_of_TK[{0}, {1}] must be an expert id or -1, got {2}",
        Protocol.ID_TWICE: (
            "expert_of_TK[{0}, {1}] must differ from the token's other ids, got {2}"
        ),
        Protocol.SLOT_OF_OTHER_EXPERT: (
            "slot_of_TK[{0}, {1}] must be a slot that holds the chosen expert, got {2}"
        ),
    }[reason]
    return rule.format(token, choice, value) + " (skipped by an earlier launch)"
