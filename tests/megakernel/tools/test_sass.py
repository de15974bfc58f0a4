"""Disassemblies are read right."""

import pytest

from megakernel.tools.sass import parse_sass


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must hold SASS instructions, got none"),
        ("/*0000*/ EXIT ;\n/*0000*/ EXIT ;", "must hold one function, got several"),
    ],
)
def test_a_listing_must_be_one_function(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        parse_sass(text)


def test_encodings_are_not_taken_for_instructions() -> None:
    listing = (
        "        /*0000*/                   EXIT ;      /* 0x000000000000794d */\n"
        "                                               /* 0x000fea0003800000 */\n"
    )
    instructions, _ = parse_sass(listing)
    assert [one.text for one in instructions] == ["EXIT"]
