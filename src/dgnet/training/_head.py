"""The classifier that trained weights bring: kept if it has as many classes as the data, in the order of the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgnet.checkpoint import DESCRIPTION, damaged, find_checkpoint, find_class_names, fit_weights, read_tensors
from dgnet.data import map_labels
from dgnet.errors import UsageError
from dgnet.models import TimmNetwork, classifier_prefixes
from dgnet.typed import Label, read_entry


def load_start(
    network: TimmNetwork,
    model: str,
    weights: str,
    class_names: Sequence[str],
    start: str = "paper",
    image_size: tuple[int, int] | None = None,
) -> tuple[list[str], str]:
    """Load the file or run folder `weights`, with the classifier in the order of the data's classes.

    `model`: the name of the network; `class_names`: of the data; `start`, `image_size`: as in `fit_weights`. Returns the
    parameters that were not loaded, and a line on what was loaded, and on what was lost. Raises UsageError for weights of
    another model.
    """
    path = find_checkpoint(weights)
    state_dict, carried = read_tensors(path)
    loaded = fit_weights(network, model, path, state_dict, carried, start, image_size)
    classes = len(class_names)
    known = find_class_names(network, classes)
    if carried is not None:
        with damaged(path):
            known = read_entry(carried, "class_names", list[Label], DESCRIPTION)
    lines = settle_head(network, loaded.untrained, class_names, known), loaded.resampled, loaded.loss
    return loaded.untrained, "; ".join(filter(None, lines))


def describe_untrained(network: TimmNetwork, names: Sequence[str]) -> str:
    """One line on the parameters `names`, which loading trained weights left as initialised."""
    heads = [name for name in names if name.startswith(classifier_prefixes(network))]
    others = [name for name in names if name not in heads]
    lines = []
    if heads:
        classes = network.num_classes
        lines.append(f"trained for other classes; reset {', '.join(heads)} to {classes} classes")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        lines.append(f"stayed as initialised: {', '.join(others[:3])}{more}")
    return "; ".join(lines)


def settle_head(network: TimmNetwork, untrained: Sequence[str], own: Sequence[str], known: Sequence[str] | None) -> str:
    """Put the outputs of a classifier that was loaded in the order of the data's classes. Returns a line on what was loaded.

    `untrained`: the parameters that were not loaded; `own`: the data's classes; `known`: the classes that the weights were
    trained for, None if their names are not known.
    """
    prefixes = classifier_prefixes(network)
    line = describe_untrained(network, untrained)
    if not prefixes or any(name.startswith(prefixes) for name in untrained):
        return line
    kept = f"kept the classifier of {len(own):,} classes"
    order = list(range(len(own)))
    if known is not None and list(known) != list(own):
        try:
            order = map_labels("the data", own, known)
        except UsageError:
            other = next((name for name in own if name not in known), own[0])
            kept += f", which were not called as the data's are ({other!r} is not one of them)"
    if sorted(order) == list(range(len(own))) != order:
        kept += ", in the order of the data's"
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if name.startswith(prefixes) and tensor.ndim and len(tensor) == len(order):
                    tensor.copy_(tensor[order])
    return f"{kept}; {line}" if line else kept
