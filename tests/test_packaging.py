"""What an installation promises: pinned versions, every package in the wheel, processes that stay free of torch."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "optimize", "draft_models", "loadtest")
CUDA_ONLY = re.compile(r"^(triton|cuda-.*|nvidia-.*)$")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pinned), "constraints.txt holds exact versions only"
    return {canonicalize_name(name): Version(version) for name, version in pinned}


def declared(pyproject: dict[str, Any]) -> list[Requirement]:
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for group in (project["dependencies"], *extras) for line in group]


def test_every_declared_dependency_is_pinned_inside_its_range(
    pyproject: dict[str, Any], pins: dict[str, Version]
) -> None:
    for requirement in declared(pyproject):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(version), f"{requirement}: the pin {version} is outside"


def test_build_backend_is_pinned_as_installed(pyproject: dict[str, Any], pins: dict[str, Version]) -> None:
    assert pyproject["build-system"]["requires"] == [f"setuptools=={pins[canonicalize_name('setuptools')]}"]


def test_everything_installed_is_pinned(pyproject: dict[str, Any], pins: dict[str, Version]) -> None:
    """Follows what is installed, so that a dependency's new dependency cannot slip in without a pin."""
    todo, seen = declared(pyproject), set()
    extras = pyproject["project"]["optional-dependencies"]
    optional = {
        canonicalize_name(Requirement(line).name) for group in extras if group != "dev" for line in extras[group]
    }
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or not applies(requirement, frozenset()):
            continue
        seen.add(key)
        if name in optional and not is_installed(name):
            continue
        for child in map(Requirement, importlib.metadata.requires(name) or ()):
            if applies(child, requirement.extras):
                todo.append(child)
    missing = {name for name, _ in seen if name not in pins and not CUDA_ONLY.match(name)}
    assert not missing, f"not in constraints.txt: {', '.join(sorted(missing))}"


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def applies(requirement: Requirement, extras: set[str] | frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def test_find_pattern_takes_every_folder_with_code(pyproject: dict[str, Any]) -> None:
    include = pyproject["tool"]["setuptools"]["packages"]["find"]["include"]
    found = set(find_packages(str(ROOT), include=include))
    with_code = {
        ".".join(file.parent.relative_to(ROOT).parts) for top in PACKAGES for file in (ROOT / top).rglob("*.py")
    }
    assert found == with_code, "a folder with code has no __init__.py, or one beside the four packages has"


def test_command_is_installed_and_runs() -> None:
    [command] = [point for point in importlib.metadata.entry_points(group="console_scripts") if point.name == "outpace"]
    assert command.value == "server.cli:main"
    done = subprocess.run(
        [sys.executable, "-c", "from server.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for child in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(child.name)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
API_PROCESS = ["server.cli", "server.api", "server.text", "server.telemetry", "server.engine.client", "loadtest"]
BOOKKEEPING = ["server.engine.scheduler", "server.engine.blocks", "server.engine.prefix_cache", "server.engine.slots"]


@pytest.mark.parametrize("modules", [API_PROCESS, BOOKKEEPING], ids=["api-process", "bookkeeping"])
def test_loads_neither_torch_nor_transformers(modules: list[str]) -> None:
    """The import contracts read our own imports; this sees what other libraries pull in as well."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_ci_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


def test_make_refuses_an_old_interpreter(tmp_path: Path) -> None:
    """A copy of the Makefile and an interpreter that says no: the message names what is needed and what was found."""
    for name in ("Makefile", "constraints.txt", "requirements-model.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18"\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "serve", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False, env=plain_env()
    )
    assert done.returncode != 0
    assert "Outpace needs Python 3.11 or 3.12" in done.stderr
    assert "Python 3.9.18" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_passes_variables_to_the_server() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "serve", "PORT=9000", "ARGS=--max-num-seqs 16"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=plain_env(),
    )
    assert done.stdout.splitlines()[-1].endswith("--host '127.0.0.1' --port '9000' --max-num-seqs 16")


def plain_env() -> dict[str, str]:
    """The environment without what an outer `make test` hands down to its children."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


@pytest.mark.slow
def test_wheel_holds_every_module(tmp_path: Path) -> None:
    """Built from a copy, because setuptools leaves its build folder in the source tree."""
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    modules = {file.relative_to(source).as_posix() for file in source.rglob("*.py")}
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("outpace-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules <= names
    assert {name.split("/")[0] for name in names if not name.startswith("outpace-")} == set(PACKAGES)
