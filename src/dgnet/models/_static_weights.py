"""Load the weights of a static network into the nodes of its dynamic counterpart."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dgnet.errors import UsageError, check_choice, shorten
from dgnet.models._dynamic import DynamicNetwork
from dgnet.models._protocol import TimmNetwork
from dgnet.models._state import rename, unwrap_names
from dgnet.models._static_start import STARTS, find_obstacle, keep_function


def load_static_weights(
    model: TimmNetwork,
    state_dict: Mapping[str, Tensor],
    start: str = "paper",
    image_size: int | tuple[int, int] | None = None,
    weights_of: str = "",
) -> list[str]:
    """Load a static checkpoint of timm or torchvision into the dynamic network of the same family, in place.

    Blocks become nodes, a stage's projection becomes its input node. Returns the names that keep their initial values: routers,
    thresholds, edge weights, block gates, projections that the static network lacks, a head of another number of classes.

    `start`: with "static" the network must compute the same function as the static one. This is checked on random images of
    `image_size` (None: the model's own). It needs the options that `dgnet.models.static_start_options` gives. A projection that
    the static network lacks is then set to 0. With "paper" edges weigh what their routers give, and the function is another
    one until it is trained. `weights_of`: the name of the static model, if known: a strided_resnet50 has a ResNet's names.

    Raises UsageError, and leaves the model unchanged, for a model without stages, for weights of another family, and if with
    `start="static"` the function is not kept.
    """
    check_choice("start", start, STARTS)
    if not isinstance(state_dict, Mapping):
        raise UsageError(f"a state dict maps names to tensors, got {shorten(repr(state_dict))}")
    state_dict = unwrap_names(state_dict)
    if start == "paper":
        return _load(model, state_dict)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untrained = _load(model, state_dict)
    try:
        obstacle = find_obstacle(model, weights_of)
        if obstacle:
            raise UsageError(f"{obstacle}; make the static network itself dynamic with dgnet.convert, or use start='paper'")
        return keep_function(model, untrained, image_size)
    except UsageError:
        model.load_state_dict(before)
        raise


def _load(model: TimmNetwork, state_dict: Mapping[str, Tensor]) -> list[str]:
    """`load_static_weights` with `start="paper"`."""
    if not isinstance(model, DynamicNetwork) or not model.static_names:
        raise UsageError(f"{type(model).__name__} has no static counterpart to take weights from; load its own state dict")
    if not is_static(model, state_dict):
        raise UsageError("these are the weights of a dynamic network; load them with load_state_dict")
    own = model.state_dict()
    heads = classifier_prefixes(model)
    loaded: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in model.translate_static(state_dict).items():
        target = rename(name, model.static_names)  # a projection's prefix comes before that of its block
        if target in own and own[target].shape == tensor.shape:
            loaded[target] = tensor
        elif not (target.startswith(heads) or _is_unused_projection(target, own)):
            unknown.append(name)
    untrained = [name for name in own if name not in loaded and not name.endswith((".mask", "num_batches_tracked"))]
    optional = (*heads, *_parts_without_static_counterpart(model, loaded))
    missing = [name for name in untrained if not name.startswith(optional)]
    if unknown or missing:
        first = f"it lacks {missing[0]}" if missing else f"{unknown[0]} does not fit"
        raise UsageError(
            f"these are not the weights of the static counterpart of {type(model).__name__}: {len(unknown)} tensors are unknown"
            f" or have another shape, {len(missing)} are missing ({first}); use weights of the same family and size"
        )
    model.load_state_dict({**own, **loaded})
    return untrained


def classifier_prefixes(model: TimmNetwork) -> tuple[str, ...]:
    """The prefixes of the names of the classifier's parameters."""
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    return tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier or ()))


def is_static(model: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether `state_dict` is of a static network, and `model` is dynamic and has a static counterpart."""
    if not isinstance(model, DynamicNetwork) or not model.static_names:
        return False
    return not any(".nodes." in name for name in state_dict)


def _is_unused_projection(name: str, own: Mapping[str, Tensor]) -> bool:
    stage, found, _ = name.partition(".input.")
    return bool(found) and not any(other.startswith(f"{stage}.input.") for other in own)


def _parts_without_static_counterpart(model: DynamicNetwork, loaded: Mapping[str, Tensor]) -> list[str]:
    """Weightings, gates, and projections that the static network lacks."""
    own, taken = model.state_dict(), set(model.static_names.values())
    added = []
    for prefix in (f"{name}.input." for name in model.graph_names):
        weight = own.get(f"{prefix}0.weight")
        # ResNet-18's stage 1 keeps its channels: the static network needs a projection only for DG's stride.
        keeps_channels = weight is not None and weight.shape[0] == weight.shape[1]
        if prefix not in taken or (keeps_channels and not any(name.startswith(prefix) for name in loaded)):
            added.append(prefix)
    return [*(f"{name}.{part}." for name in model.graph_names for part in ("weighting", "node_gates")), *added]
