"""The package as users install it: the source distribution, the wheel, and the command in an environment without extras."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dgnet._extras import EXTRAS
from tests.helpers.command import QUICK
from tests.helpers.data import jpeg

ROOT = Path(__file__).parents[1]
WEIGHTS = "models/pretrained/example.safetensors"  # a place where weights may lie in the package


def run(*command: object, **options: object) -> str:
    """The stdout of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def list_files(package: Path) -> set[str]:
    """The files of a package's folder, without what Python writes there."""
    paths = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(package).as_posix() for path in paths}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked source distribution, with a file of weights among the networks."""
    folder = tmp_path_factory.mktemp("source")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    assert list_files(unpacked / "src" / "dgnet") == list_files(ROOT / "src" / "dgnet")
    weights = unpacked / "src" / "dgnet" / WEIGHTS
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"no real weights")
    return unpacked


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    """The wheel that is built from the source distribution."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", source / "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(source, wheel):
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    inside = {name.removeprefix("dgnet/") for name in names if name.startswith("dgnet/")}
    assert inside == list_files(source / "src" / "dgnet")
    kinds = {
        "py.typed",
        "analysis/explorer.html",
        "graph/aggregate.cpp",
        "inference/native.cpp",
        "inference/kernels.h",
        "inference/program.h",
        WEIGHTS,
    }
    assert kinds <= inside
    others = {Path(name).parts[0] for name in names} - {"dgnet"}
    assert [name.endswith(".dist-info") for name in others] == [True]


@pytest.mark.slow
def test_the_source_distribution_is_complete_and_holds_no_more(source):
    """It has what tests and documentation read, and nothing from a working folder, such as runs or data."""
    folders = {path.name for path in source.iterdir() if path.is_dir()} - {"dist"}
    assert folders == {"src", "tests", "docs", "examples", "recipes", "benchmarks", "experiments"}
    assert {"Makefile", "constraints.txt", "mkdocs.yml", "CHANGELOG.md", "LICENSE"} <= {path.name for path in source.iterdir()}


def find_requirements(wheel: Path) -> list[Requirement]:
    """What the wheel requires without extras."""
    (metadata,) = importlib.metadata.distributions(path=[str(wheel)])
    return [Requirement(line) for line in metadata.requires or []]


def find_needed(requirements: list[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that `requirements` need, directly and indirectly, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    asked: set[tuple[str, str]] = set()
    left = [(requirement, "") for requirement in requirements]  # with the extra that asks for it
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = distribution = importlib.metadata.distribution(name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in asked:
                asked.add((name, wanted))
                left += [(Requirement(line), wanted) for line in distribution.requires or []]
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel, and links to the installed packages that it requires: no extra, nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in find_needed(find_requirements(wheel)).values():
        for top in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = packages / top
            if not link.is_symlink():
                link.symlink_to(Path(str(distribution.locate_file(top))).absolute())
    return folder


@pytest.mark.slow
def test_the_installed_command_does_the_main_jobs(environment, tmp_path):
    """It trains on digits, evaluates, predicts, analyses and builds the sparse mode, and writes nothing into the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (packages,) = environment.glob("lib/python*/site-packages")
    before = list_files(packages / "dgnet")
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}

    def ask(*words: object) -> str:
        return run(environment / "bin" / "dgnet", *words, cwd=tmp_path, env=variables | {"PYTHONDONTWRITEBYTECODE": "1"})

    found = json.loads(ask("doctor", "--device", "cpu", "--json"))
    assert found["folder"] == str(packages / "dgnet")  # not the source folder
    assert found["versions"]["dgnet"] == project["version"]
    assert {extra for extra, missing in found["missing"].items() if missing} == EXTRAS.keys() - {
        "experiments"
    }  # scikit-learn needs scipy
    assert found["sparse_mode"]["name"] in ("native", "plain")
    assert "dg_resnet50" in ask("models").splitlines()
    ask("train", "--epochs", "1", "--output", "run", "--accelerator", "cpu", *QUICK, "--batch-size", "64")
    figures = json.loads(ask("evaluate", "run", "--mode", "sparse", "--device", "cpu", "--json"))
    assert 0 <= figures["top1"] <= 100
    (tmp_path / "photo.jpg").write_bytes(jpeg(100))
    (prediction,) = json.loads(ask("predict", "run", "photo.jpg", "--json"))
    assert set(prediction["classes"]) <= set("0123456789")
    ask("analyze", "run", "--output", "figures", "--extremes", "1", "--explorer", "2")
    assert list((tmp_path / "figures").glob("*.png"))
    assert "<html" in next((tmp_path / "figures").glob("*.html")).read_text(encoding="utf-8")
    assert list_files(packages / "dgnet") == before
