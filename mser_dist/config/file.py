"""Reading a run config: YAML file + ``key=value`` words → a checked dataclass, and back to YAML.

What is not well-formed is a `UserError` that names the line; the keys and their values are checked in ``validate.py``.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mser_dist.config import chosen, kinds
from mser_dist.config.evaluation_keys import Baseline, Evaluation
from mser_dist.config.keys import Stage1, Stage2
from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.config.validate import build
from mser_dist.errors import UserError

PRESETS = Path(__file__).parent / "presets"
T = TypeVar("T")
_ENDINGS = (".yaml", ".yml")


def find_config(name: str) -> Path:
    """The file of a config given as a path, or as the name of a preset in ``mser_dist/config/presets/``.

    A name that ends in .yaml or .yml, or holds a slash, is never a preset: nobody trains another config than his own
    because he stands in another folder.
    """
    path = Path(name)
    if path.is_file():
        return path
    is_path = path.suffix in _ENDINGS or "/" in name
    preset = PRESETS / f"{name}.yaml"
    if not is_path and name and preset.is_file():
        return preset
    lacking = f"no config file or preset {name!r}"
    if not name:
        raise UserError("the name of the config is empty: give a YAML file or a preset (`mser config` lists them)")
    if "=" in name and not is_path:
        raise UserError(f"{name!r} stands where the config is to be named: first CONFIG, then the key=value words")
    if path.is_dir():
        raise UserError(f"{lacking}: {_folder(path)}")
    if path.exists():
        raise UserError(f"{lacking}: it is not a regular file: write the config to one")
    presets = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    if is_path:
        endings = [path.parent / f"{path.stem}{ending}" for ending in _ENDINGS]
        siblings = [file.name for ending in _ENDINGS for file in path.parent.glob(f"*{ending}")]
        close = [path.parent / other for other in difflib.get_close_matches(path.name, siblings, 1, cutoff=0.8)]
        named = [f"the preset {path.stem}"] if path.stem in presets else []
        hint = _or([*dict.fromkeys(file for file in (*endings, *close) if file.is_file()), *named])
        raise UserError(f"{lacking}: the file does not exist{f', did you mean {hint}?' if hint else ''}")
    files = [name + ending for ending in _ENDINGS if Path(name + ending).is_file()]
    if near := files or [f"the preset {other}" for other in difflib.get_close_matches(name, presets, 2)]:
        raise UserError(f"{lacking}: did you mean {_or(near)}?")
    raise UserError(f"{lacking}: give a YAML file, or one of the presets: {', '.join(presets)}")


def _folder(path: Path) -> str:
    """What a folder given as a config is, and what to give in its place."""
    if (path / "config.yaml").is_file():
        return f"it is the folder of a run, did you mean {path / 'config.yaml'}?"
    if (path / "dataset.json").is_file() or any(path.glob("*.tar")):
        return f"it is a set of shards: give a config first, and the set as data.sets={path}"
    return "it is a folder: give a YAML file or a preset (`mser config` lists them)"


def _or(names: Sequence[Any]) -> str:
    return " or ".join(map(str, names))


def title(path: Path) -> str:
    """A config as messages name it."""
    return f"preset {path.stem}" if path.parent == PRESETS else str(path)


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
        text = path.read_text(encoding="utf-8")
        tree = _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {_problem(error)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML text file: {str(error).splitlines()[0]}; save it as UTF-8") from error
    if tree is None:
        raise UserError(
            f"{path}: the file is empty: a config has lines of `key: value` (`mser config PRESET` shows one)"
        )
    if not isinstance(tree, dict):
        begun = text.strip().splitlines()[0][:40]
        raise UserError(
            f"{path}: a config is a mapping of `key: value` lines, with a space behind the colon, not {begun!r}"
        )
    return tree


def read_saved(path: Path) -> dict[str, str]:
    """A config.yaml that the program wrote, flattened. Raises what reading, YAML and a file of something else raise."""
    # No key is there twice; libyaml is five times as fast as `read_yaml`.
    return flatten(yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _problem(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, _GivenTwice):
        return str(error.problem)
    problem = str(error.problem)
    if "'\\t'" in problem:
        problem += ": indent by spaces, not by tabs"
    elif "unhashable" in problem:
        problem += ": put a value that begins with { or [ in quotes"
    elif "constructor for the tag" in problem:
        problem += ": values are plain, without !tags"
    elif "another document" in problem:
        problem = "a second document begins: a file is one config, without a line of ---"
    return f"not valid YAML: {problem}"


def split_word(word: str) -> tuple[str, str]:
    """(dotted key, text of the value) of a ``key=value`` word; `UserError` if it is none."""
    key, equals, text = word.partition("=")
    if equals and all(key.split(".")) and key == key.strip():
        return key, text
    if word.endswith(_ENDINGS):
        raise UserError(f"{word!r} is not key=value: a command takes one config, which comes first")
    meant = re.fullmatch(r"-*(\w+(?:\.\w+)*)\s*[:=]\s*(\S.*)", word)
    how = f"{meant[1]}={meant[2]}" if meant else "e.g. train.lr=3e-4"
    raise UserError(f"{word!r} is not key=value: write one word without spaces around the =, {how}")


def apply_overrides(tree: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Set dotted ``key=value`` words (values in YAML syntax) in `tree`, in place.

    Of two words for one key the last one counts, as of a command's options: a script may add words to those it got.
    """
    for word in words:
        key, text = split_word(word)
        try:
            value = _load(text) if text else None
        except yaml.MarkedYAMLError as error:
            raise UserError(
                f"{word!r}: {'' if isinstance(error, _GivenTwice) else 'the value is '}{_problem(error)}"
            ) from error
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


def load_training(name: str, words: Sequence[str]) -> Stage1 | Stage2:
    """The checked config of ``mser train NAME WORDS…``; the key ``stage`` decides the class."""
    path = find_config(name)
    tree = read_yaml(path)
    own, where = tree.get("stage"), title(path)
    if not _words_for("stage", words) and kinds.is_evaluation(tree):
        raise UserError(f"{where}: this is a config for mser eval: give it to `mser eval` (a training sets `stage`)")
    stage = apply_overrides(tree, words).get("stage")
    if stage not in (1, 2):
        given = "is missing" if stage is None else f"is {stage!r}"
        raise UserError(f"{where}: stage {given}: set `stage: 1` (align) or `stage: 2` (instruct)")
    if own in (1, 2) and stage != own:
        also = ", and stage1=RUN, a finished run of stage 1" if stage == 2 else ""
        raise UserError(
            f"'stage={stage}': {where} is a config of stage {own}, and each stage has keys of its own: give a "
            f"config of stage {stage} (`mser config` lists presets){also}"
        )
    return _checked(Stage1, tree, path, words) if stage == 1 else _checked(Stage2, tree, path, words)


def load_evaluation(name: str, words: Sequence[str], **how: bool) -> Evaluation:
    """The checked config of ``mser eval NAME WORDS…``; `how` is as for `Evaluation.check`."""
    path = find_config(name)
    tree = read_yaml(path)
    if "stage" in tree:
        of_run = path.name == "config.yaml"
        also = f"; to evaluate its run: mser eval demo_eval stage{tree['stage']}={path.parent}" if of_run else ""
        raise UserError(
            f"{title(path)}: this is a config for mser train (it sets `stage`): give it to `mser train`{also}"
        )
    if word := _words_for("stage", words):
        raise UserError(f"{word[-1]!r}: an evaluation has no key stage: name the runs by stage1=RUN and stage2=RUN")
    return _checked(Evaluation, apply_overrides(tree, words), path, words, **how)


def load_baseline(name: str, on: str, words: Sequence[str], only: Sequence[str] = ()) -> Baseline:
    """The checked configs of ``mser baseline NAME --on ON WORDS…``.

    Words that begin with ``on.`` are for ON, without it; ``out`` is the folder of the baselines, by default that of ON
    with ``_baseline`` behind it; all others are for NAME.
    """
    theirs = [word.removeprefix("on.") for word in words if word.startswith("on.")]
    own = [word for word in words if not word.startswith(("on.", "out="))]
    stage1 = load_training(name, own)
    if not isinstance(stage1, Stage1):
        raise UserError(
            f"{title(find_config(name))}: a config of stage 2: give that of a stage 1 with a frozen encoder"
        )
    evaluation = load_evaluation(on, theirs, runs=False)
    if not _words_for("tracking.run_name", theirs):
        evaluation.tracking.run_name = None  # its own is that of an evaluation
    out = next((word.removeprefix("out=") for word in reversed(words) if word.startswith("out=")), "")
    baseline = Baseline(out=out or f"{evaluation.out}_baseline", only=list(only), stage1=stage1, on=evaluation)
    baseline.check()
    return baseline


def load_translation(name: str | None, words: Sequence[str]) -> TranslateConfig:
    """The checked config of ``mser translate``: defaults < the file NAME, if one is given < WORDS."""
    path = find_config(name) if name else None
    tree = read_yaml(path) if path else {}

    def where(key: str) -> str:
        found = _words_for(key, words)
        return repr(found[-1]) if found or path is None else title(path)

    config = build(TranslateConfig, apply_overrides(tree, words), where)
    config.check()
    return config


def load_any(name: str, words: Sequence[str]) -> Stage1 | Stage2 | Evaluation:
    """The checked config of either command."""
    training = "stage" in read_yaml(find_config(name)) or _words_for("stage", words)
    return (load_training if training else load_evaluation)(name, words)


def _words_for(key: str, words: Sequence[str]) -> list[str]:
    """The words that set a key, or something in it or around it."""
    keys = [word.partition("=")[0] for word in words]
    return [
        word
        for word, own in zip(words, keys, strict=True)
        if own == key or own.startswith(f"{key}.") or key.startswith(f"{own}.")
    ]


def _checked(cls: type[T], tree: dict[str, Any], path: Path, words: Sequence[str], **how: bool) -> T:
    def where(key: str) -> str:
        found = _words_for(key, words)
        return repr(found[-1]) if found else title(path)

    kinds.check_kind(cls, tree, where)
    config = build(cls, tree, where)
    kinds.check_paths(config, where)
    config.check(**how)  # type: ignore[attr-defined]
    chosen.note(config, path.stem if path.parent == PRESETS else str(path), words, tree, _is_of_run(path))
    return config


def _is_of_run(path: Path) -> bool:
    """Whether a program wrote a config, with every default in it."""
    with path.open(encoding="utf-8") as file:
        return file.readline().startswith("# mser_dist ")


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
