"""Whether an export answers as the model that was trained: both score two clips of noise.

Exports go wrong without an error: a part is left out and stays random, a name is another one, a tensor is transposed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.models.normalize import OVERALL
from mser_dist.prediction.model import Model
from mser_dist.stream.examples import pad_speech
from mser_dist.stream.features import Features
from mser_dist.stream.loader import Example

RECIPE: dict[str, Any] = {"seed": 20, "seconds": [1.0, 0.6], "loudness": 0.05}
# How far rounding may take a number: this share of the largest one. Another kernel and another order of sums are in it;
# a part of the weights that is not the trained one is not.
_SHARE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Heard:
    """What a model makes of the clips: the labels' scores (2, K), and the mean emotion token (2, D), which tells of the
    encoder and Q-Former where an LLM has yet to learn to listen."""

    scores: Tensor
    tokens: Tensor


def record(heard: Heard) -> dict[str, Any]:
    """What an export's card keeps, so that whoever has a copy can check it too."""
    return {"noise": RECIPE, "scores": heard.scores.tolist()}


def noise(features: Features) -> dict[str, Any]:
    """The clips as an encoder is fed them (`pad_speech`)."""
    draw = np.random.default_rng(RECIPE["seed"])
    clips = []
    for number, seconds in enumerate(RECIPE["seconds"]):
        wave = (draw.normal(size=round(seconds * SAMPLE_RATE)) * RECIPE["loudness"]).astype(np.float32)
        clips.append(Example(features(wave), features.own(len(wave)), 0, 0, number, draw))
    return pad_speech(clips)


@torch.no_grad()
def heard_by(model: Any, scorer: Any, device: str) -> Heard:
    """What `model` makes of the clips of noise, its labels scored by `scorer`. Collective under ZeRO-3."""
    speech, was_training = model.speech, model.training
    batch = noise(speech.any_encoder.features)
    if speech.statistics is not None:
        batch["group"] = torch.full((2,), list(speech.statistics.clips).index(OVERALL))
    model.eval()
    try:
        given = speech.prepared(batch, device)
        tokens = speech(given["speech"], given["lengths"]).mean(1)
        return Heard(scorer(given)["scores"].cpu(), tokens.float().cpu())
    finally:
        model.train(was_training)


def check(export: Path, expected: Heard, dtype: torch.dtype) -> None:
    """Let an export hear the clips too, without a copy of its weights in memory: they are mapped.

    Raises `UserError` where it does not answer as the trained model did.
    """
    model = Model(export, "cpu", str(dtype).removeprefix("torch."), mapped=True)
    found = heard_by(model.network, model.scorer(model.labels), "cpu")
    for what in ("scores", "tokens"):
        here, there = getattr(found, what), getattr(expected, what)
        difference, allowed = float((here - there).abs().max()), _SHARE[dtype] * float(there.abs().max())
        if not difference <= allowed:  # NaN too
            raise UserError(
                f"{export.name.removesuffix('.partial')}: the exported model answers otherwise than the trained one "
                f"({what} differ by {difference:.3g}, rounding comes to {allowed:.1g}): it is not published; the "
                "checkpoints are whole: mser export can try again"
            )
