"""Reading a run config: YAML file + ``key=value`` words → a checked dataclass, and back to YAML.

What is not well-formed is a `UserError` that names the line; the keys and their values are checked in ``validate.py``.
"""

import difflib
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mser_dist.config.keys import Evaluation, Stage1, Stage2
from mser_dist.config.validate import build
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
    lacking = f"no config file or preset {name!r}"
    if path.is_dir():
        raise UserError(f"{lacking}: it is a folder{_instead(path / 'config.yaml')}")
    if path.suffix in (".yaml", ".yml") or "/" in name:
        siblings = [file.name for ending in ("*.yaml", "*.yml") for file in path.parent.glob(ending)]
        near = difflib.get_close_matches(path.name, siblings, 1)
        raise UserError(f"{lacking}: the file does not exist{_instead(*(path.parent / name for name in near))}")
    names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    near = difflib.get_close_matches(path.stem, names, 1)
    hint = f"did you mean the preset {near[0]}?" if near else f"presets: {', '.join(names)}"
    raise UserError(f"{lacking}: {hint}")


def _instead(*files: Path) -> str:
    return "".join(f", did you mean {file}?" for file in files if file.is_file())


class _GivenTwice(yaml.MarkedYAMLError):
    """A key stands twice in one mapping."""


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping: of two, PyYAML keeps the last one and says nothing."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Here, before any merge key (<<) is filled in: a key beside it may well replace one that it brings.
        mapping = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f'key "{key.value}" is given twice (first in line {lines[key.value]})'
                    raise _GivenTwice(problem=problem, problem_mark=key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return mapping


def _load(text: str) -> Any:
    return yaml.load(text, _OnceLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a `UserError` names the line of a syntax error, or of a key that is given twice."""
    try:
        tree = _load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = error.problem if isinstance(error, _GivenTwice) else f"not valid YAML: {error.problem}"
        raise UserError(f"{where}: {what}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML text file: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of `key: value` lines")
    return tree


def apply_overrides(tree: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Set dotted ``key=value`` words (values in YAML syntax) in `tree`, in place.

    Of two words for one key the last one counts, as of a command's options: a script may add words to those it got.
    """
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not key=value (e.g. train.lr=3e-4)")
        try:
            value = _load(text) if text else None
        except _GivenTwice as error:
            raise UserError(f"{word!r}: {error.problem}") from error
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
