"""What the site adds to the Markdown files of docs/, which are also read on GitHub.

`<!-- file: PATH -->` stands for the text of a file of the repository, `<!-- commands -->` for the options of every command.
"""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from dgnet.cli import COMMANDS
from dgnet.cli.command import Command
from dgnet.compat.argparse import list_arguments

ROOT = Path(__file__).parents[1]
FIGURES = "experiments/results"
"""The folder whose figures the site contains."""

FENCED = r"(?ms)(^```.*?^```$)"
LINK = r"(!?)\[([^\]]*)\]\(([^)\s]+)\)"
LOADED = r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\"' >]*"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures of the experiments."""
    for path in sorted((ROOT / FIGURES).glob("*.svg")):
        files.append(File.generated(config, f"{FIGURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert what the markers stand for, and make links to files of the repository links of the site."""
    if page.file.src_uri.startswith("api/"):
        page.meta["search"] = {"boost": 0.01}  # a search finds the pages that explain first
    markdown = point_inside(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    markdown = re.sub(r"<!-- file: (\S+) -->", lambda found: include(found[1], page.file.src_uri), markdown)
    return markdown.replace("<!-- commands -->", describe_commands()) if "<!-- commands -->" in markdown else markdown


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raises PluginError if the page loads something from the network."""
    if found := re.search(LOADED, output):
        raise PluginError(f"{page.file.src_uri} loads from the network: {found[0]}")
    return output


def include(path: str, page: str) -> str:
    """The text of the repository's file `path` without its title, for the page `page`; one line if there is no such file."""
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"`{path}` does not exist yet."
    return point_inside(re.sub(r"\A# .*\n+", "", text), path, page)


def point_inside(markdown: str, path: str, page: str) -> str:
    """Make the links in the text of the repository's file `path` right for the page `page`.

    A link to a page or a figure leads there. A link to another file of the repository becomes its text.
    """

    def point(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        name, has_anchor, anchor = target.partition("#")
        if not name or "://" in name or name.startswith("mailto:"):
            return found[0]
        where = normpath(join(dirname(path), name))
        if not where.startswith(("docs/", f"{FIGURES}/")):
            return text
        return f"{mark}[{text}]({relpath(where.removeprefix('docs/'), dirname(page) or '.')}{has_anchor}{anchor})"

    parts = re.split(FENCED, markdown)
    return "".join(part if part.startswith("```") else re.sub(LINK, point, part) for part in parts)


def describe_commands() -> str:
    """Markdown: each command of `dgnet` with its arguments and options, from the parsers that read them."""
    lines = []
    left = [(f"dgnet {word}", entry) for word, entry in COMMANDS.items()]
    while left:
        name, entry = left.pop(0)
        if isinstance(entry, Command):
            lines += describe_command(name, entry.build())
        else:
            left = [(f"{name} {word}", inner) for word, inner in entry.commands.items()] + left
    return "\n".join(lines)


def describe_command(name: str, parser: ArgumentParser) -> list[str]:
    """Lines of Markdown: a heading, what the command does, and a table of its arguments and options."""
    actions = [action for action in list_arguments(parser) if action.dest != "help"]
    arguments = [
        name_of(action) + ("…" if action.nargs in ("+", "*") else "") for action in actions if not action.option_strings
    ]
    lines = [f"## {name}", "", f"`{' '.join([name, *arguments])} [--option value]…`", "", escape(parser.description), ""]
    rows = [describe_option(action) for action in actions]
    return [*lines, "| argument | meaning | value | default |", "|---|---|---|---|", *rows, ""] if rows else lines


def describe_option(action: Action) -> str:
    """A row of the table of a command."""
    kind = "" if action.type is None else str(action.type).removesuffix(" or null")
    if action.nargs in ("+", "*"):
        kind += ", one or more" if action.nargs == "+" else ", any number"
    elif isinstance(action.nargs, int) and action.nargs > 1:
        kind += f", {action.nargs} times"
    default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
    default = "" if default in (None, False, "", {}) else f"`{default}`"
    name = ", ".join(action.option_strings) or name_of(action)
    return f"| `{name}` | {escape(action.help)} | {kind} | {default} |"


def name_of(action: Action) -> str:
    """How an argument is called in the usage."""
    return str(action.metavar or action.dest).upper()


def escape(text: str | None) -> str:
    """`text` in a cell of a Markdown table."""
    return (text or "").replace("|", "\\|").replace("<", "&lt;")
