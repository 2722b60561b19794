"""Networks with the weights that timm publishes."""

from __future__ import annotations

from typing import Any

from dgnet.errors import UsageError, reason
from dgnet.models import TimmNetwork, create_model, has_pretrained_weights


def create_pretrained(model: str, asked: str, instead: str, **options: Any) -> TimmNetwork:
    """The network `model` with published weights.

    `asked`: the option that asks for them, as it is typed; `instead`: the option to use if there are none.

    Raises UsageError if no weights are published, and if they cannot be downloaded.
    """
    if not has_pretrained_weights(model):
        raise UsageError(f"{asked}: no weights of {model} are published in timm; use {instead}")
    try:
        return create_model(model, pretrained=True, **options)
    except UsageError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        cause: Exception = error.__cause__
    except Exception as error:  # the libraries that download raise errors of their own
        cause = error
    # A file that is missing: huggingface_hub found neither a connection nor a copy.
    why = "no connection, and no copy on this machine" if isinstance(cause, FileNotFoundError) else reason(cause)
    raise UsageError(f"{asked}: the weights of {model} cannot be downloaded ({why}); use {instead}") from cause
