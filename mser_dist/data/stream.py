"""Clips in the order of a plan: opened, shared out over the ranks, decoded by workers, resumable at any step.

What a checkpoint holds of the stream is a small JSON object, `state`: {"version", "epoch", "batch": the next step's
position, "seed", "global_batch", "clips", "fingerprint": of the set (`ShardSet.fingerprint`), "bad": clips that
could not be read}. The order itself is a
function of these (`plan`), so a resume costs the same at the end of an epoch as at its start.
"""

import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.data.balance import Balance, fields_of
from mser_dist.data.features import Features
from mser_dist.data.loader import Answer, BadClips, Clip, ClipRequest, Collate, Decoder, Request, answers
from mser_dist.data.plan import Plan, Position
from mser_dist.data.remote import RemoteCache
from mser_dist.data.shards import ShardSet
from mser_dist.errors import UserError

STATE_VERSION = 1
TOKEN = 0.02  # seconds a token: one step of a Whisper-type encoder
SORTED_ROUNDS = 32  # rounds of `one_pass` whose clips are sorted by length together
FETCH_AHEAD = 8  # steps whose remote shards are fetched before a worker asks for them


def open_training_clips(data: cfg.TrainingClips) -> ShardSet:
    """The clips to train on: `open_clips`, and every label must occur, for one that does not is most likely a typo."""
    shards = open_clips(data, data.split)
    absent = [label for label in data.labels if label not in shards.coded["label"].names]
    if absent:
        everything = ShardSet.open(data.sets, split=data.split, cache=_cache(data))
        there = [str(label) for label in everything.coded["label"].names if label]
        if absent[0] in there:
            raise UserError(
                f"data.labels names {absent[0]!r}, and the filters leave no clip of it: drop it from data.labels"
            )
        near = difflib.get_close_matches(absent[0], there, 1)
        hint = f"did you mean {near[0]}?" if near else f"labels there: {', '.join(there)}"
        raise UserError(f"data.labels names {absent[0]!r}, and no clip of the split {data.split!r} has it: {hint}")
    remote = sum(shard.bytes for shard in shards.shards if shard.is_remote) / 1e9
    if remote > data.cache_gb and not data.shuffle_shards:
        fit = max(1, int(len(shards.shards) * data.cache_gb / remote / 2))
        raise UserError(
            f"the remote sets hold {remote:.1f} GB and the cache {data.cache_gb:g} GB: a shuffle over all of it would "
            f"fetch a shard for nearly every clip. Set data.shuffle_shards={fit}, or raise data.cache_gb"
        )
    return shards


def open_clips(data: cfg.Clips, split: str) -> ShardSet:
    """The clips of a split that a config wants. Raises `UserError` if none is left, or one is too long."""
    keep = {**({"language": data.languages} if data.languages else {}), **data.keep}
    shards = ShardSet.open(data.sets, split=split, labels=data.labels, keep=keep, drop=data.drop, cache=_cache(data))
    long = (shards.duration > data.max_seconds).nonzero()[0]
    if len(long):
        raise UserError(
            f"{shards.where(int(long[0]))} lasts {shards.duration[long[0]]:.1f} s, more than "
            f"data.max_seconds={data.max_seconds:g}, as do {len(long) - 1} others: leave them out by "
            f"data.keep={{duration: [0, {data.max_seconds:g}]}}, or cut them when packing (Whisper takes 30 s at most)"
        )
    return shards


def _cache(data: cfg.Clips) -> RemoteCache:
    return RemoteCache(data.cache_dir, data.cache_gb * 1e9)


class Clips:
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
        augment: cfg.Augment | None = None,
        max_bad: int = 0,
    ) -> None:
        self.shards = shards
        self.features = features
        self.max_seconds = max_seconds
        self.seed = seed
        self.augment = augment if augment and augment.on else None
        self.max_bad = max_bad
        column = shards.coded["label"]
        self.label = np.array([labels.index(name) for name in column.names], dtype=np.int16)[column.codes]  # (n,)
        if shuffle_labels:
            self.label = shuffled(self.label, np.random.default_rng([seed, 7]))

    def __len__(self) -> int:
        return len(self.label)

    def get(self, index: int, epoch: int) -> Clip:
        """One clip, decoded here and now."""
        try:
            return self.decoder(_no_collate).clip(self.requests(np.array([index]))[0], epoch, 0)
        except UserError as error:
            raise UserError(f"{self.shards.where(index)}: {error}") from None

    def requests(self, indices: NDArray[Any]) -> list[ClipRequest]:
        return [
            ClipRequest(ref, int(self.label[ref.sample]), int(self.shards.source[ref.sample]))
            for ref in self.shards.refs(indices)
        ]

    def decoder(self, collate: Collate) -> Decoder:
        return Decoder(self.shards.reader, self.features, self.seed, self.max_seconds, self.augment, collate)


def _no_collate(clips: list[Clip]) -> dict[str, Any]:
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


def plan_of(
    shards: ShardSet,
    data: cfg.TrainingClips,
    global_batch: int,
    parallel: int = 1,
    seed: int = 0,
    pad_seconds: float | None = None,
    wish: Sequence[str] = (),
) -> Plan:
    """The plan that a config asks for. Raises `UserError` for a batch or a pack that cannot be filled.

    parallel: clips of one source utterance that stay together. pad_seconds: what the encoder pads clips to. wish: the
    fields to balance where the config leaves it open (data.balance=null) and the set can fill such batches.
    """
    slowest = 1 / (1 - data.augment.speed)  # augmentation may lengthen a clip
    length = np.maximum(np.minimum(shards.duration * slowest, data.max_seconds), pad_seconds or 0.0)
    groups = shards.source if parallel > 1 else None
    balance = _balance(shards, data, global_batch, groups, parallel, wish)
    plan = Plan(
        len(shards),
        global_batch,
        seed,
        duration=shards.duration,
        groups=groups,
        together=parallel,
        balance=balance,
        parts=shards.coded["set"].values().astype(np.uint8) if data.weights else None,
        weights=data.weights,
        batching=data.batching,
        bucket=data.bucket,
        tokens=np.ceil(length / TOKEN).astype(np.uint32) if data.batching == "tokens" else None,
        budget=data.tokens,
        shards=shards.shard if data.shuffle_shards else None,
        shuffle_shards=data.shuffle_shards,
    )
    plan.epoch(0)  # what cannot be planned is said now
    return plan


def _balance(
    shards: ShardSet,
    data: cfg.TrainingClips,
    global_batch: int,
    groups: NDArray[Any] | None,
    parallel: int,
    wish: Sequence[str],
) -> Balance | None:
    """What the config says; else as many of the wished fields, from the first on, as the set can fill batches of."""
    if data.balance is not None:
        return Balance(fields_of(data.balance, shards.coded), global_batch, groups, parallel) if data.balance else None
    if data.weights or data.shuffle_shards or data.batching != "shuffle":
        return None  # which decide the batches themselves
    for count in range(len(wish), 0, -1):
        try:
            return Balance(fields_of(wish[:count], shards.coded), global_batch, groups, parallel)
        except UserError:
            continue
    return None


def state_of(clips: Clips, plan: Plan, position: Position, bad: Iterable[int] = ()) -> dict[str, Any]:
    """What a checkpoint holds of the stream; `position` is that of the next step, `bad` what could not be read."""
    return {"version": STATE_VERSION, **position._asdict(), **_identity(clips, plan), "bad": sorted(bad)}


def position_in(state: dict[str, Any], clips: Clips, plan: Plan) -> Position:
    """Where to go on. Raises `UserError` where the checkpoint is of other data, in which the position means nothing."""
    for name, now in {"version": STATE_VERSION, **_identity(clips, plan)}.items():
        if state.get(name) != now:
            what = {"fingerprint": "the data set has changed since", "clips": "the data set has changed since"}
            raise UserError(
                f"the checkpoint's data.{name} is {state.get(name)}, and now it is {now}: "
                f"{what.get(name, 'it is of another configuration')}; restore it, or train anew with another out="
            )
    return Position(state["epoch"], state["batch"])


def _identity(clips: Clips, plan: Plan) -> dict[str, Any]:
    return {
        "clips": len(clips),
        "fingerprint": clips.shards.fingerprint(),
        "seed": plan.seed,
        "global_batch": plan.global_batch,
    }


class Step(NamedTuple):
    """A rank's part of a step."""

    batches: list[dict[str, Any]]  # micro-batches
    clips: int  # of all ranks
    after: Position  # of the next step
    bad: frozenset[int]  # clips that could not be read so far, by this rank or before the resume


def training_steps(
    clips: Clips,
    plan: Plan,
    start: Position,
    count: int,
    micro: int | None,
    rank: int,
    world_size: int,
    collate: Collate,
    workers: int,
    known_bad: Iterable[int] = (),
) -> Iterator[Step]:
    """This rank's part of the next `count` steps. known_bad: clips not to be tried again."""

    drawn: deque[tuple[int, Position]] = deque()  # of the steps that are under way

    def requests() -> Iterator[Request]:
        for position in plan.walk(start, count):
            share = plan.share(position, rank, world_size, micro)
            request = Request(*position, [clips.requests(indices) for indices in share])
            _fetch_ahead(clips.shards, request.batches)
            drawn.append((len(plan.batch(position)), plan.after(position)))
            yield request

    bad = BadClips(clips.max_bad, clips.shards.where, known_bad)
    decoder = clips.decoder(collate)
    decoder.skip = frozenset(bad.found)
    for answer in answers(decoder, _looking_ahead(requests(), clips.shards), workers, bad):
        size, after = drawn.popleft()
        yield Step(answer.batches, size, after, frozenset(bad.found))


def _looking_ahead(requests: Iterator[Request], shards: ShardSet) -> Iterator[Request]:
    """The same requests; those of remote shards are drawn early, so that their shards are fetched in the background."""
    if not any(shard.is_remote for shard in shards.shards):
        yield from requests
        return
    drawn: list[Request] = []
    for request in requests:
        drawn.append(request)
        if len(drawn) > FETCH_AHEAD:
            yield drawn.pop(0)
    yield from drawn


def _fetch_ahead(shards: ShardSet, batches: list[list[ClipRequest]]) -> None:
    for number in sorted({clip.ref.shard for batch in batches for clip in batch}):
        shard = shards.shards[number]
        if shard.is_remote:
            assert shards.reader.cache is not None
            shards.reader.cache.ahead(shard.name, shard.sha256, shard.bytes, shard.own_hash)


def one_pass(
    clips: Clips, batch: int, rank: int, world_size: int, collate: Collate, workers: int
) -> tuple[int, Iterator[tuple[NDArray[np.int64], dict[str, Any]]]]:
    """How many batches, and the (indices, batch) of this rank's share of the whole set; -1 marks what is no clip.

    Every rank has equally many batches, for a ZeRO-3 forward is collective: the set is filled up with repeats, marked
    by -1 as is a clip that could not be read (`max_bad`). Neighbours are sorted by length, for little padding.
    """
    together = batch * world_size
    rounds = -(-len(clips) // together)
    window = np.arange(len(clips)) // (SORTED_ROUNDS * together)
    order = np.lexsort((-clips.shards.duration, window))
    mine = np.resize(order, rounds * together).reshape(rounds, world_size, batch)[:, rank]
    is_clip = (np.arange(rounds * together) < len(order)).reshape(rounds, world_size, batch)[:, rank]

    def batches() -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
        bad = BadClips(clips.max_bad, clips.shards.where)
        requests = (Request(0, 0, [clips.requests(indices)]) for indices in mine)
        decoder = clips.decoder(collate)
        decoder.or_silence = True
        answered: Iterator[Answer] = answers(decoder, requests, workers, bad)
        for indices, real, answer in zip(mine, is_clip, answered, strict=True):
            yield np.where(real & ~np.isin(indices, list(answer.bad)), indices, -1), answer.batches[0]

    return rounds, batches()


def pad_speech(clips: list[Clip]) -> dict[str, Any]:
    """Stack features, zeros behind the shorter ones: {"speech": (B, n_mels, F) or (B, S), "lengths": (B,)} tensors.

    "index" is the list of the clips' numbers in the set.
    """
    import torch

    lengths = [clip.speech.shape[-1] for clip in clips]
    speech = torch.zeros(len(clips), *clips[0].speech.shape[:-1], max(lengths))
    for row, clip in enumerate(clips):
        speech[row, ..., : lengths[row]] = torch.from_numpy(clip.speech)
    return {"speech": speech, "lengths": torch.tensor(lengths), "index": [clip.index for clip in clips]}
