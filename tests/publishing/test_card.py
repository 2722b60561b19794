"""The model card: names from other people stay text, code can be pasted, and no folder of this machine is named."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from dgnet.publishing import publish
from dgnet.publishing._card import Card, escape, write_card
from tests.helpers.published import NETWORKS, save

CARD = Card("title", False, "dg_resnet20", ["cat"], {"top-1": "91.25 %"}, "local-dir:here", "dgnet train", None)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("---", r"\---"),
        ("a\n# b", r"a \# b"),
        ("<b>", "&lt;b&gt;"),
        ("[a](b)", r"\[a\](b)"),
        ("x\x1b[31m", "x\N{REPLACEMENT CHARACTER}\\[31m"),
        ("\u202egnp.exe", "\N{REPLACEMENT CHARACTER}gnp.exe"),
        ("91.25 %", "91.25 %"),
        ("0.5", "0.5"),
        ("café 🎉", "café 🎉"),
    ],
)
def test_text_is_no_markup(text, escaped):
    assert escape(text) == escaped


@pytest.mark.parametrize("load", ["local-dir:a b", "local-dir:it's", 'local-dir:q"', "local-dir:```", "hf-hub:user/name"])
def test_the_code_of_a_card_can_be_pasted(load):
    card = write_card(replace(CARD, load=load, command="dgnet train --data '```'"))
    assert f"create_model({json.dumps(load)})" in card
    assert f"dgnet predict {shlex.quote(load)} photo.jpg" in card
    ticks = [line for line in card.splitlines() if line.startswith("```")]
    assert len(ticks) % 2 == 0  # each block ends
    assert "````sh\ndgnet train --data '```'\n````" in card


def test_a_card_without_figures_has_no_table():
    assert "| --- |" in write_card(CARD)
    assert "---|" not in write_card(replace(CARD, figures={})).replace(" ", "")


def test_a_license_is_escaped_in_the_text():
    assert "&lt;b&gt;" in write_card(replace(CARD, license="<b>")).split("## License")[1]


def test_a_card_names_only_the_last_part_of_its_folder(tmp_path):
    save(tmp_path / "run.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    publish(tmp_path / "run.safetensors", tmp_path / "published")
    card = (tmp_path / "published" / "README.md").read_text()
    assert 'create_model("local-dir:published")' in card
    assert str(tmp_path) not in card
