from __future__ import annotations

import subprocess
import sys

import pytest

from dgnet.cli import COMMANDS
from tests.helpers.command import list_commands

SLOW = {"torch", "timm", "torchvision", "lightning", "matplotlib"}

PRINT_HELPS = """
import contextlib, io, sys
from dgnet.cli import main
for words in {words}:
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            main([*words, "--help"])
    except SystemExit as error:
        assert not error.code, words
    assert output.getvalue().startswith("usage: " + " ".join(["dgnet", *words])), output.getvalue()
print(sorted({slow} & set(sys.modules)))
"""


def test_help_texts_import_neither_torch_nor_timm() -> None:
    code = PRINT_HELPS.format(words=[[], *list_commands(COMMANDS)], slow=SLOW)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_answers_without_importing_torch(option: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dgnet", option]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "dgnet" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dgnet.cli" in imported
    assert not SLOW & imported
