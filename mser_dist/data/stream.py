"""Which rank reads which clip at which step: a pure function of (seed, epoch, step), so a resume needs only the step.

An epoch is a permutation of the set, cut into global batches; the last one is filled up from the epoch's start, so that
every clip is seen in every epoch and every rank has equally many steps. A rank's share of a global batch is a
contiguous part of it: the same global batches at any world size.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.data.audio import decode, log_mel
from mser_dist.data.shards import ShardSet
from mser_dist.errors import UserError


class Plan:
    """The order of samples. `groups` are ids (e.g. of source utterances) of which `together` stay side by side."""

    def __init__(
        self, size: int, global_batch: int, seed: int, groups: NDArray[np.int64] | None = None, together: int = 1
    ) -> None:
        self.size = size
        self.global_batch = global_batch
        self.seed = seed
        self.groups = groups  # (size,)
        self.together = together
        self._memo: tuple[int, NDArray[np.int64]] | None = None  # the epoch at hand: steps ask for it again and again

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.size // self.global_batch)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's order, (steps_per_epoch · global_batch,) indices of samples."""
        if self._memo is None or self._memo[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            order = random.permutation(self.size)
            if self.groups is not None and self.together > 1:
                order = self._side_by_side(order, random)
            self._memo = epoch, np.resize(order, self.steps_per_epoch * self.global_batch)
        return self._memo[1]

    def _side_by_side(self, order: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Cut each group into runs of `together` clips, keep the runs whole, and shuffle the runs."""
        assert self.groups is not None
        by_group = order[np.argsort(self.groups[order], kind="stable")]  # shuffled within each group
        ids = self.groups[by_group]
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        within = np.arange(len(ids)) - np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
        run = np.cumsum(within % self.together == 0) - 1  # run number of each position
        rank_of_run = random.permutation(run[-1] + 1)
        return by_group[np.argsort(rank_of_run[run], kind="stable")]

    def step(self, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """This rank's samples of a global step counted from the start of training."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        batch = self.epoch(epoch)[inside * self.global_batch :][: self.global_batch]
        share = self.global_batch // world_size
        return batch[rank * share : (rank + 1) * share]


def open_training_clips(data: cfg.TrainingClips) -> ShardSet:
    """The clips to train on: `open_clips`, and every label must occur, for one that does not is most likely a typo."""
    shards = open_clips(data, data.split)
    absent = [label for label in data.labels if label not in set(shards.label)]
    if absent:
        there = sorted({str(label) for label in ShardSet.open(data.sets, split=data.split).label if label})
        near = difflib.get_close_matches(absent[0], there, 1)
        hint = f"did you mean {near[0]}?" if near else f"labels there: {', '.join(there)}"
        raise UserError(f"data.labels names {absent[0]!r}, and no clip of the split {data.split!r} has it: {hint}")
    return shards


def open_clips(data: cfg.Clips, split: str) -> ShardSet:
    """The clips of a split that a config wants. Raises `UserError` if none is left, or one is too long."""
    shards = ShardSet.open(data.sets, split=split, languages=data.languages or None, labels=data.labels)
    long = (shards.duration > data.max_seconds).nonzero()[0]
    if len(long):
        raise UserError(
            f"{shards.where(int(long[0]))} lasts {shards.duration[long[0]]:.1f} s, more than "
            f"data.max_seconds={data.max_seconds:g}, as do {len(long) - 1} others: cut such clips, or leave them out, "
            "when packing (Whisper takes 30 s at most)"
        )
    return shards


@dataclass(frozen=True)
class Clip:
    """A decoded sample on its way to a collate function. `draw` is seeded by sample and epoch: a resume repeats it."""

    mel: NDArray[np.float32]  # (n_mels, frames)
    label: int
    source: int
    key: str
    draw: np.random.Generator


class Clips:
    """Map-style access to the clips of a `ShardSet`: decode and log-mel. Safe to hand to DataLoader workers."""

    def __init__(
        self,
        shards: ShardSet,
        labels: list[str],
        n_mels: int,
        max_seconds: float,
        seed: int,
        shuffle_labels: bool = False,
    ) -> None:
        self.shards = shards
        self.labels = labels
        self.n_mels = n_mels
        self.max_seconds = max_seconds
        self.seed = seed
        number = {label: i for i, label in enumerate(labels)}
        self.label = np.array([number[label] for label in shards.label], dtype=np.int64)  # (n,)
        if shuffle_labels:
            self.label = shuffled(self.label, np.random.default_rng([seed, 7]))
        # Equal ids in two corpora are not one utterance.
        source = [f"{corpus}/{source}" for corpus, source in zip(shards.corpus, shards.source_id, strict=True)]
        self.source = np.unique(np.array(source), return_inverse=True)[1].astype(np.int64)  # (n,)

    def __len__(self) -> int:
        return len(self.label)

    def get(self, index: int, epoch: int) -> Clip:
        sample = self.shards.read(int(index))
        wave = decode(sample.audio, where=sample.where, max_seconds=self.max_seconds)
        return Clip(
            mel=log_mel(wave, self.n_mels),
            label=int(self.label[index]),
            source=int(self.source[index]),
            key=sample.key,
            draw=np.random.default_rng([self.seed, epoch, int(index)]),
        )


def shuffled(label: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
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


Collate = Callable[[list[Clip]], dict[str, Any]]


class _Steps:
    """A map-style dataset whose items are whole steps, so that workers follow the plan without a queue of indices."""

    def __init__(self, clips: Clips, plan: Plan, micro: int, rank: int, world_size: int, collate: Collate) -> None:
        self.clips, self.plan, self.micro, self.collate = clips, plan, micro, collate
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> list[dict[str, Any]]:
        epoch = step // self.plan.steps_per_epoch
        indices = self.plan.step(step, self.rank, self.world_size)
        clips = [self.clips.get(i, epoch) for i in indices]
        return [self.collate(clips[i : i + self.micro]) for i in range(0, len(clips), self.micro)]


def training_steps(
    clips: Clips, plan: Plan, span: range, micro: int, rank: int, world_size: int, collate: Collate, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of each of this rank's steps in `span`."""
    return _loaded(_Steps(clips, plan, micro, rank, world_size, collate), span, workers)


class _Batches:
    """A map-style dataset of (indices, collated batch) over fixed indices."""

    def __init__(self, clips: Clips, indices: NDArray[np.int64], batch: int, collate: Collate) -> None:
        self.clips, self.indices, self.batch, self.collate = clips, indices, batch, collate

    def __getitem__(self, number: int) -> tuple[NDArray[np.int64], dict[str, Any]]:
        indices = self.indices[number * self.batch :][: self.batch]
        return indices, self.collate([self.clips.get(i, 0) for i in indices])


def one_pass(
    clips: Clips, batch: int, rank: int, world_size: int, collate: Collate, workers: int
) -> tuple[int, Iterator[tuple[NDArray[np.int64], dict[str, Any]]]]:
    """How many batches, and the (indices, batch) of this rank's share of the whole set.

    Every rank has equally many batches, for a ZeRO-3 forward is collective: the set is filled up with repeats from its
    start, which the caller drops by their indices.
    """
    rounds = -(-len(clips) // (batch * world_size))
    filled = np.resize(np.arange(len(clips)), rounds * batch * world_size)
    return rounds, _loaded(_Batches(clips, filled[rank::world_size], batch, collate), range(rounds), workers)


def _loaded(dataset: Any, order: range, workers: int) -> Iterator[Any]:
    """The items of `dataset` in `order`, made ahead by `workers` processes. Raises a worker's `UserError` as it was."""
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Guarded(dataset),  # type: ignore[arg-type]
        sampler=order,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread if workers else None,
        # Its own generator: a loader takes its workers' seed from the global one, and a resumed training, which makes
        # a new loader, would then draw other dropout than one that went on.
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


class _Guarded:
    """Hands a `UserError` over as an item: raised in a worker, torch would wrap it in that worker's traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except UserError as error:
            return error


def _as_is(item: Any) -> Any:
    return item


def _one_thread(worker: int) -> None:
    import torch

    torch.set_num_threads(1)


def pad_mels(clips: list[Clip]) -> dict[str, Any]:
    """Stack log-mels padded with zeros to the longest: {"mel": (B, n_mels, F), "lengths": (B,)} tensors."""
    import torch

    lengths = [clip.mel.shape[1] for clip in clips]
    mel = torch.zeros(len(clips), clips[0].mel.shape[0], max(lengths))
    for row, clip in enumerate(clips):
        mel[row, :, : lengths[row]] = torch.from_numpy(clip.mel)
    return {"mel": mel, "lengths": torch.tensor(lengths)}
