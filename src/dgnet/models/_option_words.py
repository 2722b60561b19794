"""Options of a network as words of `dgnet train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dgnet.errors import UsageError
from dgnet.models._connectivity import Connectivity
from dgnet.models._convert import _read_connectivity
from dgnet.models._dynamic import DynamicNetwork
from dgnet.options import as_word, flag

_DEFAULTS = {"topology": "complete", "weighting": "routed", "node_gate": "none", "stages": "auto", "dynamic": False}
_FLAGS = ("topology", "weighting", "shortcut", "img_size")
"""Options of networks that `dgnet train` has as options of its own. All others are entries of `--model-kwargs`."""


def missing_options(stored: Mapping[str, Any], network: nn.Module | None = None) -> dict[str, Any]:
    """The `stored` options of a network that `network` was not built with; None: those that are no defaults."""
    built = dict(_DEFAULTS)
    axes = {name: stored.get(name, _DEFAULTS[name]) for name in ("topology", "weighting", "node_gate")}
    try:  # the defaults of all other options follow from these
        defaults = _read_connectivity(**axes, options={}) if stored.get("dynamic") else Connectivity(**axes)
        built = {**defaults.plain_options(), **_DEFAULTS}
    except UsageError:  # such as code of the user's own, which is not trusted here
        pass
    if isinstance(network, DynamicNetwork):
        built |= network.stored_options()
    return {name: value for name, value in stored.items() if name not in built or built[name] != value}


def as_words(options: Mapping[str, Any]) -> list[str]:
    """`options` as words of the command line."""
    words = ["--dynamic", "true"] if options.get("dynamic") else []
    rest = {}
    for name, value in options.items():
        if name in _FLAGS and isinstance(value, str | int):
            words += ["--image-size" if name == "img_size" else flag(name), as_word(value)]
        elif name != "dynamic":
            rest[name] = value
    return [*words, "--model-kwargs", as_word(rest)] if rest else words
