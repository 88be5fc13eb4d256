"""The three kinds of config, stage 1, stage 2, evaluation: what tells one from another where the wrong one is given."""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from mser_dist.config.evaluation_keys import Evaluation
from mser_dist.config.fields import keys_of
from mser_dist.config.keys import Stage1, Stage2
from mser_dist.errors import UserError

_NAMES = {Stage1: "stage 1", Stage2: "stage 2", Evaluation: "an evaluation (mser eval)"}
_TOP = {cls: {field.name for field in fields(cls)} for cls in _NAMES}
_PATHS = ("out", "stage1", "stage2", "init_from")


def is_evaluation(tree: Mapping[str, Any]) -> bool:
    """Whether a config's own keys are those of an evaluation: it names runs, and no stage."""
    return tree.keys() <= _TOP[Evaluation] and not tree.keys().isdisjoint(("stage1", "stage2"))


def check_kind(cls: type, tree: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """Raise `UserError` for a key or section that only another kind of config has; where: the place of a key."""
    inner = {key.rpartition(".")[2] for key in keys_of(cls)}  # dtype is a key of an evaluation, and engine.dtype
    for key in tree:
        others = [name for other, name in _NAMES.items() if key in _TOP[other]]
        if key not in inner and others:
            raise UserError(
                f"{where(str(key))}: {key} is a key of {' and of '.join(others)}, not of {_NAMES[cls]}: leave it out, "
                "or give another config (`mser config` lists presets)"
            )


def check_paths(config: Any, where: Callable[[str], str]) -> None:
    """Raise `UserError` for ~ and $VARIABLE in a path, which nobody fills in: `out` would be a folder of that name."""
    named = [(key, getattr(config, key, None)) for key in _PATHS]
    named.append(("train.fork", getattr(getattr(config, "train", None), "fork", None)))
    for key, value in [*named, *(("data.sets", path) for path in config.data.sets)]:
        if isinstance(value, str) and re.match(r"~|.*\$[{\w]", value):
            raise UserError(
                f"{where(key)}: {key} is {value!r}, and ~ and $VARIABLES are not filled in: write the whole path, or "
                f'let the shell do it, {key}="$HOME/…" on the command line'
            )
