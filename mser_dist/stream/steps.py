"""Examples in the order of a plan, shared out over the ranks, decoded by workers, resumable at any step.

What a checkpoint holds of the stream is a position (epoch, batch) and what it counts in (`identity`). The order itself
is a function of these (`plan`), so a resume costs the same at the end of an epoch as at its start.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.shards.reader import MAX_OPEN
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.balance import Balance, fields_of
from mser_dist.stream.examples import Examples
from mser_dist.stream.loader import Answer, BadClips, ClipRequest, Collate, Request, answers
from mser_dist.stream.plan import Plan, Position

ORDER_VERSION = {"shuffle": 1, "bucket": 1, "tokens": 2}  # of the order as a function of seed, epoch and step
TOKEN = 0.02  # seconds a token: one step of a Whisper-type encoder
SORTED_BATCHES = 128  # of `one_pass`, whose clips are sorted by length together
WINDOW_SHARDS = MAX_OPEN // 2  # shuffled together where a set has more than a reader holds open, or is remote
FETCH_AHEAD = 8  # steps whose remote shards are fetched before a worker asks for them


def plan_of(
    shards: ShardSet,
    data: cfg.TrainingDataConfig,
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
    window = window_of(shards, data, free=parallel == 1 and balance is None)
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
        # Counted over the shards that have clips: between them lie those of other splits and of what was left out.
        shards=np.unique(shards.shard, return_inverse=True)[1].astype(np.int32) if window else None,
        shuffle_shards=window,
        automatic=bool(window) and data.shuffle_shards is None,
    )
    plan.epoch(0)  # what cannot be planned is said now
    return plan


def window_of(shards: ShardSet, data: cfg.TrainingDataConfig, free: bool) -> int:
    """Shards that are shuffled at a time; 0: all. free: no balance and no parallel clips decide the order.

    A shuffle of a whole set of many shards opens one for nearly every clip, and of a remote set fetches all before the
    first epoch is far; two windows' shards are held open together. Raises `UserError` where a remote set does not fit
    the cache, and is to be shuffled as a whole.
    """
    remote = sum(shard.bytes for shard in shards.shards if shard.is_remote)
    too_large = remote > data.cache_gb * 1e9
    fit = max(1, int(len(shards.shards) * data.cache_gb * 1e9 / remote / 2)) if remote else len(shards.shards)
    free = free and not data.weights and data.batching != "bucket"
    used = len(np.unique(shards.shard))
    window = data.shuffle_shards
    if window is None:
        large = too_large or used > (WINDOW_SHARDS if remote else MAX_OPEN)
        window = min(WINDOW_SHARDS, fit) if large and free else 0
    if too_large and not window:
        raise UserError(
            f"the remote sets hold {remote / 1e9:.1f} GB and the cache {data.cache_gb:g} GB: a shuffle over all of it "
            f"would fetch a shard for nearly every clip. Set data.shuffle_shards={fit}, or raise data.cache_gb"
        )
    return window


def _balance(
    shards: ShardSet,
    data: cfg.TrainingDataConfig,
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


def identity(examples: Examples, plan: Plan) -> dict[str, Any]:
    """What a position counts in, as JSON: it means nothing in another set, or in another order of the same."""
    found = {
        "version": ORDER_VERSION[plan.batching],
        "clips": len(examples),
        "fingerprint": examples.shards.fingerprint(),
        "seed": plan.seed,
        "global_batch": plan.global_batch,
    }
    if plan.shards is not None and not plan.automatic and int(plan.shards.max()) != int(examples.shards.shard.max()):
        found["windows"] = "of shards that have clips"  # 0.2.0 counted the others too
    return found | {"shuffle_shards": plan.shuffle_shards, "automatic": plan.automatic}


def check_identity(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `UserError` where a checkpoint's position is one of other data, or of another order."""
    for name, value in now.items():
        if name == "automatic":  # who chose the window: only what it is matters
            continue
        if name == "shuffle_shards" and name not in saved and not now["automatic"]:
            continue  # older checkpoints do not have it, whose config does
        if saved.get(name) != value:
            if name == "shuffle_shards" and name not in saved:
                raise UserError(
                    "the checkpoint was written when all shards of this set were shuffled together: set "
                    "data.shuffle_shards=0 to go on in that order, or train anew with another out="
                )
            what = {
                "fingerprint": "the data set has changed since",
                "clips": "the data set has changed since",
                "frozen_encoder": "the frozen encoder is another one",
                "shuffle_shards": f"set data.shuffle_shards={saved.get(name)}",
                "windows": "another version of mser_dist put the clips in another order",
                "version": "another version of mser_dist put the clips in another order",
            }
            raise UserError(
                f"the checkpoint's data.{name} is {saved.get(name)}, and now it is {value}: "
                f"{what.get(name, 'it is of another configuration')}; restore it, or train anew with another out="
            )


class Step(NamedTuple):
    """A rank's part of a step."""

    batches: list[dict[str, Any]]  # micro-batches
    clips: int  # of all ranks
    after: Position  # of the next step
    bad: frozenset[int]  # clips that could not be read so far, by this rank or before the resume


def training_steps(
    clips: Examples,
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


def batch_count(clips: Examples, batch: int) -> int:
    """The batches of a pass over the whole set."""
    return -(-len(clips) // batch)


def one_pass(
    clips: Examples,
    batch: int,
    rank: int,
    world_size: int,
    collate: Collate,
    workers: int,
    done: Collection[int] = (),
) -> tuple[int, Iterator[tuple[int | None, NDArray[np.int64], dict[str, Any]]]]:
    """How many rounds, and the (number, clips, batch) of this rank's share of a pass over the set; -1: no clip.

    The batches are the same on however many ranks, and so is what a model makes of them to the last bit; those `done`
    are left out. Every rank has equally many, for a ZeRO-3 forward is collective: one that only keeps step has no
    number. The last batch is filled up with repeats, marked by -1 as is a clip that could not be read (`max_bad`).
    Neighbours are sorted by length, for little padding.
    """
    window = np.arange(len(clips)) // (SORTED_BATCHES * batch)
    order = np.lexsort((-clips.shards.duration, window))
    count = batch_count(clips, batch)
    full = np.resize(order, count * batch).reshape(count, batch)
    is_clip = (np.arange(count * batch) < len(order)).reshape(count, batch)
    numbers = np.setdiff1d(np.arange(count), list(done))
    rounds = -(-len(numbers) // world_size)
    mine: list[int | None] = numbers[rank::world_size].tolist()
    mine += [None] * (rounds - len(mine))

    def batches() -> Iterator[tuple[int | None, NDArray[np.int64], dict[str, Any]]]:
        bad = BadClips(clips.max_bad, clips.shards.where)
        requests = (Request(0, 0, [clips.requests(full[number or 0])]) for number in mine)
        decoder = clips.decoder(collate)
        decoder.or_silence = True
        answered: Iterator[Answer] = answers(decoder, requests, workers, bad)
        for number, answer in zip(mine, answered, strict=True):
            real = np.zeros(batch, dtype=bool) if number is None else is_clip[number]
            indices = full[number or 0]
            yield number, np.where(real & ~np.isin(indices, list(answer.bad)), indices, -1), answer.batches[0]

    return rounds, batches()
