"""What a spec takes from the version of Triton."""

import pytest

from megakernel.launch.call import flattens_well


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.6.0", True), ("3.7.1", True), ("3.8.0", False), ("3.9.0+git1", False), ("3.10", False)],
)
def test_loops_are_flattened_before_3_8(version: str, expected: bool) -> None:
    assert flattens_well(version) is expected
