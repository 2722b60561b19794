"""The pages of the documentation, and the code and the commands on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = {"site", "runs", "build", "dist"}
"""Folders of a checkout that are not part of the project."""
FENCE = r"(?ms)^(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$"
"""A block of code: why it does not run in the tests, its language, its text."""


def find_pages() -> list[str]:
    """All Markdown files of the project."""
    tops = [top for top in ROOT.iterdir() if top.name == ".github" or not (top.name.startswith(".") or top.name in BUILT)]
    pages = [path for top in tops for path in (top.rglob("*.md") if top.is_dir() else [top]) if path.suffix == ".md"]
    return sorted(path.relative_to(ROOT).as_posix() for path in pages)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str, section: str | None = None) -> list[str]:
    """The page's blocks of code in a language, except those that say why they do not run.

    `section`: only those below the heading `## section`; "" for those before the first such heading.
    """
    text = read(page) if section is None else split_sections(read(page))[section]
    return [code for reason, name, code in re.findall(FENCE, text) if name == language and not reason]


def split_sections(text: str) -> dict[str, str]:
    """The title of each heading `## title` -> the text below it; "" -> the text before the first."""
    parts = ["", *re.split(r"(?m)^## (.*)$", text)]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def strip_code(text: str) -> str:
    """The text without blocks of code."""
    return re.sub(FENCE, "", text)


def find_commands(code: str) -> Iterator[list[str]]:
    """The words of each `dgnet` command in a block of shell code. Variables of loops have their first value."""
    for name, value in re.findall(r"\bfor (\w+) in (\S+)", code):
        code = code.replace(f"${name}", value)
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
        lexer.whitespace_split = True
        words = list(lexer)
        starts = [place for place, word in enumerate(words) if word == "dgnet"]
        for start in starts:
            rest = words[start + 1 :]
            end = next((place for place, word in enumerate(rest) if set(word) <= set(";|&>")), len(rest))
            yield rest[:end]
