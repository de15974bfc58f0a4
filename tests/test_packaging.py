"""What leaves the house: the wheel's contents, and nothing that ties us to one machine."""

import configparser
import email
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.helpers.sources import PACKAGES, ROOT, dotted_name, modules_of, tracked_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the tracked files, with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("moe_megakernel-*.whl")
    return built


def files_of(wheel: Path) -> dict[str, bytes]:
    """Return what a wheel holds, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_carries_the_packages_and_nothing_else(wheel: Path) -> None:
    carried = {name for name in files_of(wheel) if ".dist-info/" not in name}
    assert carried == {name for name in tracked_files() if name.split("/")[0] in PACKAGES}
    assert "megakernel/launch/tuned.json" in carried


def described(wheel: Path, file: str) -> str:
    """Return a file of the wheel's description."""
    (text,) = (held for name, held in files_of(wheel).items() if name.endswith(f"-info/{file}"))
    return text.decode()


def test_a_wheel_describes_itself_as_the_project_does(wheel: Path) -> None:
    said = email.message_from_string(described(wheel, "METADATA"))
    assert (said["Name"], said["Version"]) == ("moe-megakernel", PROJECT["version"])
    assert said["Summary"] == PROJECT["description"]
    assert said["License-Expression"] == "MIT" and said["Requires-Python"] == ">=3.11"
    assert set(said.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert said.get_all("Classifier") == PROJECT["classifiers"]
    assert said.get_payload().startswith("# moe-megakernel")
    base = [need for need in said.get_all("Requires-Dist") if "extra ==" not in need]
    assert {re.split(r"\W", need)[0] for need in base} == {"numpy", "torch", "triton"}


def test_a_wheel_brings_the_planner_as_a_command(wheel: Path) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(described(wheel, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"moe-balance": "balance.__main__:main"}
    module, function = scripts["console_scripts"]["moe-balance"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("package", ["balance", "megakernel"])
def test_a_package_tells_the_version_of_the_project(package: str) -> None:
    assert importlib.import_module(package).__version__ == PROJECT["version"]


@pytest.mark.slow
def test_the_wheel_alone_runs_the_planner(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, with what a wheel needs and no extra."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs = tmp_path / "venv" / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    here = "from importlib.util import find_spec; import sys; print(*map(find_spec, sys.argv[1:]))"
    optional = [programs / "python", "-c", here, "tqdm", "scipy", "matplotlib"]
    assert subprocess.check_output(optional, text=True).split() == ["None"] * 3
    command = [programs / "moe-balance", "stats", "synthetic"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is worth it" in done.stdout
