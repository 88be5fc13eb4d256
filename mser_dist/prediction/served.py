"""A model as MLflow loads and serves it (``python_function``): rows with a clip each in, labels and probabilities out.

What a request brings is not trusted. Audio comes within it, base64 or an array; a path is a file of the server, and is
opened where the one who serves has allowed its folder, nowhere else. Bytes, seconds, clips and labels are bounded.
"""

import base64
import binascii
import math
import os
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

from mser_dist.audio import MAX_RATE
from mser_dist.errors import UserError
from mser_dist.prediction.locate import checked_link
from mser_dist.prediction.model import Model, load_model
from mser_dist.prediction.recordings import as_wave, decode

ALLOW_PATHS = "MSER_ALLOW_PATHS"  # folders, parted as in PATH
_MAX_RATE = 2 * 48_000  # samples of all channels in a second: silence of many channels is a few bytes
LIMITS = {"max_bytes": 16 * 2**20, "max_seconds": 600.0, "max_clips": 64, "max_labels": 64}
"""Of a clip: bytes of its file or array, and seconds; of a request: clips and labels. A model's config sets others."""
_LABEL = 100  # characters of a label at most


def _load_pyfunc(data_path: str, model_config: dict[str, Any] | None = None) -> "Served":
    """What MLflow calls: `data_path` is the export, or, where the config links to one, the model's folder."""
    config = model_config or {}
    try:
        here = Path(data_path)
        export = here if (here / "card.json").is_file() else checked_link(config, "the logged model")
        return Served(load_model(export, device=config.get("device")), config)
    except UserError as error:
        raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error


class Served:
    """Answers requests, one at a time."""

    def __init__(self, model: Model, config: dict[str, Any]) -> None:
        self.model = model
        self.limits = {**LIMITS, **{name: value for name, value in config.items() if name in LIMITS}}
        named = config.get("allow_paths") or os.environ.get(ALLOW_PATHS, "").split(os.pathsep)
        self.allowed = [Path(folder).resolve() for folder in named if folder]
        self._lock = threading.Lock()

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pandas.DataFrame:
        """A row of label, probabilities {label: p} and seconds for each row of audio, path, or array and sampling_rate.

        params: labels, any words; default: those of the training. Raises `MlflowException` (a server answers 400) for
        what a request may not ask or holds wrongly.
        """
        table = pandas.DataFrame(model_input)
        if not 0 < len(table) <= self.limits["max_clips"]:
            _refuse(f"{len(table)} clips in a request: give 1 to {self.limits['max_clips']}")
        labels = self._labels((params or {}).get("labels"))
        try:
            waves = [self._wave(number, row) for number, row in enumerate(table.to_dict("records"))]
            with self._lock:
                wanted = self.model.check_labels(labels)
                found = self.model.predict(waves, labels=wanted, sampling_rate=16000)
        except UserError as error:
            _refuse(str(error))
        rows = [{"label": one.label, "probabilities": one.probabilities, "seconds": one.seconds} for one in found]
        return pandas.DataFrame(rows)

    def _labels(self, given: Any) -> list[str] | None:
        if given is None:
            return None
        labels = [str(label) for label in np.atleast_1d(given).tolist()]
        if len(labels) > self.limits["max_labels"] or any(len(label) > _LABEL for label in labels):
            _refuse(f"at most {self.limits['max_labels']} labels of {_LABEL} characters can be asked for")
        return labels or None

    def _wave(self, number: int, row: dict[str, Any]) -> np.ndarray:
        given = {name: row[name] for name in ("audio", "path", "array") if _is_there(row.get(name))}
        if len(given) != 1:
            _refuse(f"clip {number}: give one of audio (base64), path, and array with sampling_rate, not {[*given]}")
        try:
            if "array" in given:
                return self._of_array(given["array"], row.get("sampling_rate"))
            data = self._file(given["path"]) if "path" in given else self._of_base64(given["audio"])
            return decode(data, self.limits["max_seconds"], max_rate=_MAX_RATE)
        except UserError as error:
            _refuse(f"clip {number}: {str(error).removeprefix(': ')}")

    def _of_base64(self, text: Any) -> bytes:
        if not isinstance(text, str):
            raise UserError("audio is a text: the bytes of an audio file in base64")
        if len(text) > 4 * math.ceil(self.limits["max_bytes"] / 3) + 4:
            raise UserError(f"its file has more than {self.limits['max_bytes']} bytes, which is the limit")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise UserError("audio is no base64; a path of the server goes into the column path") from None

    def _of_array(self, given: Any, rate: Any) -> np.ndarray:
        if not _is_there(rate) or not 0 < float(rate) <= MAX_RATE:
            raise UserError("an array of samples needs its sampling_rate in Hz")
        try:
            samples = np.asarray(given, dtype=np.float32)
        except (TypeError, ValueError):
            raise UserError("array is no list of numbers") from None
        if samples.ndim != 1:
            raise UserError("array is a list of samples of one channel")
        if samples.nbytes > self.limits["max_bytes"] or len(samples) > self.limits["max_seconds"] * float(rate):
            raise UserError(
                f"its array is longer than {self.limits['max_seconds']:g} s or {self.limits['max_bytes']} bytes"
            )
        return as_wave(samples, round(float(rate)))

    def _file(self, name: Any) -> bytes:
        """The bytes of a file of the server; where it may not be opened, nobody learns whether it is there."""
        refused = UserError(f"this server opens no such file (allow_paths, {ALLOW_PATHS}): send the audio in base64")
        try:
            path = Path(str(name)).resolve()
            if not any(path.is_relative_to(folder) for folder in self.allowed) or not path.is_file():
                raise refused
            with path.open("rb") as file:
                data = file.read(self.limits["max_bytes"] + 1)
        except (OSError, ValueError):
            raise refused from None
        if len(data) > self.limits["max_bytes"]:
            raise UserError(f"its file has more than {self.limits['max_bytes']} bytes, which is the limit")
        return data


def _is_there(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value)) and value is not pandas.NA


def _refuse(reason: str) -> NoReturn:
    raise MlflowException(" ".join(reason.split())[:500], error_code=INVALID_PARAMETER_VALUE)
