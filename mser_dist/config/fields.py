"""How the keys of a config are declared, checked and listed."""

import re
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, get_args

from mser_dist.errors import UserError


def opt(default: Any, help: str) -> Any:
    """A config field with a default and the sentence that ``mser config --keys`` shows for it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    if isinstance(default, type):  # a nested section
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `UserError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{key} is {value!r}: use one of {', '.join(allowed)}")


def positive(key: str, value: float) -> None:
    """Raise `UserError` unless `value` is above 0."""
    if value <= 0:
        raise UserError(f"{key} must be positive, not {value}")


def not_negative(key: str, value: float) -> None:
    """Raise `UserError` if `value` is below 0."""
    if value < 0:
        raise UserError(f"{key} must not be negative: it is {value}")


def key_table(cls: type) -> list[tuple[str, str, str, str]]:
    """(key, type, default, help) of every key of a config class, nested keys dotted, for `mser config --keys`."""
    rows = []
    for f in fields(cls):
        section = next((t for t in (f.type, *get_args(f.type)) if is_dataclass(t)), None)
        if section is None or f.default is None:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            kind = re.sub(r"mser_dist\.config\.|<class '|'>", "", str(f.type))
            rows.append((f.name, kind, str(default), f.metadata.get("help", "")))
        if isinstance(section, type):
            rows += [(f"{f.name}.{key}", kind, default, help) for key, kind, default, help in key_table(section)]
    return rows
