"""Publishing a trained network: a folder in timm's format, a model card, the Hugging Face Hub."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.publishing._publish import Publication as Publication
    from dgnet.publishing._publish import publish as publish
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
