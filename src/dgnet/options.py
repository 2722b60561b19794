"""Options as fields of a frozen dataclass: the one source of a command's options, their help and what they allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any

from dgnet.errors import check_choice, check_range


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with its help text, and the values allowed where they are few."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """A field's name as it is typed: batch_size is --batch-size."""
    return f"--{name.replace('_', '-')}"


def check_bounds(config: Any, bounds: Mapping[str, tuple[float, ...]]) -> None:
    """Raises UsageError for a number of the dataclass `config` that is less than its least or more than its most allowed value.

    `bounds`: of each field the least, or the least and the most; a field that is None is not set.
    """
    for name, limits in bounds.items():
        if getattr(config, name) is not None:
            check_range(flag(name), getattr(config, name), *limits)


def check_choices(config: Any) -> None:
    """Raises UsageError for an option of the dataclass `config` that is not among its choices."""
    for f in fields(config):
        if f.metadata.get("choices"):
            check_choice(flag(f.name), getattr(config, f.name), f.metadata["choices"])
