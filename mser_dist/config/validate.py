"""pydantic casts the values of a config to their types and holds them to their bounds; here its errors become one line.

An unknown key is named with the one that may have been meant.
"""

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from mser_dist.config.fields import choices, keys_of, limits
from mser_dist.errors import UserError

T = TypeVar("T")

_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)
_UNKNOWN = ("unexpected_keyword_argument", "invalid_key")  # the second one is no string
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
# What other trainers call our keys.
_ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "global_batch",
    "train_batch_size": "global_batch",
    "per_device_train_batch_size": "micro_batch",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "max_grad_norm": "grad_clip",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "num_workers": "workers",
    "output_dir": "out",
    "model_name_or_path": "pretrained",
}
_NAMES = {
    "string": "str",
    "finite": "float",
}  # where pydantic's name of an error begins with another word than the type


def build(cls: type[T], tree: Any, where: Callable[[str], str], prefix: str = "") -> T:
    """An instance of a config class from a nested mapping.

    where: the source of a key, for errors. prefix: what stands before the keys, e.g. "tracking." for that section
    alone.
    """
    try:
        built: T = _adapter(cls).validate_python(tree)
    except ValidationError as error:
        key, line = _line(cls, error, prefix)
        raise UserError(f"{where(key)}: {line}") from error
    return built


def check_values(config: Any) -> None:
    """Cast and bound every value of a config that was made in Python, in place: of "1e-4" for a number it makes one.

    Raises `UserError`.
    """
    try:
        vars(config).update(vars(_adapter(type(config)).validate_python(config)))
    except ValidationError as error:
        raise UserError(_line(type(config), error)[1]) from error


def _line(cls: Any, error: ValidationError, prefix: str = "") -> tuple[str, str]:
    """A key, and what is wrong and how to mend it; of several mistakes the first, but mistaken keys before values."""
    found = min(error.errors(include_url=False), key=lambda mistake: mistake["type"] not in _UNKNOWN)
    path = [str(part) for part in found["loc"]]
    if found["type"] in _UNKNOWN:
        key = prefix + ".".join(path)
        return key, f"unknown key {key}: {meant(cls, path, prefix)}"
    if item := _item_of(cls, path[:-1]):
        key = prefix + ".".join(path)
        return key, _value_line(key, keys_of(item)[path[-1]].type, found)
    known = keys_of(cls)
    while path and ".".join(path) not in known:  # an item of a list
        path.pop()
    key = prefix + ".".join(path) if path else prefix.rstrip(".") or "a config"
    return key, _value_line(key, known[".".join(path)].type if path else cls, found)


def _value_line(key: str, kind: Any, found: Any) -> str:
    """What is wrong with the value of a key of this type."""
    what, value = found["type"], found["input"]
    shown = "null (no value)" if value is None else repr(value)
    if found["loc"][-1:] == ("[key]",):
        return f"{key} has the key {value!r}, which YAML reads so: put it in quotes"
    if what in _BOUNDS:
        return _out_of_bounds(key, limits(kind), value)
    if what == "literal_error":
        return f"{key} is {shown}: use one of {', '.join(choices(kind))}"
    if what == "value_error":
        return f"{key} {found['ctx']['error']}, not {shown}"
    if what.startswith("dataclass"):
        if is_dataclass(value):  # in Python, e.g. what an evaluation reads in place of what a training does
            return f"{key} must be a {found['ctx']['class_name']}, not a {type(value).__name__}"
        return f"{key} is a section of keys, not {shown}"
    if what == "list_type":
        return f"{key} must be a list, not {shown}"
    word = what.split("_")[0]
    return f"{key} must be of type {_NAMES.get(word, word)}, not {shown}"


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


def meant(cls: Any, path: Sequence[str], prefix: str = "") -> str:
    """Which key may have been meant: one of the same name elsewhere, else the nearest in its section."""
    *parents, name = path
    if item := _item_of(cls, parents):
        near = difflib.get_close_matches(name, [field.name for field in fields(item)], 1, cutoff=0.5)
        return f"did you mean {near[0]}?" if near else f"known here: {', '.join(f.name for f in fields(item))}"
    known = list(keys_of(cls))
    if name in known:
        section, _, key = name.rpartition(".")
        return f"in a file, write {section}: {{{key}: …}}"
    plain = re.sub(r"[^a-z0-9_.]+", ".", ".".join(path).lower())  # train/lr, train-lr, train.LR
    section = "".join(f"{parent}." for parent in parents)
    here = sorted({key.removeprefix(section).split(".")[0] for key in known if key.startswith(section)})
    name = _ELSEWHERE.get(name.lower(), name.lower())
    elsewhere = [key for key in known if key.split(".")[-1] == name]
    near = [section + key for key in difflib.get_close_matches(name, here, 1, cutoff=0.5)]
    deeper = (
        difflib.get_close_matches(name, {key.split(".")[-1] for key in known}, 1, cutoff=0.7) if not parents else []
    )
    same = [plain] if plain in known else []
    found = same or elsewhere or near or [key for key in known if key.split(".")[-1] in deeper]
    if found:
        return f"did you mean {' or '.join(prefix + key for key in found)}?"
    return f"known here: {', '.join(here)}"


def _item_of(cls: Any, path: Sequence[str]) -> Any:
    """The config class of the items of a list, where a path ends in one: train.groups.0."""
    if not path or not path[-1].isdigit():
        return None
    field = keys_of(cls).get(".".join(path[:-1]))
    kinds = get_args(next(iter(get_args(field.type)), None)) if field else ()
    return next(filter(is_dataclass, kinds), None)
