"""A validation: the scores of a real model on clips, and the temperature that these say."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mser_dist.errors import UserError
from mser_dist.evaluation.calibration import Likelihood
from mser_dist.evaluation.predict import scored, validate
from mser_dist.evaluation.scoring import PromptScorer
from mser_dist.models import exported
from mser_dist.models.text import TextTower
from mser_dist.ranks.distributed import World
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples
from tests.unit import tiny_exports
from tests.unit.made_up_set import write_set

LABELS = ["happy", "sad", "anger"]


def test_a_validation_fits_the_temperature_of_its_clips(tmp_path: Path) -> None:
    export = tiny_exports.stage1(tmp_path / "run", "none") / "export"
    model = exported.load_aligner(export, tiny_exports.SDPA)
    scorer = PromptScorer(model, TextTower(tiny_exports.TOWER, "cpu"), LABELS)
    shards = ShardSet.open(write_set(tmp_path / "set", 30), labels=["happy"])
    clips = Examples(shards, LABELS, exported.features_of(exported.read_card(export)))
    stage: Any = SimpleNamespace(model=model, labels=LABELS, scorer=lambda: scorer)

    def validated(go_on: bool = True) -> dict[str, float] | None:
        measured = validate(stage, clips, 4, 0, World(), "cpu", lambda: go_on)
        return None if measured is None else measured.numbers

    made = [one for one in scored(scorer, clips, 4, 0, World(), "cpu", "test", lambda: None) if one is not None]
    number = np.concatenate([one.clips for one in made])
    scores = np.concatenate([one.found["scores"] for one in made])[np.argsort(number)]
    # Labels of which two in three are as the model has it.
    clips.label = ((scores.argmax(1) + (np.arange(len(clips)) % 3 == 0)) % 3).astype(np.int16)
    found = validated()
    assert found is not None and found["wa"] == pytest.approx(np.mean(np.arange(len(clips)) % 3 != 0))
    loss = Likelihood(scores * scorer.scale(), clips.label)
    best = found["temperature"]
    at = loss(best * np.array([1.0, 0.98, 1.02]))
    assert at[0] < min(at[1:])
    clips.label = scores.argmax(1).astype(np.int16)
    assert "temperature" not in (validated() or {}), "all are right: there is none"
    assert validated(go_on=False) is None
    torch.nn.init.constant_(model.speech_head.weight, float("nan"))
    with pytest.raises(
        UserError, match=r"validate: the scores of .* are not numbers: with a 16-bit dtype take float32"
    ):
        validated()
