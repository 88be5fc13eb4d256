"""Trainings and evaluations from Python, a notebook's too: afterwards the process is as it was before.

`import mser_dist` offers what is here. Nothing heavy is imported before a training or an evaluation begins.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mser_dist import quiet
from mser_dist.config import Evaluation, Stage1, Stage2
from mser_dist.config.file import load_any
from mser_dist.errors import UserError
from mser_dist.ranks.session import session
from mser_dist.tables import showing_what_can_be

Config = Stage1 | Stage2 | Evaluation


def load_config(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """The checked config of a YAML file, or of a preset by its name (`mser config` lists them).

    overrides: ``"train.lr=3e-4"`` words as on the command line, or {"train.lr": 3e-4}. Raises `UserError` for a key or
    value that cannot be.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides is a list of words or a mapping, not {overrides!r}: write [{overrides!r}]")
    if isinstance(overrides, Mapping):  # JSON is YAML
        overrides = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in overrides.items()]
    return load_any(str(name), list(overrides))


def train(config: Config | str | Path) -> dict[str, Any]:
    """Train a run to its end, from its newest checkpoint if it has one, and return its summary.

    config: of `load_config`, or what that takes. The run folder, ``config.out``, then holds the model in ``export/``.
    Under torchrun or srun it is collective; alone, this process is the only rank. An interrupt (Ctrl-C, the notebook's
    stop) ends it after a step: it saves, raises `errors.Stopped`, and the same call goes on from there. Raises
    `UserError` for what a user can mend.
    """
    return _run("mser_dist.training.loop", "train", _expect("train", config, (Stage1, Stage2)))


def evaluate(config: Config | str | Path) -> dict[str, Any]:
    """Evaluate finished runs and return the report, whose "zero_shot" is the table's rows; see `train`."""
    return _run("mser_dist.evaluation.evaluate", "evaluate", _expect("evaluate", config, (Evaluation,)))


def _expect(function: str, config: Any, kinds: tuple[type, ...]) -> Any:
    """`config`, loaded and checked. Raises `UserError` where it is none of `kinds`."""
    if isinstance(config, (str, Path)):
        config = load_config(config)
    if not isinstance(config, kinds):
        wanted, other = ("a training", "evaluate") if function == "train" else ("an evaluation", "train")
        instead = f": give it to mser_dist.{other}" if isinstance(config, (Stage1, Stage2, Evaluation)) else ""
        raise UserError(f"mser_dist.{function} takes the config of {wanted}, not {type(config).__name__}{instead}")
    checked: Any = config
    checked.check()
    return checked


def _run(module: str, function: str, config: Any) -> dict[str, Any]:
    with session(), showing_what_can_be():
        # What libraries do to the filters of warnings when they are imported has to stay; what we do for a run goes.
        loaded = importlib.import_module(module)
        with quiet.hushed():
            result: dict[str, Any] = getattr(loaded, function)(config)
    return result
