"""An export as a model in MLflow's format: a folder that MLflow logs, registers, loads and serves (`served`).

It holds no code and no pickle: it names the module of this package that loads it. Linked, it holds no weights either,
but the path of the export and the hash of its card.
"""

import base64
import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import __version__, audio
from mser_dist.files import file_sha256
from mser_dist.models.exported import read_card

_PINNED = ("torch", "transformers", "tokenizers", "safetensors", "peft", "soundfile", "soxr", "numpy", "mlflow")


def save(folder: Path, export: Path, *, copy: bool) -> None:
    """Write the model of an export to `folder`, in place of what was there. copy: with the export in it."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Map

    labels = read_card(export)["labels"]
    inputs = Schema(
        [
            ColSpec(DataType.string, "audio", required=False),
            ColSpec(DataType.string, "path", required=False),
            ColSpec(Array(DataType.double), "array", required=False),
            ColSpec(DataType.long, "sampling_rate", required=False),
        ]
    )
    outputs = Schema(
        [
            ColSpec(DataType.string, "label"),
            ColSpec(Map(DataType.double), "probabilities"),
            ColSpec(DataType.double, "seconds"),
        ]
    )
    params = ParamSchema([ParamSpec("labels", DataType.string, labels, shape=(-1,))])
    noise = np.random.default_rng(0).integers(-2000, 2000, 8000).astype(np.int16)
    example = base64.b64encode(audio.encode(noise, audio.SAMPLE_RATE)).decode()
    config: dict[str, Any] = {"card_sha256": file_sha256(export / "card.json")}
    config |= {} if copy else {"export": str(export.resolve())}
    shutil.rmtree(folder, ignore_errors=True)
    pyfunc.save_model(
        folder,
        loader_module="mser_dist.prediction.served",
        data_path=str(export) if copy else None,
        signature=ModelSignature(inputs, outputs, params),
        input_example=(pandas.DataFrame({"audio": [example]}), {"labels": labels}),
        pip_requirements=requirements(),
        model_config=config,
    )


def requirements() -> list[str]:
    """This package and what it answers with, as installed here."""
    versions = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _PINNED]
    return [f"mser-dist=={__version__}", *versions]
