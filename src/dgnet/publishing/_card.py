"""The model card of a published network: README.md in the Hub's format."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

CITATION = """\
@misc{dgnet,
  title = {Dynamic Graph: Learning Instance-aware Connectivity for Neural Networks},
  note = {ICLR 2021 submission},
  year = {2021}
}"""
_MANY = 20


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    title: str
    is_detector: bool
    network: str  # in words, such as "dg_resnet20" or "resnet18, converted"
    class_names: Sequence[str]
    figures: Mapping[str, str]  # what was measured, or counted -> value with unit
    load: str  # the source to load it from, in one line: local-dir:FOLDER, hf-hub:USER/NAME
    command: str  # that trains it again; "" if it is not known
    license: str | None


def write_card(card: Card) -> str:
    """The card as Markdown with a YAML header. Names of classes are escaped: they may be any text."""
    task = "object-detection" if card.is_detector else "image-classification"
    header: dict[str, Any] = {"library_name": "dgnet", "pipeline_tag": task, "tags": [task, "timm", "dynamic-networks"]}
    if card.license:
        header["license"] = card.license
    rows = [f"| {escape(name)} | {escape(value)} |" for name, value in card.figures.items()]
    figures = "\n".join(["", "| | |", "| --- | --- |", *rows, ""]) if rows else ""
    command = "predict" if not card.is_detector else "detect predict"
    source = json.dumps(card.load, ensure_ascii=False)
    python = f"import dgnet\n\nmodel = dgnet.create_model({source}).eval()"
    python += f"\n# the same: timm.create_model({source}, pretrained=True), after `import dgnet`"
    use = f"{_block('python', python)}\n\nOn the command line:\n\n"
    use += _block("sh", f"dgnet {command} {shlex.quote(card.load)} photo.jpg")
    again = f"{_block('sh', card.command)}\n\nPaths are shortened to their last part."
    reproduce = f"\n## Train it again\n\n{again}\n" if card.command else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {escape(card.title)}

{"A detector" if card.is_detector else "A classifier"} of {len(card.class_names):,} classes: {escape(card.network)}, trained
with dgnet.
{figures}
## Use

{use}
{reproduce}
## Classes

{_list_classes(card.class_names)}

## License

{escape(card.license or "The license of these weights was not stated.")}

## Citation

```bibtex
{CITATION}
```
"""


def _list_classes(names: Sequence[str]) -> str:
    listed = ", ".join(escape(name) or "(empty)" for name in names)
    return listed if len(names) <= _MANY else f"<details><summary>{len(names):,} names</summary>\n\n{listed}\n\n</details>"


def _block(language: str, code: str) -> str:
    """A block of code. Its fence is longer than any row of backticks in it, which would end the block."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", code))])
    return f"{fence}{language}\n{code}\n{fence}"


_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that change the direction of what follows."""


def escape(text: str) -> str:
    """Text in one line that neither Markdown nor HTML takes for markup."""
    text = _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))
    text = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"^(?:(\d+)([.)])|()([-+=]))(?=[\s=-]|$)", r"\1\3\\\2\4", text)  # it would begin a list, or a line
