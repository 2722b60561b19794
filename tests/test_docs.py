"""The documentation: its code, commands, links and tables."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from argparse import Action
from dataclasses import fields
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from mkdocs.exceptions import PluginError
from torch import nn

import dgnet
from dgnet.cli import COMMANDS, _check_options
from dgnet.cli.command import Command, Parser
from dgnet.compat.argparse import list_arguments
from dgnet.errors import UsageError
from dgnet.graph import find_stages
from tests.helpers.data import jpeg
from tests.helpers.pages import ROOT, blocks, find_commands, find_pages, read, strip_code

SLOW = {"docs/convert.md", "docs/quickstart.md"}
"""Pages whose code takes more than two seconds."""
BY_SECTION = {"docs/tools.md"}
"""Pages whose sections are run one by one, by tests of their own (`tests/tools`)."""


def load(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PAGES = find_pages()
hooks = load("hooks")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
        for page in PAGES
        if blocks(page, "python") and page not in BY_SECTION
    ],
)
def test_the_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages write files
    (tmp_path / "photo.jpg").write_bytes(jpeg(90, 40))  # a photo of the reader's
    scope: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)
        model = scope.get("model")
        if isinstance(model, nn.Module) and find_stages(model):
            with dgnet.record_connectivity(model.eval()) as record:
                model(torch.randn(2, 3, 32, 32))
            assert record.adjacency
            if "router=" in block:
                mask = find_stages(model)[0].topology.mask
                assert record.alpha[0][:, mask].min() > 0.7  # the router's own start survives: edges start open


def test_every_option_of_the_page_exists_with_its_default():
    section = read("docs/graph.md").partition("## Options")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`?)([^`,|]+)", section, re.MULTILINE)
    documented = {name: default.strip() for name, default in rows}
    defaults = {f.name: str(f.default).lower() for f in fields(dgnet.models.Connectivity)}
    assert documented == defaults


@cache
def build_parser(command: Command) -> Parser:
    return command.build()


def find_command(words: list[str]) -> tuple[str, Command, list[str]]:
    """A command's name, the command, and the words that follow."""
    entry: Any = COMMANDS[words[0]]
    name, rest = f"dgnet {words[0]}", words[1:]
    while not isinstance(entry, Command):
        entry, name, rest = entry.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    return name, entry, rest


def find_parser(words: list[str]) -> tuple[str, Parser, list[str]]:
    """The name and the parser of a command, and the words that follow it. An option without its value ("…") is left out."""
    name, command, rest = find_command(words)
    parser = command.build() if "--config" in rest else build_parser(command)  # a recipe changes the defaults
    takes_value = {word for action in list_arguments(parser) if action.nargs is None for word in action.option_strings}
    kept = [
        word.removesuffix("…")
        for word, following in zip(rest, [*rest, ""][1:], strict=True)
        if word != "…" and not (following == "…" and word in takes_value)
    ]
    return name, parser, kept


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_the_commands_on_the_page_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are read
    for block in blocks(page, "sh"):
        for words in find_commands(block):
            name, parser, rest = find_parser(words)
            _check_options(name, rest, parser)
            parser.parse(rest)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_in_the_text_have_known_options(page):
    for words in (shlex.split(code) for code in re.findall(r"`dgnet ([a-z][^`]*)`", strip_code(read(page)))):
        name, parser, rest = find_parser([word.strip("[]") for word in words])
        _check_options(name, rest, parser)


def test_a_misspelt_command_on_a_page_is_found():
    ((words),) = find_commands(
        "torchrun --nproc-per-node 8 -m dgnet train --config … --epoch 3 --lr 1 | tee log  # dgnet evaluate"
    )
    name, parser, rest = find_parser(words)
    assert rest == ["--epoch", "3", "--lr", "1"]
    with pytest.raises(UsageError, match="unknown option --epoch"):
        _check_options(name, rest, parser)
    with pytest.raises(KeyError):
        find_parser(["trian"])


def test_the_tests_that_the_page_names_exist():
    named = re.findall(r"`python -m pytest (\S+) -k (\w+)`", read("docs/paper.md"))
    assert named
    for path, word in named:
        assert re.search(rf"^def test_\w*{word}", read(path), re.MULTILINE), (path, word)


def anchors(page: str) -> set[str]:
    """What a link to the page can name: headings, as GitHub and the site spell them, and objects of the API reference."""
    text = read(page).replace("<!-- commands -->", hooks.describe_commands() if "<!-- commands -->" in read(page) else "")
    titles = re.findall(r"(?m)^#+ (.*)$", strip_code(text))
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"(?m)^::: (\S+)$", text))


@pytest.mark.parametrize("page", PAGES)
def test_the_links_on_the_page_lead_somewhere(page):
    """On GitHub. `make docs` checks the links of the site."""
    text = re.sub(r"`[^`\n]*`", "code", strip_code(read(page)))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)|(?:src|srcset|href)=\"([^\" ]+)", text, re.MULTILINE):
        name, _, anchor = "".join(target).partition("#")
        if "://" in name or name.startswith("mailto:"):
            continue
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {name}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{page}: {name}#{anchor}"


def test_the_reference_has_every_public_name():
    listed = re.findall(r"(?m)^::: dgnet\.(\w+)$", read("docs/api/index.md"))
    assert sorted(listed) == sorted(dgnet.__all__)


def test_the_tables_are_those_of_the_rows():
    tables = load("tables")
    names = []
    for page in PAGES:
        text = read(page)
        names += re.findall(tables.MARKED, text)
        assert tables.fill(text) == text, f"{page}: run make tables"
    assert sorted(names) == sorted(tables.TABLES)


def test_the_reference_has_every_command_with_its_options():
    text = hooks.describe_commands()
    for words in (["train"], ["detect", "predict"], ["cost"]):
        part = text.split(f"## dgnet {' '.join(words)}\n")[1].split("\n## ")[0]
        parser = find_command(words)[1].build()
        shown = {word for row in re.findall(r"(?m)^\| `(--[^`]*)`", part) for word in row.split(", ")}
        assert shown == {word for action in list_arguments(parser) for word in action.option_strings} - {"-h", "--help"}
    assert "| `--lr` | peak learning rate | a number | `0.1` |" in text


def test_a_cell_of_the_reference_cannot_break_the_table():
    action = Action(["--x"], "x", help="one | two <b>", type=str)
    assert hooks.describe_option(action).startswith(r"| `--x` | one \| two &lt;b> |")


def test_a_page_shows_a_file_of_the_repository_or_says_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    assert hooks.include("CHANGELOG.md", "changelog.md") == "`CHANGELOG.md` does not exist yet."
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0\n\n[convert](docs/convert.md#what-is-converted)\n")
    expected = "## 0.2.0\n\n[convert](convert.md#what-is-converted)\n"
    assert hooks.include("CHANGELOG.md", "changelog.md") == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](convert.md#b)", "[a](../convert.md#b)"),
        ("![a](../experiments/results/x.svg)", "![a](../experiments/results/x.svg)"),
        ("[a](../recipes/x.yaml)", "a"),
        ("[a](https://example.org/x.md)", "[a](https://example.org/x.md)"),
        ("[a](#b)", "[a](#b)"),
        ("```\n[a](../x.py)\n```", "```\n[a](../x.py)\n```"),
    ],
)
def test_links_of_a_page_lead_to_pages_of_the_site(link, expected):
    assert hooks.point_inside(link, "docs/analysis.md", "api/index.md") == expected


def test_a_page_that_loads_from_the_network_is_refused():
    class Page:
        class file:  # noqa: N801
            src_uri = "index.md"

    assert hooks.on_post_page('<a href="https://example.org">', Page, None)
    with pytest.raises(PluginError, match=r"index\.md loads from the network: .*example\.org"):
        hooks.on_post_page('<script src="https://example.org/x.js">', Page, None)
