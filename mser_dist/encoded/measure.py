"""What a frozen encoder's features are on average: of a corpus or speaker, with their spread, and of each clip."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.normalize import OVERALL, Statistics, corpora_of, shrunk, speakers_of
from mser_dist.progress import bar
from mser_dist.ranks import distributed
from mser_dist.stream.examples import Examples, pad_speech
from mser_dist.stream.loader import BadClips, Request, answers

MOST = 2000  # clips of a group that are listened to: the mean of so many is known to 2 % of their spread
BATCH = 8


def statistics_of(
    clips: Examples,
    frozen: FrozenEncoder,
    mode: str,
    world: distributed.World,
    *,
    workers: int = 0,
    wanted: NDArray[np.int64] | None = None,
    parent: Statistics | None = None,
    go_on: Callable[[], object] = lambda: None,
) -> Statistics:
    """The statistics of `clips` by `mode` (as encoder.normalize), of at most `MOST` clips a group, drawn by a seed.

    Collective: each rank listens to its share. Clips are read as `encode_once` left them, else encoded; those that
    cannot be read are left out. parent: what groups of few clips are drawn to; None: the mean of these clips' own
    corpora. wanted, go_on: as of `encode_once`.
    """
    of = {"overall": lambda shards: ["all"] * len(shards), "corpus": corpora_of, "speaker": speakers_of}
    names = of[mode](clips.shards)
    groups = sorted(set(names))
    number = {name: i for i, name in enumerate(groups)}
    group = np.array([number[name] for name in names])
    index = np.arange(len(clips)) if wanted is None else wanted
    drawn = index[_some_of_each(group[index], np.random.default_rng(0))]
    mine = drawn[world.rank :: world.world_size]
    rounds = distributed.most([-(-len(drawn[:: world.world_size]) // BATCH)])[0]
    layers, width = len(frozen.encoder.layers), frozen.encoder.width
    counts = np.zeros(len(groups))
    sums = np.zeros((2, len(groups), layers, width))  # of clips' means, and means of squares
    work = _features(clips, frozen, mine, workers, len(clips))
    for _ in bar(range(rounds), title="statistics", unit="batch", total=rounds, disable=not world.is_main, leave=False):
        for clip, features in next(work, []):
            x = features.double()  # (T, L, D)
            counts[group[clip]] += 1
            sums[0, group[clip]] += x.mean(0).numpy()
            sums[1, group[clip]] += x.square().mean(0).numpy()
        go_on()
    everywhere = distributed.gather((counts, sums))
    counts, sums = sum(part[0] for part in everywhere), sum(part[1] for part in everywhere)
    there = np.flatnonzero(counts)
    mean, square = sums[:, there] / counts[there][:, None, None]
    return shrunk(mode, [groups[i] for i in there], counts[there].astype(np.int64), mean, square, parent)


def mean_pooled(
    clips: Examples,
    frozen: FrozenEncoder,
    *,
    workers: int = 0,
    go_on: Callable[[], object] = lambda: None,
    title: str = "mean",
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Every clip's mean over its frames: (n,) clip numbers in order and (n, L · D), the layers side by side.

    Clips are read as `encode_once` left them, else encoded; those that cannot be read are left out, and `UserError` for
    more of them than allowed. One process does it all.
    """
    numbers, means = [], []
    work = _features(clips, frozen, np.arange(len(clips)), workers, clips.max_bad)
    for batch in bar(work, title=title, unit="batch", total=-(-len(clips) // BATCH), leave=False):
        for number, features in batch:
            numbers.append(number)
            means.append(features.double().mean(0).flatten().float().numpy())
        go_on()
    if not means:
        raise UserError("no clip of the sets can be read: mser verify lists what is wrong")
    return np.array(numbers), np.stack(means)


def bind(clips: Examples, statistics: Statistics) -> None:
    """Let batches of `clips` say which group each clip is of."""
    clips.group = statistics.groups(clips.shards)


def describe(statistics: Statistics) -> str:
    """What features are normalised by, in a line."""
    corpora = {name: n for name, n in statistics.clips.items() if name != OVERALL and "/" not in name}
    speakers = sum("/" in name for name in statistics.clips)
    named = ", ".join(f"{name} ({n})" for name, n in list(corpora.items())[:8]) + (" …" if len(corpora) > 8 else "")
    also = f", {speakers} speakers" if speakers else ""
    return f"features are normalised by {statistics.mode}: {named} clips{also}"


def _some_of_each(group: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """(k,) clips, at most `MOST` of each group, in order."""
    order = random.permutation(len(group))
    order = order[np.argsort(group[order], kind="stable")]
    _, starts = np.unique(group[order], return_index=True)
    place = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return np.sort(order[place < MOST])


def _features(
    clips: Examples, frozen: FrozenEncoder, index: NDArray[np.int64], workers: int, max_bad: int
) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """(number, features (T, L, D) on the CPU) of each clip of `index` that can be read, `BATCH` clips at a time."""
    batches = [index[i : i + BATCH] for i in range(0, len(index), BATCH)]
    decoder = clips.decoder(pad_speech)
    decoder.or_silence = True
    if clips.augment and not clips.augment.variants:
        decoder.augment = None  # what changes anew each time has no statistics; of variants the first one is taken
    bad = BadClips(max_bad, clips.shards.where, tell=False)
    requests = (Request(0, 0, [clips.requests(batch, variant=0)]) for batch in batches)
    for batch, answer in zip(batches, answers(decoder, requests, workers, bad), strict=True):
        [inputs] = answer.batches
        speech, lengths = inputs["speech"], inputs["lengths"]
        made = (
            [x[:n] for x, n in zip(speech, lengths.tolist(), strict=True)] if clips.encoded else frozen(speech, lengths)
        )
        yield [(i, x.cpu()) for i, x in zip(batch.tolist(), made, strict=True) if i not in answer.bad]
