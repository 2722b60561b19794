"""A package that an extra installs and that is missing: one line, with the command that installs it."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from dgnet._extras import EXTRAS, find_missing, import_extra
from dgnet.errors import UsageError
from dgnet.experiments import difference
from tests.helpers.boxes import box_entry, image_entry, write_set
from tests.helpers.command import refuse

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hide(monkeypatch) -> Callable[[str], None]:
    """Make a package look as if it were not installed."""

    def hide_package(package: str) -> None:
        for module in list(sys.modules):
            if module.startswith(f"{package}."):
                monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)

    return hide_package


def test_the_extras_are_those_of_the_project():
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    developers = optional.pop("dev")
    for extra in ("docs", "tools"):  # for who builds or tests the documentation; no command needs them
        del optional[extra]
    assert {extra: tuple(re.split("[<>=~!]", line)[0] for line in lines) for extra, lines in optional.items()} == EXTRAS
    assert f"dgnet[{','.join(sorted([*EXTRAS, 'docs']))}]" in developers


BACKEND = ["--backend", "faster-coco-eval"]
CASES = [
    ("explore", "gradio", ["explore", "RUN"], "dgnet explore"),
    *(("export", package, ["export", "RUN"], "--format onnx") for package in EXTRAS["export"]),
    ("hfds", "datasets", ["train", "--data", "hfds/somebody/pictures"], "hfds/somebody/pictures"),
    ("detect", "pycocotools", ["detect", "evaluate", "RESULTS", "--data", "DATA"], "the evaluation of detections"),
    (
        "detect",
        "pycocotools",
        ["detect", "train", "--data", "DATA", "--images", "images", "--val-data", "DATA", "--model", "dg_resnet20"],
        "the evaluation of detections",
    ),
    (None, "faster_coco_eval", ["detect", "evaluate", "RESULTS", "--data", "DATA", *BACKEND], "--backend faster-coco-eval"),
]
"""The extra, its package, a command that needs it, and what the line says needs it."""


@pytest.mark.parametrize(("extra", "package", "words", "what"), CASES, ids=[f"{c[1]}-{' '.join(c[2][:2])}" for c in CASES])
def test_a_command_names_what_is_missing(extra, package, words, what, hide, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path, [image_entry(1)], [box_entry(1, 1, [4, 4, 20, 16], 1)], [{"id": 1, "name": "cell"}])
    (tmp_path / "results.json").write_text('[{"image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 16], "score": 0.9}]')
    hide(package)
    files = {"DATA": "instances.json", "RESULTS": "results.json"}
    before = sorted(tmp_path.rglob("*"))
    line = refuse(capsys, *(files.get(word, word) for word in words))
    wanted = f"'dgnet[{extra}]'" if extra else package.replace("_", "-")
    assert line == f"dgnet: {what} needs {package}, which is not installed; type: pip install {wanted}\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_report_of_a_grid_names_what_is_missing(hide):
    rows = {seed: {"top1": str(80 + seed)} for seed in range(3)}
    hide("scipy")
    with pytest.raises(UsageError, match=r"needs scipy, which is not installed; type: pip install 'dgnet\[experiments\]'"):
        difference(rows, rows)


def test_every_extra_has_a_case():
    assert {case[0] for case in CASES} - {None} | {"experiments"} == set(EXTRAS)


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_a_package.py").write_text("import libhalf")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"needs half_a_package, which cannot be imported \(No module named 'libhalf'\); type"):
        import_extra("half_a_package", "this test")


@pytest.mark.parametrize(("extra", "package"), [(extra, package) for extra in EXTRAS for package in EXTRAS[extra]])
def test_what_is_missing_of_an_extra(extra, package, hide):
    hide(package)
    assert package in find_missing(extra)
