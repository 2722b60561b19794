"""Options of networks on the command line: those without an option of their own are entries of `--model-kwargs`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from dgnet.code import CODE_OPTIONS, is_code_path, list_packages
from dgnet.options import flag

NETWORK_OPTIONS = (
    "topology", "weighting", "shortcut", "router_reads", "threshold_offset", "topology_seed", "er_p", "ba_m", "ws_k", "ws_p",
    "learned_start", "learned_activation", "keep_edges", "router_norm", "router", "router_bias", "router_std", "router_start",
    "router_pool", "gate", "threshold", "learn_threshold", "unit_start", "inference_weight", "node_gate", "node_gate_bias",
    "node_gate_std", "gate_reads", "gate_policy", "static_start", "linear_function", "linear_scale", "edge_gate",
    "weight_groups", "two_way", "stages",
)  # fmt: skip
"""The options of `dgnet.Connectivity` and `dgnet.convert`. To ask them for their names would import torch."""

_WORDS = {"True": "true", "False": "false", "None": "null"}


def find_option(name: str, options: Collection[str], has_dict: bool) -> str | None:
    """The option of a network, `name`, as it is typed; None if it cannot be.

    `options`: those of the command, as they are typed; `has_dict`: whether `--model-kwargs` is one that takes all others.
    """
    if flag(name) in options:
        return flag(name)
    if name == "trust_code" and flag("imports") in options:
        return flag("imports")
    return f"--model-kwargs.{name}" if has_dict and name in NETWORK_OPTIONS else None


def as_typed(message: str, options: Collection[str], has_dict: bool) -> str:
    """A message of the library with `--name value` in place of `name='value'`. `options`, `has_dict`: see `find_option`."""

    def replace(found: re.Match[str]) -> str:
        option = find_option(found[1], options, has_dict)
        return found[0] if option is None else f"{option} {_WORDS.get(found[2], found[2].strip(chr(39)))}"

    return re.sub(r"(?<![\w.-])([a-z_]+)=('[^' ]+'|True|False|None|-?\d+(?:\.\d+)?)(?![\w'])", replace, message)


def find_typed_code(typed: Mapping[str, Any]) -> list[str]:
    """The packages and import paths of code among the options that a user typed, not those that a recipe holds."""
    options = {**(typed.get("model_kwargs") or {}), **typed}
    paths = [options[name] for name in CODE_OPTIONS if is_code_path(options.get(name))]
    return [*list_packages(typed.get("imports"), flag("imports")), *paths]
