"""What leaves the house: the wheel's contents, and nothing that ties us to one machine."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.helpers.sources import PACKAGES, ROOT, dotted_name, modules_of, tracked_files

# Patterns that do not match themselves.
REGISTRY = re.compile(
    r"\b(pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|anaconda[.]org|npmjs[.]|crates[.]io)"
)
MACHINE_PATH = re.compile(r"(?<![\w./-])(/(home|root|Users|work|mnt)/\w|[A-Z]:\\{1,2}\w+\\)")


def hits(pattern: re.Pattern) -> dict[str, str]:
    """Return the first match of a pattern in each tracked text file."""
    found = {}
    for name in tracked_files():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content and (match := pattern.search(content.decode())):
            found[name] = match[0]
    return found


def test_no_tracked_file_names_a_package_registry() -> None:
    assert hits(REGISTRY) == {}


def test_no_tracked_file_holds_a_path_of_one_machine() -> None:
    assert hits(MACHINE_PATH) == {}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (REGISTRY, "https://files." + "pythonhosted" + ".org/packages"),
        (MACHINE_PATH, 'open("/ho' + 'me/ada/x")'),
        (MACHINE_PATH, "C:" + r"\Users\ada"),
    ],
)
def test_the_patterns_find_what_they_forbid(pattern: re.Pattern, text: str) -> None:
    assert pattern.search(text)


@pytest.mark.parametrize("text", ["perf/work/x", "https://a.b/home/x", "/tmp", "a/home/b", "T:\\"])
def test_ordinary_text_is_no_machine_path(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_every_package_is_found_and_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    held = {dotted_name(path) for path in modules_of(*PACKAGES) if path.name == "__init__.py"}
    assert set(found) == held
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_a_wheel_carries_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = tracked_files()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            *offline,
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("moe_megakernel-*.whl")
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert carried == {name for name in tracked if name.split("/")[0] in PACKAGES}
