"""Options as fields of frozen dataclasses. A field holds the option's default, help, allowed values, and when it has effect."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from dgnet.errors import check_choice, check_range
from dgnet.typed import hints_of, read_value

MOST_THREADS = 4096
MOST_WORKERS = 1024
LARGEST_SIDE = 10_000
"""Of a network's input, in pixels. A larger number of any of these is a slip of the keyboard, and too much for a machine."""


def option(
    default: Any, help: str, choices: tuple[str, ...] | None = None, used_by: Mapping[str, tuple[str, ...]] | None = None
) -> Any:
    """A field with its help text.

    `choices`: the allowed values, if they are few. `used_by`: axis -> the values of the axis with which the option has an
    effect; None if it always has one.
    """
    metadata = {"help": help, "choices": choices, "used_by": used_by}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """A group of options. When one is made, choices are checked, then each class of the group by its own `check`.

    Raises UsageError for an invalid value.
    """

    def __post_init__(self) -> None:
        check_choices(self, spell=str)
        check_groups(self)


def check_groups(config: Any) -> None:
    """Call the `check` of each group of options that the dataclass `config` is made of, bases first."""
    for group in reversed(type(config).__mro__):
        if "check" in vars(group):
            vars(group)["check"](config)


def read_options(config: Any) -> None:
    """Read each option of the frozen dataclass `config` as its type; a default stays as it is.

    All sources of options are read here: the command line, a recipe, a run's config.yaml, Python code. Raises UsageError for a
    value of another type.
    """
    hints = hints_of(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if value is not f.default:
            object.__setattr__(config, f.name, read_value(hints[f.name], value, flag(f.name)))


_FLAGS = {"imports": "--import"}
"""Fields that cannot be called like their option, whose name is a keyword of Python."""


def flag(name: str) -> str:
    """The option of a field as it is typed: --batch-size for batch_size."""
    return _FLAGS.get(name) or f"--{name.replace('_', '-')}"


def as_word(value: Any) -> str:
    """A plain value as it is typed after its option."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def is_used(option: Field[Any], chosen: Mapping[str, list[str]]) -> bool:
    """Whether an option has an effect. `chosen`: axis -> the values in use."""
    used_by: Mapping[str, tuple[str, ...]] | None = option.metadata.get("used_by")
    if used_by is None:
        return True
    return any(name in names for axis, names in used_by.items() for name in chosen[axis])


def check_bounds(config: Any, bounds: Mapping[str, tuple[float, ...]]) -> None:
    """Raises UsageError for a number of the dataclass `config` that is out of its bounds.

    `bounds`: field -> the lowest allowed value, or the lowest and the highest. A field that is None is not set.
    """
    for name, limits in bounds.items():
        if getattr(config, name) is not None:
            check_range(flag(name), getattr(config, name), *limits)


def check_choices(config: Any, spell: Callable[[str], str] = flag) -> None:
    """Raises UsageError for an option of the dataclass `config` that is not among its choices.

    `spell`: how messages write the name of an option, by default as it is typed on the command line.
    """
    for f in fields(config):
        if f.metadata.get("choices"):
            check_choice(spell(f.name), getattr(config, f.name), f.metadata["choices"])
