"""Tools of other people in tests. Most are not in the development environment: `make test-tools` installs them."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from tests.helpers.pages import blocks

PAGE = "docs/tools.md"


def require(module: str) -> Any:
    """Import a tool's module. If it is missing the test is skipped; under `make test-tools` it fails."""
    if os.environ.get("DGNET_TEST_TOOLS"):
        return importlib.import_module(module)
    return pytest.importorskip(module, reason=f"make test-tools installs {module}")


def run_page(section: str, **names: object) -> dict[str, Any]:
    """Run the page's first block, then the Python blocks of a section, in the current folder. Returns all names they define.

    `names`: names that the section finds in place of those of the first block.
    """
    scope: dict[str, Any] = {}
    run_blocks("", scope)
    scope.update(names)
    run_blocks(section, scope)
    return scope


def run_blocks(section: str, scope: dict[str, Any]) -> None:
    found = blocks(PAGE, "python", section)
    assert found
    for block in found:
        exec(compile(block, f"{PAGE}, {section}", "exec"), scope)
