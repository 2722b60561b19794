"""Options as fields of a frozen dataclass: the one source of a command's options, their help and what they allow."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

from dgnet.errors import check_choice


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with its help text, and the values allowed where they are few."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """A field's name as it is typed: batch_size is --batch-size."""
    return f"--{name.replace('_', '-')}"


def check_choices(config: Any) -> None:
    """Raises UsageError for an option of the dataclass `config` that is not among its choices."""
    for f in fields(config):
        if f.metadata.get("choices"):
            check_choice(flag(f.name), getattr(config, f.name), f.metadata["choices"])
