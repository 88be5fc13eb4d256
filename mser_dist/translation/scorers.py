"""What names the emotion of a clip that was made: a trained model, or a probe that is fitted to recordings."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mser_dist import audio
from mser_dist.audio import SAMPLE_RATE
from mser_dist.config.model_keys import EncoderConfig
from mser_dist.config.translation_keys import WHISPER
from mser_dist.errors import UserError
from mser_dist.files import file_sha256
from mser_dist.models.attention import choose
from mser_dist.models.encoders import build_encoder
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.heard import ledger_of
from mser_dist.prediction.model import load_model
from mser_dist.shards.ledger import Ledger, part_of
from mser_dist.shards.shard_set import ShardSet


class Export:
    """A trained model of either stage.

    model: as of `load_model`. labels: those that it chooses from. `about` has the ledger of its training.
    """

    def __init__(self, model: str, labels: list[str], device: str) -> None:
        self._model, self._labels = load_model(model, device=device), labels
        ledger = ledger_of(self._model.export)
        self.about: dict[str, Any] = {
            "name": "export",
            "model": str(model),
            "card_sha256": file_sha256(self._model.export / "card.json"),
            "labels": labels,
            "trained_on": ledger.summary(),
        }

    def score(self, wave: NDArray[np.float32]) -> dict[str, float]:
        found = self._model.predict(wave, labels=self._labels, sampling_rate=SAMPLE_RATE)
        return dict(found.probabilities)


class Probe:
    """Logistic regression on the means of a frozen Whisper-base's layer, fitted to the training split of sets.

    Raises `UserError` for sets without labelled training clips.
    """

    def __init__(self, sets: list[str]) -> None:
        attention = choose("auto", torch.float32, "cpu")
        self._encoder = FrozenEncoder(build_encoder(EncoderConfig(pretrained=WHISPER, layers=[3]), attention))
        shards = ShardSet.open(sets, split="train")
        labels = shards.column("label")
        which = [i for i in range(len(shards)) if labels[i] is not None]
        if len({labels[i] for i in which}) < 2:
            raise UserError(f"selection.probe={','.join(sets)}: no clips of two labels to tell apart: name other sets")
        rows = np.stack([self._heard(audio.decode((one := shards.read(i)).audio, one.where)) for i in which])
        self._probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        self._probe.fit(rows, [str(labels[i]) for i in which])
        ledger = Ledger((part_of(shards, "probe", None),), WHISPER)
        self.about: dict[str, Any] = {
            "name": "probe",
            "sets": [Path(name).name for name in sets],
            "clips": len(which),
            "trained_on": ledger.summary(),
        }

    def _heard(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        speech = torch.from_numpy(self._encoder.encoder.features(wave))[None]
        [frames] = self._encoder(speech, torch.tensor([speech.shape[-1]]))
        mean: NDArray[np.float32] = frames.mean((0, 1)).numpy()
        return mean

    def score(self, wave: NDArray[np.float32]) -> dict[str, float]:
        [row] = self._probe.predict_proba(self._heard(wave)[None])
        return {str(label): float(share) for label, share in zip(self._probe.classes_, row, strict=True)}
