"""Networks that timm builds from a published `config.json` only: converted ones, and detectors. Their bases are arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from timm.models import build_model_with_cfg, load_pretrained, register_model, resolve_pretrained_cfg
from torch import nn

from dgnet.errors import UsageError

if TYPE_CHECKING:
    from dgnet.models import TimmNetwork

CONVERTED, DETECTOR = "dgnet_converted", "dgnet_detector"
"""Their names in timm's registry, which `dgnet models` does not list."""


@register_model
def dgnet_converted(pretrained: bool = False, *, base: str, **kwargs: Any) -> TimmNetwork:
    """timm's network `base`, converted; further options are those of `dgnet.convert` and of `base`."""
    from dgnet.models import create_model, take_state

    _check_base(base)
    if not kwargs.get("pretrained_cfg"):
        kwargs["pretrained_cfg"] = resolve_pretrained_cfg(base).to_dict(remove_source=True)

    def build(**options: Any) -> nn.Module:
        return create_model(base, dynamic=True, **options)

    features = {"feature_cls": "getter", "out_indices": None}  # every feature map
    built = build_model_with_cfg(build, CONVERTED, pretrained, feature_cfg=features, pretrained_filter_fn=take_state, **kwargs)
    return cast("TimmNetwork", built)


@register_model
def dgnet_detector(
    pretrained: bool = False,
    *,
    network: str,
    network_args: Mapping[str, Any],
    num_classes: int,
    pretrained_cfg: Mapping[str, Any] | None = None,
    detector: Mapping[str, Any],
    **others: Any,
) -> nn.Module:
    """`dgnet.detection.Detector` on `network`, built with `network_args`. `detector`: further arguments of `Detector`.

    Raises UsageError for any other option: timm's are for classifiers.
    """
    from dgnet.detection import Detector
    from dgnet.models import create_model

    given = [name for name, value in others.items() if value not in (None, False) and not name.startswith(_OF_TIMM)]
    if given:
        raise UsageError(f"a published detector has no option {given[0]!r}; leave it out")
    _check_base(network)
    built = Detector(create_model(network, **network_args), num_classes, **detector)
    if pretrained:
        load_pretrained(built, dict(pretrained_cfg or {}), num_classes=num_classes)
    return built


_OF_TIMM = ("pretrained_", "cache_dir")
"""What the options begin with that say where weights are. timm passes them to all networks."""


def _check_base(name: object) -> None:
    """Raises UsageError if a `config.json` names another published network, whose weights would be loaded too."""
    from dgnet.models import SOURCES

    if str(name).startswith(SOURCES):
        raise UsageError(f"a config.json must name a network of timm or dgnet, got {str(name)[:60]!r}")
