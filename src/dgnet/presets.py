"""Other dynamic and densely connected networks as values on the axes: names for sets of connectivity options.

Nothing here imports torch, so that `--help` prints at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dgnet.errors import UsageError, check_choice


@dataclass(frozen=True)
class Preset:
    """Options of `dgnet.Connectivity` that give the form of a published network.

    `source`: its paper. `form`: what it is here, in a sentence. `converted`: the options where they differ for a network that
    is converted, in which an edge always carries what a block adds; None: a conversion would change the network's function.
    """

    source: str
    form: str
    options: Mapping[str, Any]
    converted: Mapping[str, Any] | None = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    "skipnet": Preset(
        "Wang et al., SkipNet, ECCV 2018",
        "every edge weighs 1, so that a stage is the unrolled residual network; a gate on each block reads what the block would"
        " read, and a skipped block is the identity",
        {"topology": "complete", "weighting": "fixed", "node_gate": "hard"},
    ),
    "convnet-aig": Preset(
        "Veit and Belongie, Convolutional Networks with Adaptive Inference Graphs, ECCV 2018",
        "as skipnet, and in training the gates are drawn with Gumbel noise",
        {"topology": "complete", "weighting": "fixed", "node_gate": "gumbel"},
    ),
    "blockdrop": Preset(
        "Wu et al., BlockDrop, CVPR 2018",
        "as skipnet, but a small convolutional policy on the first stage's input decides all gates of the network at once; the"
        " gates are trained with the task's loss, where BlockDrop uses a policy gradient",
        {
            "topology": "complete",
            "weighting": "fixed",
            "node_gate": "hard",
            "gate_reads": "network",
            "gate_policy": "convolutional",
        },
    ),
    "maskconnect": Preset(
        "Ahmed and Torresani, MaskConnect, ECCV 2018; Yuan et al., TopoNet, ECCV 2020",
        "every edge has a learned weight that is the same for all images, and each node keeps its four heaviest in-edges",
        {"topology": "complete", "weighting": "learned", "keep_edges": 4},
        converted=None,
    ),
    "denseformer": Preset(
        "Pagliardini et al., DenseFormer, NeurIPS 2024",
        "each block reads a learned weighted sum of all the sums before it, and starts with the last one alone",
        {"topology": "complete", "weighting": "learned", "shortcut": "node", "static_start": "identity"},
        # The same functions: a weighted sum of sums of increments is a weighted sum of increments.
        converted={"topology": "complete", "weighting": "learned"},
    ),
}


def expand_preset(model: str, preset: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of the network `model` with those of the preset. A network that is not dynamic yet is converted.

    Raises UsageError for an unknown preset, and if an option contradicts it.
    """
    if preset is None:
        return dict(options)
    check_choice("preset", preset, tuple(PRESETS))
    is_converted = bool(options.get("dynamic")) or not model.startswith("dg_")
    chosen = PRESETS[preset]
    if is_converted and chosen.converted is None:
        raise UsageError(
            f"preset={preset!r} closes edges from the start, which would change the function of {model}; use a dg_ network"
        )
    values = {**((is_converted and chosen.converted) or chosen.options), **({"dynamic": True} if is_converted else {})}
    for name, value in values.items():
        if options.get(name, value) != value:
            raise UsageError(
                f"preset={preset!r} sets {name}={value!r}, and {name}={options[name]!r} is given; leave out one of them"
            )
    return {**values, **options}
