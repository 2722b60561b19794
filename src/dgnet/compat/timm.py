"""Names of timm that it does not export."""

from timm.models._efficientnet_blocks import SqueezeExcite as EfficientSqueezeExcite
from timm.models._features import FeatureGetterNet as FeatureGetterNet

__all__ = ["EfficientSqueezeExcite", "FeatureGetterNet"]
