"""pydantic casts the values of a config to their types and holds them to their bounds; here its errors become one line.

An unknown key is named with the one that may have been meant.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mser_dist.config.fields import choices, keys_of, limits
from mser_dist.errors import UserError

T = TypeVar("T")

_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)
_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")  # the second one is no string
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_NAMES = {
    "string": "str",
    "finite": "float",
}  # where pydantic's name of an error begins with another word than the type


def build(cls: type[T], tree: Any, where: str, prefix: str = "") -> T:
    """An instance of a config class from a nested mapping.

    where: the source, for errors. prefix: what stands before the keys, e.g. "tracking." for that section alone.
    """
    try:
        built: T = _adapter(cls).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_line(cls, error, prefix)}") from error
    return built


def check_values(config: Any) -> None:
    """Cast and bound every value of a config that was made in Python, in place: of "1e-4" for a number it makes one.

    Raises `UserError`.
    """
    try:
        vars(config).update(vars(_adapter(type(config)).validate_python(config)))
    except ValidationError as error:
        raise UserError(_line(type(config), error)) from error


def _line(cls: Any, error: ValidationError, prefix: str = "") -> str:
    """What is wrong and how to mend it. Of several mistakes the first, but a mistaken key before a mistaken value."""
    found = min(error.errors(include_url=False), key=lambda mistake: mistake["type"] not in _UNKNOWN)
    what, path, value = found["type"], [str(part) for part in found["loc"]], found["input"]
    if what in _UNKNOWN:
        return f"unknown key {prefix}{'.'.join(path)}: {_meant(cls, path, prefix)}"
    known = keys_of(cls)
    while path and ".".join(path) not in known:  # an item of a list
        path.pop()
    key = prefix + ".".join(path) if path else prefix.rstrip(".") or "a config"
    kind = known[".".join(path)].type if path else cls
    if found["loc"][-1:] == ("[key]",):
        return f"{key} has the key {value!r}, which YAML reads so: put it in quotes"
    if what in _BOUNDS:
        return _out_of_bounds(key, limits(kind), value)
    if what == "literal_error":
        return f"{key} is {value!r}: use one of {', '.join(choices(kind))}"
    if what == "value_error":
        return f"{key} {found['ctx']['error']}, not {value!r}"
    if what.startswith("dataclass"):
        if is_dataclass(value):  # in Python, e.g. what an evaluation reads in place of what a training does
            return f"{key} must be a {found['ctx']['class_name']}, not a {type(value).__name__}"
        return f"{key} is a section of keys, not {value!r}"
    if what == "list_type":
        return f"{key} must be a list, not {value!r}"
    word = what.split("_")[0]
    return f"{key} must be of type {_NAMES.get(word, word)}, not {value!r}"


def _out_of_bounds(key: str, bounds: dict[str, float], value: Any) -> str:
    match bounds:
        case {"ge": low, "le": high}:
            return f"{key} is {'a share ' if high == 1 else ''}between {low:g} and {high:g}, not {value}"
        case {"gt": low, "le": high}:
            return f"{key} is {'a share ' if high == 1 else ''}above {low:g} and at most {high:g}, not {value}"
        case {"gt": 0}:
            return f"{key} must be positive, not {value}"
        case {"ge": 0}:
            return f"{key} must not be negative: it is {value}"
    raise AssertionError(f"{key} has bounds without words: {bounds}")


def _meant(cls: Any, path: Sequence[str], prefix: str) -> str:
    """Which key may have been meant: one of the same name elsewhere, else the nearest in its section."""
    known = list(keys_of(cls))
    *parents, name = path
    if name in known:
        section, _, key = name.rpartition(".")
        return f"in a file, write {section}: {{{key}: …}}"
    section = "".join(f"{parent}." for parent in parents)
    here = sorted({key.removeprefix(section).split(".")[0] for key in known if key.startswith(section)})
    elsewhere = [key for key in known if key.split(".")[-1] == name]
    near = [section + key for key in difflib.get_close_matches(name, here, 1, cutoff=0.5)]
    deeper = (
        difflib.get_close_matches(name, {key.split(".")[-1] for key in known}, 1, cutoff=0.6) if not parents else []
    )
    found = elsewhere or near or [key for key in known if key.split(".")[-1] in deeper]
    if found:
        return f"did you mean {' or '.join(prefix + key for key in found)}?"
    return f"known here: {', '.join(here)}"
