"""A sweep as `mser sweep --evaluate` leaves it, of made-up answers: what the pages of MLflow are looked at with."""

from pathlib import Path
from typing import Any

from mser_dist.config import Evaluation
from mser_dist.jobs import ranked, sweep
from mser_dist.shards.shard_set import ShardSet
from tests.unit.made_up_runs import LABELS, answers, evaluate, train

EXPERIMENT = "my-experiment"
BEST = "lr=0.0003_seed=0"


def make(folder: Path, shards: ShardSet, sets: Path) -> Path:
    """Three learning rates with two seeds each, trained and evaluated; the folder of the sweep. BEST is the best."""
    out = folder / "lr"
    words = [f"data.sets={sets}", f"out={out}", f"tracking.experiment={EXPERIMENT}", "train.lr=0.001,0.0003,0.0001"]
    theirs = [f"eval.data.sets={sets}", f"eval.data.labels=[{','.join(LABELS)}]"]
    planned = sweep.trials("demo_stage1", [*words, "seed=0,1", *theirs], "demo_eval")
    command = "mser sweep demo_stage1 train.lr=0.001,0.0003,0.0001 seed=0,1 --evaluate demo_eval"
    sweep.join(planned, command=command)
    for trial, right in zip(planned, (0.5, 0.45, 0.7, 0.75, 0.2, 0.25), strict=True):
        assert trial.evaluation is not None
        how: dict[str, Any] = {"enabled": True, "experiment": EXPERIMENT}
        trained = train(Path(trial.config.out), *_words(trial.config), ua=right, steps=12, **how)
        given = {"stage1": answers(shards, right, heard=("el",))}
        evaluate(Path(trial.evaluation.out), shards, given, *_words(trial.evaluation), stages={1: trained}, **how)
    ranking = ranked.settle(out)
    assert ranking.best is not None and ranking.best.name == BEST
    return out


def _words(config: object) -> list[str]:
    said = config.said  # type: ignore[attr-defined]
    tracking = config.tracking  # type: ignore[attr-defined]
    own = [word for word in said.words if not word.startswith(("out=", "stage", "data.labels=", "tracking."))]
    assert isinstance(config, Evaluation) or own
    return [*own, f"tracking.parent={tracking.parent}", f"tracking.run_name={tracking.run_name}"]
