"""Reading a run config: YAML file + ``key=value`` words → a checked dataclass, and back to YAML.

An unknown or ill-typed key is a `UserError` that names the nearest right one.
"""

import difflib
import math
import types
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mser_dist.config.keys import Evaluation, Stage1, Stage2
from mser_dist.errors import UserError

PRESETS = Path(__file__).parent / "presets"
T = TypeVar("T")


def find_config(name: str) -> Path:
    """The file of a config given as a path or as the name of a preset in ``mser_dist/config/presets/``."""
    path = Path(name)
    if path.is_file():
        return path
    preset = PRESETS / f"{name.removesuffix('.yaml')}.yaml"
    if preset.is_file():
        return preset
    names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    near = difflib.get_close_matches(path.stem, names, 1)
    hint = f"did you mean the preset {near[0]}?" if near else f"presets: {', '.join(names)}"
    raise UserError(f"no config file or preset {name!r}: {hint}")


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping: of two, PyYAML keeps the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    first = f"the key {key.value} is given twice (first in line {lines[key.value]}): remove one"
                    raise yaml.constructor.ConstructorError(None, None, first, key.start_mark)
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    return yaml.load(text, _OnceLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a `UserError` names the line of a syntax error, or of a key that is given twice."""
    try:
        tree = _load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML text file: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of `key: value` lines")
    return tree


def apply_overrides(tree: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Set dotted ``key=value`` words (values in YAML syntax) in `tree`, in place."""
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not key=value (e.g. train.lr=3e-4)")
        try:
            value = _load(text) if text else None
        except yaml.YAMLError as error:
            raise UserError(f"{word!r}: the value is not valid YAML: {str(error).splitlines()[0]}") from error
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = value
    return tree


def load_training(name: str, words: list[str]) -> Stage1 | Stage2:
    """The checked config of ``mser train NAME WORDS…``; the key ``stage`` decides the class."""
    path = find_config(name)
    tree = apply_overrides(read_yaml(path), words)
    stage = tree.get("stage")
    if stage not in (1, 2):
        raise UserError(f"{path}: stage is {stage!r}: set `stage: 1` (align) or `stage: 2` (instruct)")
    return _checked(Stage1, tree, path) if stage == 1 else _checked(Stage2, tree, path)


def load_evaluation(name: str, words: list[str]) -> Evaluation:
    """The checked config of ``mser eval NAME WORDS…``."""
    path = find_config(name)
    tree = apply_overrides(read_yaml(path), words)
    if "stage" in tree:
        raise UserError(f"{path}: this is a training config (it sets `stage`): give it to `mser train`")
    return _checked(Evaluation, tree, path)


def load_any(name: str, words: list[str]) -> Stage1 | Stage2 | Evaluation:
    """The checked config of either command."""
    return (load_training if "stage" in read_yaml(find_config(name)) else load_evaluation)(name, words)


def _checked(cls: type[T], tree: dict[str, Any], path: Path) -> T:
    config = build(cls, tree, str(path))
    config.check()  # type: ignore[attr-defined]
    return config


def build(cls: type[T], tree: dict[str, Any], where: str, prefix: str = "") -> T:
    """An instance of a config class from a nested mapping; `where` names the source in errors."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
            raise UserError(f"{where}: unknown key {prefix}{key}: {hint}")
    return cls(**{key: _cast(hints[key], value, where, f"{prefix}{key}") for key, value in tree.items()})


def _cast(kind: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the annotated type, or a `UserError`. YAML reads 1e-4 as a string: numbers in strings count."""
    args = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _cast(next(a for a in args if a is not type(None)), value, where, key)
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} is a section of keys, not {value!r}")
        return build(kind, value, where, f"{key}.")
    origin = typing.get_origin(kind) or kind
    if origin is list and isinstance(value, list):
        return [_cast(args[0], item, where, key) for item in value]
    if origin is list and isinstance(value, str):
        return [_cast(args[0], item, where, key) for item in value.split(",")]  # sets=a,b on the command line
    if origin is dict and isinstance(value, dict):
        return value
    if origin is bool and isinstance(value, bool):
        return value
    if origin is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if origin in (int, float) and not isinstance(value, bool):
        if origin is int and isinstance(value, int):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (origin is float or number.is_integer()):
            return origin(number)
    name = getattr(origin, "__name__", str(origin))
    raise UserError(f"{where}: {key} must be {'a list' if origin is list else f'of type {name}'}, not {value!r}")


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, every default written out; `load_training` reads it back to an equal config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def flatten(tree: Any) -> dict[str, str]:
    """A config, or the mapping it was saved as, as dotted keys and strings, for MLflow's params."""
    tree = asdict(tree) if is_dataclass(tree) and not isinstance(tree, type) else tree
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": text for inner, text in flatten(value).items()}
        else:
            flat[key] = str(value)
    return flat
