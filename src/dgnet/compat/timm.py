"""Names of timm that it does not export."""

from timm.models._features import FeatureGetterNet as FeatureGetterNet
