"""How the keys of a config are declared and listed: types that pydantic casts to, with bounds; defaults and help."""

import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict

T = TypeVar("T")


class Section:
    """Base of the config classes, which are plain dataclasses: pydantic casts and bounds them in ``validate.py``.

    So a config made in Python may be set up attribute by attribute, and is held to its types and bounds when it is
    checked, as one from a file is.
    """

    __pydantic_config__ = ConfigDict(
        extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, revalidate_instances="always"
    )


def opt(default: Any, help: str) -> Any:
    """A config field with a default and the sentence that ``mser config --keys`` shows for it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    if isinstance(default, type):  # a nested section
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def must(text: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """A rule on the whole value of one key; where it does not hold, the error says ``KEY TEXT, not VALUE``."""

    def hold(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(hold)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string: numbers in strings count."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _whole(value: Any) -> Any:
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


# Strict, as True is a number to Python. What else counts as one is said above.
Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict(), BeforeValidator(_whole)]
PositiveInt = Annotated[Int, pydantic.Field(gt=0)]
NonNegativeInt = Annotated[Int, pydantic.Field(ge=0)]
Float = Annotated[float, Strict(), BeforeValidator(_number)]
PositiveFloat = Annotated[Float, pydantic.Field(gt=0)]
NonNegativeFloat = Annotated[Float, pydantic.Field(ge=0)]
Share = Annotated[Float, pydantic.Field(ge=0, le=1)]
# sets=a,b on the command line
List = Annotated[list[T], BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value)]


def limits(kind: Any) -> dict[str, float]:
    """The bounds in a key's type: gt, ge, lt, le."""
    found: dict[str, float] = {}
    for part in get_args(kind):
        for limit in getattr(part, "metadata", ()):
            found |= {name: getattr(limit, name) for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)}
        found |= limits(part)
    return found


def choices(kind: Any) -> tuple[str, ...]:
    """The values that a key may have, where its type is a Literal."""
    if get_origin(kind) is Annotated:
        return choices(get_args(kind)[0])
    return get_args(kind) if get_origin(kind) is typing.Literal else ()


def keys_of(cls: Any, prefix: str = "") -> dict[str, Field[Any]]:
    """Every key and section of a config class by its dotted name."""
    found = {}
    for f in fields(cls):
        found[f"{prefix}{f.name}"] = f
        section = _section(f)
        found |= keys_of(section, f"{prefix}{f.name}.") if section else {}
    return found


def _section(f: Field[Any]) -> type | None:
    return next((kind for kind in (f.type, *get_args(f.type)) if isinstance(kind, type) and is_dataclass(kind)), None)


def key_table(cls: type) -> list[tuple[str, str, str, str]]:
    """(key, type, default, help) of every key of a config class, nested keys dotted, for `mser config --keys`."""
    return [
        (
            key,
            _kind(f.type),
            str(f.default if f.default_factory is MISSING else f.default_factory()),
            f.metadata["help"],
        )
        for key, f in keys_of(cls).items()
        if _section(f) is None or f.default is None
    ]


def _kind(kind: Any) -> str:
    """A key's type as `mser config --keys` shows it, e.g. ``float > 0`` or ``list[str] | None``."""
    args, origin = get_args(kind), get_origin(kind)
    if origin is Annotated:
        bounds = {} if get_origin(args[0]) is list else limits(kind)  # a list's bounds are its items'
        if {"ge", "le"} <= bounds.keys():
            return f"{_kind(args[0])} {bounds['ge']:g}..{bounds['le']:g}"
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        return f"{_kind(args[0])} {' and '.join(f'{signs[name]} {bound:g}' for name, bound in bounds.items())}".rstrip()
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_kind, args))
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_kind, args))}]"
    return "None" if kind is types.NoneType else str(kind.__name__)
