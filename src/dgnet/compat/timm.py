"""Names of timm that it does not export."""

from timm.models._efficientnet_blocks import InvertedResidual as InvertedResidual
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientSqueezeExcite
from timm.models._efficientnet_blocks import __name__ as EFFICIENTNET_BLOCKS
from timm.models._features import FeatureGetterNet as FeatureGetterNet

__all__ = ["EFFICIENTNET_BLOCKS", "EfficientSqueezeExcite", "FeatureGetterNet", "InvertedResidual"]
