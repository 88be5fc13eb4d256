"""The clips that a config asks for, opened, and what a training makes of them: labels, features, augmentation."""

import difflib
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.config.data_keys import ALL
from mser_dist.errors import UserError
from mser_dist.shards.emotions import LABELS, to_label
from mser_dist.shards.remote import RemoteCache
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.features import Features
from mser_dist.stream.loader import ClipRequest, Collate, Decoder, EncodedClips, Example
from mser_dist.tables import count


def open_training_clips(data: cfg.TrainingDataConfig) -> ShardSet:
    """The clips to train on: `open_clips`, and every label must occur: one that does not is a typo, or not learned."""
    shards = open_clips(data, data.split)
    if absent := _absent_labels(data, shards):
        there = _labels_there(data, data.split)
        if absent[0] in there:
            raise UserError(
                f"data.labels names {absent[0]!r}, and the filters leave no clip of it: drop it from data.labels"
            )
        hint = _nearest(absent[0], there)
        raise UserError(f"data.labels names {absent[0]!r}, and no clip of the split {data.split!r} has it: {hint}")
    return shards


def open_evaluation_clips(data: cfg.DataConfig, trained: Collection[str]) -> ShardSet:
    """The clips to evaluate on: `open_clips`, and every label must mean something, for else it is a typo.

    It does where a clip of the sets has it, in any split, or where it is one of the `trained` labels of the exports or
    of `emotions.LABELS`: a corpus without surprise can be asked about it.
    """
    shards = open_clips(data, data.split, votes=True)
    if absent := _absent_labels(data, shards):
        there = _labels_there(data, None)
        if strange := [label for label in absent if label not in {*there, *trained, *LABELS}]:
            hint = _nearest(strange[0], there, [*trained, *LABELS])
            raise UserError(f"data.labels names {strange[0]!r}, and no clip of the sets has it: {hint}")
    return shards


def _absent_labels(data: cfg.DataConfig, shards: ShardSet) -> list[str]:
    return [label for label in data.labels if label not in shards.coded["label"].names]


def _labels_there(data: cfg.DataConfig, split: str | list[str] | None) -> list[str]:
    """Those that clips have, whatever the filters leave."""
    everything = ShardSet.open(data.sets, split=_wanted(split), cache=_cache(data))
    return [str(label) for label in everything.coded["label"].names if label]


def _nearest(label: str, there: list[str], others: Collection[str] = ()) -> str:
    """What may have been meant: the label of that word, one that is spelled alike, or any of those there."""
    with suppress(KeyError):
        if (meant := to_label(label)) in (*there, *others):
            return f"did you mean {meant}?"
    near = difflib.get_close_matches(label, there, 1) or difflib.get_close_matches(label, others, 1)
    return f"did you mean {near[0]}?" if near else f"labels there: {', '.join(there)}"


def open_clips(data: cfg.DataConfig, split: str | list[str], *, votes: bool = False) -> ShardSet:
    """The clips of a split, of several, or of `all` that a config wants; with their annotators' votes, or without.

    Raises `UserError` if none is left, not even of one of several splits, or one is too long.
    """
    keep = {**({"language": data.languages} if data.languages else {}), **data.keep}
    parts = _wanted(split)
    more: dict[str, Any] = {"cache": _cache(data), "sound": True, "votes": votes}
    shards = ShardSet.open(data.sets, split=parts, labels=data.labels, keep=keep, drop=data.drop, **more)
    if isinstance(split, list) and (absent := [name for name in split if name not in shards.coded["split"].names]):
        there = ShardSet.open(data.sets, cache=_cache(data)).coded["split"].names
        raise UserError(
            f"the list of splits {split} names {absent[0]!r}, and no clip of it is wanted or there: splits there: "
            f"{', '.join(map(str, there))}"
        )
    long = (shards.duration > data.max_seconds).nonzero()[0]
    if len(long):
        others = f", as {'does' if len(long) == 2 else 'do'} {count(len(long) - 1, 'other')}" if len(long) > 1 else ""
        raise UserError(
            f"{shards.where(int(long[0]))} lasts {shards.duration[long[0]]:.1f} s, more than "
            f"data.max_seconds={data.max_seconds:g}{others}: leave them out by "
            f"data.keep={{duration: [0, {data.max_seconds:g}]}}, or cut them when packing (Whisper takes 30 s at most)"
        )
    return shards


def _wanted(split: str | list[str] | None) -> str | list[str] | None:
    return None if split == ALL else split


def _cache(data: cfg.DataConfig) -> RemoteCache:
    return RemoteCache(data.cache_dir, data.cache_gb * 1e9)


_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: its multiples lie far from each other


class Examples:
    """The clips of a `ShardSet` with what the training makes of them: label numbers, features, augmentation."""

    def __init__(
        self,
        shards: ShardSet,
        labels: list[str],
        features: Features,
        max_seconds: float = 30.0,
        seed: int = 0,
        *,
        shuffle_labels: bool = False,
        augment: cfg.AugmentConfig | None = None,
        max_bad: int = 0,
    ) -> None:
        self.shards = shards
        self.features = features
        self.max_seconds = max_seconds
        self.seed = seed
        self.augment = augment if augment and augment.on else None
        self.max_bad = max_bad
        column = shards.coded["label"]
        self.group: NDArray[np.int64] | None = None  # (n,) whose statistics a clip's features are normalised by
        self.encoded: EncodedClips | None = None  # what a frozen encoder made of them, once it has
        self.wording: NDArray[np.int64] | None = None  # (n,) in which wording a clip is asked about, where it matters
        self.transcript: Callable[[bytes], str] | None = None  # of a clip's json, where prompts hold it
        self._keys = shards.content_keys()
        self.label = np.array([labels.index(name) for name in column.names], dtype=np.int16)[column.codes]  # (n,)
        if shuffle_labels:
            self.label = shuffled(self.label, np.random.default_rng([seed, 7]))

    def __len__(self) -> int:
        return len(self.label)

    def get(self, index: int, epoch: int) -> Example:
        """One clip, decoded here and now."""
        try:
            return self.decoder(_no_collate).clip(self.requests(np.array([index]))[0], epoch, 0)
        except UserError as error:
            raise UserError(f"{self.shards.where(index)}: {error}") from None

    def requests(self, indices: NDArray[Any], variant: int | None = None) -> list[ClipRequest]:
        """What to ask a decoder for; of a variant of the clips, or (None) of the one that it draws."""
        return [
            ClipRequest(
                ref,
                int(self.label[ref.sample]),
                int(self.shards.source[ref.sample]),
                int(self._keys[ref.sample]),
                variant,
                0 if self.wording is None else int(self.wording[ref.sample]),
            )
            for ref in self.shards.refs(indices)
        ]

    def decoder(self, collate: Collate) -> Decoder:
        return Decoder(
            self.shards.reader,
            self.features,
            self.seed,
            self.max_seconds,
            self.augment,
            collate,
            self.encoded,
            self.transcript,
        )

    def grouped(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of these clips (`pad_speech`) with the group of each, (B,); what is no clip is of the first."""
        import torch

        if self.group is None:
            return batch
        return {**batch, "group": torch.from_numpy(self.group[np.maximum(batch["index"], 0)])}

    def keys(self, variant: int = 0) -> NDArray[np.uint64]:
        """(n,) numbers that stand for the clips' audio, and for a variant of it."""
        return self._keys + np.uint64(variant * _GOLDEN % 2**64)


def _no_collate(clips: list[Example]) -> dict[str, Any]:
    return {}


def shuffled(label: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    """(n,) labels permuted so that they tell nothing of the true ones.

    A plain permutation leaves each true class with a slight majority of some wrong label, which a model can learn: its
    accuracy is then anywhere around chance, class by class. So each class gets every label in the same proportion.
    """
    by_class = random.permutation(len(label))
    by_class = by_class[np.argsort(label[by_class], kind="stable")]
    _, starts, sizes = np.unique(label[by_class], return_index=True, return_counts=True)
    place = (np.arange(len(label)) - np.repeat(starts, sizes) + 0.5) / np.repeat(sizes, sizes)  # in its class, 0 to 1
    result = np.empty_like(label)
    result[by_class[np.argsort(place, kind="stable")]] = np.sort(label)
    return result


def pad_speech(clips: list[Example]) -> dict[str, Any]:
    """Stack what an encoder is fed, zeros behind the shorter ones, as "speech", (B, n_mels, F) or (B, S).

    Clips that a frozen encoder has heard are features, (B, T, L, D), and "encoded" is there and true.
    "lengths" (B,) are the clips' own, without `pad_seconds`; "index" is the list of the clips' numbers in the set,
    "wording" and "text" of how they are asked about and what is said in them.
    """
    import torch

    index = [clip.index for clip in clips]
    asked = {"index": index, "wording": [clip.wording for clip in clips], "text": [clip.text for clip in clips]}
    lengths = torch.tensor([clip.length for clip in clips])
    if isinstance(clips[0].speech, torch.Tensor):
        features = torch.nn.utils.rnn.pad_sequence([clip.speech for clip in clips], batch_first=True)
        return {"speech": features, "lengths": lengths, "encoded": True, **asked}
    sizes = [clip.speech.shape[-1] for clip in clips]
    speech = torch.zeros(len(clips), *clips[0].speech.shape[:-1], max(sizes))
    for row, clip in enumerate(clips):
        speech[row, ..., : sizes[row]] = torch.from_numpy(clip.speech)
    return {"speech": speech, "lengths": lengths, **asked}
