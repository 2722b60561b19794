from __future__ import annotations

import sys
import warnings

import pytest

from dgnet import cli
from dgnet.cli.command import Command, Parser

GIVEN = {
    ("lightning.pytorch.utilities._pytree", FutureWarning): False,
    ("torch", DeprecationWarning): False,
    ("torch.optim", UserWarning): True,  # it may be about what the user asked for
    ("torchaudio", FutureWarning): True,
    ("dgnet.training", FutureWarning): True,
}


def warn(args: object) -> None:
    for module, category in GIVEN:
        warnings.warn_explicit(module, category, "file.py", 1, module)


def show(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> set[tuple[str, type[Warning]]]:
    """What is shown of the warnings in GIVEN while a command runs; `options`: those of `python -W`."""
    monkeypatch.setattr(sys, "warnoptions", options)
    monkeypatch.setitem(cli.COMMANDS, "warn", Command(lambda: Parser(description="Warn."), warn))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli.main(["warn"]) == 0
        shown = {(str(warning.message), warning.category) for warning in caught}
        caught.clear()
        warn(None)
        assert len(caught) == len(GIVEN), "warnings are as before the command"
    return shown


def test_deprecations_of_dependencies_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(monkeypatch, []) == {warning for warning, is_shown in GIVEN.items() if is_shown}


def test_all_warnings_are_shown_if_the_user_asks_for_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(monkeypatch, ["default"]) == set(GIVEN)
