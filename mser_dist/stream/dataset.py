"""A set of shards as a torch dataset, for somebody's own model and loop."""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mser_dist.audio import decode
from mser_dist.errors import UserError
from mser_dist.shards.columns import FIELDS
from mser_dist.shards.metadata import as_text
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.features import Features


class ClipDataset(Dataset[dict[str, Any]]):
    """The clips of a `ShardSet`, decoded one by one as they are asked for; `open_set` makes one.

    `clips[i]` is a dict:

        audio      float32 tensor (samples,) at 16 kHz, full scale ±1; with features: `features`, (n_mels, frames)
        target     number of the label in `labels`, or -1 where a clip has none
        label      a common name (anger, happy …), or None; emotion: the corpus's own word for it
        language, speaker, gender, corpus, split, synthetic, sample_rate (of the recording), set (its number)
        key        its name in the set; text: what is said, or None
        duration   seconds

    A damaged clip is a `UserError` that names its shard and key. It can be given to the workers of a DataLoader,
    forked or spawned; `collate` is a collate function for it.
    """

    def __init__(self, shards: ShardSet, labels: Sequence[str], features: Features | None) -> None:
        self.shards = shards
        self.labels = list(labels)
        self.features = features
        column = shards.coded["label"]
        numbers = {label: number for number, label in enumerate(self.labels)}
        self.target = np.array([numbers.get(name, -1) for name in column.names], dtype=np.int64)[column.codes]  # (n,)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        try:
            i = operator.index(index)
        except TypeError:
            raise TypeError(
                f"a clip is asked for by its number, not {type(index).__name__}: "
                "for a part of the set, torch.utils.data.Subset(clips, range(10))"
            ) from None
        if not -len(self) <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        i %= len(self)
        sample = self.shards.read(i)
        wave = decode(sample.audio, sample.where)
        value = torch.from_numpy(wave if self.features is None else self.features(wave))
        return {
            "audio" if self.features is None else "features": value,
            "target": int(self.target[i]),
            "key": sample.key,
            "text": as_text(sample.meta.get("text")),
            "duration": float(self.shards.duration[i]),
            **{name: column.names[column.codes[i]] for name, column in self.shards.coded.items()},
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def columns(self) -> dict[str, NDArray[Any]]:
        """All but sound and text, (n,) each, from the indexes alone, as `pandas.DataFrame` takes it."""
        coded = {name: self.shards.column(name) for name in FIELDS}
        keys = np.array(self.shards.keys, dtype=object)
        return {"key": keys, "target": self.target, "duration": self.shards.duration, **coded}

    @staticmethod
    def collate(clips: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of clips: sound padded with zeros to (B, samples) or (B, n_mels, frames); all else by name.

        `lengths` (B,) is how much of the last axis is sound; `target` and `duration` are tensors (B,), the rest lists.
        """
        name = "audio" if "audio" in clips[0] else "features"
        lengths = torch.tensor([clip[name].shape[-1] for clip in clips])
        sound: Tensor = clips[0][name].new_zeros(len(clips), *clips[0][name].shape[:-1], int(lengths.max()))
        for row, clip in enumerate(clips):
            sound[row, ..., : lengths[row]] = clip[name]
        batch: dict[str, Any] = {key: [clip[key] for clip in clips] for key in clips[0]}
        numbers = {key: torch.tensor(batch[key]) for key in ("target", "duration")}
        return batch | numbers | {name: sound, "lengths": lengths}


def open_set(
    sets: str | Path | Sequence[str | Path],
    *,
    split: str | Collection[str] | None = None,
    labels: str | Collection[str] | None = None,
    languages: str | Collection[str] | None = None,
    keep: Mapping[str, Any] | None = None,
    drop: Mapping[str, Any] | None = None,
    features: str | Features | None = None,
) -> ClipDataset:
    """Open sets of shards (folders, single tars, URLs) as a torch dataset of decoded clips, by their indexes alone.

    Args:
        split: "train", "val" or "test", or several; None: all.
        labels: keep only clips of these; their order is that of `target`. None: all clips, and all labels by name.
        languages: keep only these.
        keep, drop: field → values to keep or to leave out, e.g. {"corpus": ["emodb"], "duration": [0.5, 20]}.
        features: None: the waveform; "log-mel": Whisper's, 80 high; or `Features`.

    Raises `UserError` for a set that is not there or damaged, a value that no clip has, or filters that leave nothing.
    """
    if not isinstance(sets, (str, Path)) and not sets:
        raise UserError("open_set needs a folder of shards, as mser pack or mser synth write it")
    if isinstance(features, str):
        if features != "log-mel":
            raise UserError(f'features={features!r} is not known: "log-mel", None for the waveform, or a Features')
        features = Features()
    wanted = dict(keep or {})
    for argument, field, values in (
        ("split", "split", split),
        ("labels", "label", labels),
        ("languages", "language", languages),
    ):
        if values is None:
            continue
        if field in wanted:
            raise UserError(f"{argument} and keep[{field!r}] both say which {field} to keep: keep one of them")
        wanted[field] = [values] if isinstance(values, str) else list(values)
    shards = ShardSet.open(sets, keep=wanted, drop=drop)
    names = wanted["label"] if labels is not None else [name for name in shards.coded["label"].names if name]
    return ClipDataset(shards, names, features)
