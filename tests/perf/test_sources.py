"""Sources are read, not run."""

import ast

import pytest

from perf import sources
from perf.sources import calls_of, first_line, functions_of, parse


def test_a_module_is_found_by_its_name():
    assert first_line(parse("perf.sources")).startswith("What the project's sources say")
    with pytest.raises(FileNotFoundError):
        parse("perf.no_such_module")


def test_functions_are_known_by_name_and_what_they_say():
    tree = ast.parse('def silent(): pass\ndef speaks():\n    """One.\n\n    Two."""\n')
    assert {name: first_line(node) for name, node in functions_of(tree).items()} == {
        "silent": "",
        "speaks": "One.",
    }


def test_calls_are_read_in_order_and_what_is_no_literal_is_none():
    tree = ast.parse("a = (P('x', f, 3, g=True), Q(1))\nb = [P(-1, *c, **d)]\n")
    assert list(calls_of(tree, "P")) == [(["x", None, 3], {"g": True}), ([-1, None], {})]
    assert list(calls_of(tree, "P", "Q"))[1] == ([1], {})


def test_a_digest_names_the_files_and_what_is_in_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "perf").mkdir()
    path = tmp_path / "perf" / "a.py"
    path.write_text("x = 1\n")
    digests = [sources.digest(), sources.digest()]
    path.write_text("x = 2\n")
    digests.append(sources.digest())
    path.rename(tmp_path / "perf" / "b.py")
    digests.append(sources.digest())
    assert digests[0] == digests[1] and len(set(digests)) == 3
