"""What a frozen encoder makes of the clips, computed once by all ranks together, and read by the data workers."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist.config.model_keys import CacheConfig
from mser_dist.encoded.place import Node, address_of, bytes_of, choose
from mser_dist.encoded.store import FeatureStore, Located
from mser_dist.errors import UserError
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.progress import bar
from mser_dist.ranks import distributed
from mser_dist.stream.examples import Examples, pad_speech
from mser_dist.stream.loader import BadClips, Request, answers
from mser_dist.tables import count

STOPPED = "while it encoded the clips; the same command goes on with those that are missing"
BATCH = 8  # clips a round: between two, the ranks ask each other whether to stop


class Encoded:
    """The features of the clips of an `Examples`, for its data workers to read. What a clip has none of is a KeyError.

    located: one for each variant of the clips.
    """

    def __init__(self, store: FeatureStore, located: Sequence[Located]) -> None:
        self._store, self._located = store, located

    def read(self, index: int, variant: int = 0) -> torch.Tensor:
        """Features (T, L, D) of a clip."""
        return self._store.read(self._located[variant].place(index))

    def silence(self) -> torch.Tensor:
        """(1, L, D) in place of a clip that could not be read."""
        return torch.zeros(1, self._store.layers, self._store.width, dtype=self._store.dtype)


class Job(NamedTuple):
    """A clip to encode."""

    variant: int
    clip: int  # its number in the set
    key: int


class Outlook(NamedTuple):
    """What there is to encode of some clips, and what is kept already."""

    store: FeatureStore
    keys: list[NDArray[np.uint64]]  # (k,) of each variant
    located: list[Located]  # (k,) of each variant
    jobs: list[Job]  # what is missing, each recording once; like lengths together
    need: int  # bytes of all the features, about

    @property
    def recordings(self) -> int:
        """Different ones among the clips and their variants."""
        return len(np.unique(np.concatenate(self.keys)))

    def share(self, part: tuple[int, int]) -> list[Job]:
        """What one part of several encodes: by the clips' keys, so whatever the others have done meanwhile."""
        number, parts = part
        return [job for job in self.jobs if job.key % parts == number]


def in_bytes(size: int) -> str:
    """A size for a person."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def encode_once(
    clips: Examples,
    frozen: FrozenEncoder,
    cache: CacheConfig,
    world: distributed.World,
    *,
    workers: int = 0,
    wanted: NDArray[np.int64] | None = None,
    part: tuple[int, int] = (0, 1),
    go_on: Callable[[], object] = lambda: None,
    title: str = "encode",
) -> str:
    """Give `clips` the features that `frozen` makes of them, and say in a line where they are.

    Collective: every clip that has none yet is encoded by one rank. What one job encodes, all later ones find. The
    encoder computes where it is and in its dtype.

    wanted: (k,) numbers of the clips that will be read; None: all. part: (i, n), of n jobs that share the work this is
    number i, from 0: it encodes its part of what is missing and gives `clips` nothing. go_on: asked between two rounds
    on every rank; it raises to stop, on all of them.

    Raises `UserError`, on every rank, for more unreadable clips than allowed, a disk that is full, or a cache that is
    asked for and cannot hold the features. With cache=auto that has no features, the line says why.
    """
    if cache.cache == "off":
        return "features: encoded anew at each step (encoder.cache=off)"
    if clips.augment and not clips.augment.variants:
        if cache.cache != "auto":
            raise UserError(
                f"encoder.cache={cache.cache} keeps features of clips that data.augment changes anew at each step: set "
                "data.augment.variants, so many versions of each clip"
            )
        return (
            "features: encoded anew at each step, as data.augment changes the clips (data.augment.variants bounds it)"
        )
    index = np.arange(len(clips)) if wanted is None else wanted
    address = address_of(frozen, clips)
    need = bytes_of(clips, frozen, index) * _variants(clips)
    root, node, why_not = choose(cache, address, need, world)
    if root is None:
        if cache.cache != "auto":
            raise UserError(why_not)
        return f"features: encoded anew at each step ({why_not})"
    found = outlook(clips, frozen, root, node, index)
    store, located, jobs = found.store, found.located, found.share(part)
    if jobs:
        _encode(store, clips, frozen, jobs, node, world, workers, go_on, title)
    if part != (0, 1):
        return f"features: part {part[0]} of {part[1]}, {count(len(jobs), 'clip')} encoded in {store.folder}"
    if jobs:
        located = _locate(store, found.keys, node)
    clips.encoded = Encoded(store, [_spread(own, index, len(clips)) for own in located])
    size = f"{count(len(index) * _variants(clips), 'clip')}, {in_bytes(need)}"
    return f"features: {size} in {store.folder} ({found.recordings - len(jobs)} were there)"


def outlook(
    clips: Examples, frozen: FrozenEncoder, root: Path, node: Node, index: NDArray[np.int64] | None = None
) -> Outlook:
    """What there is to encode of the clips `index` (k,), None: of all, for features in the folder `root`.

    Collective. Changes nothing.
    """
    index = np.arange(len(clips)) if index is None else index
    encoder = frozen.encoder
    store = FeatureStore(root, address_of(frozen, clips), len(encoder.layers), encoder.width, frozen.dtype)
    keys = [clips.keys(variant)[index] for variant in range(_variants(clips))]
    located = _locate(store, keys, node)
    jobs = {  # each recording once
        int(key): Job(variant, int(i), int(key))
        for variant, (there, own) in enumerate(zip(located, keys, strict=True))
        for i, key in zip(index[there.missing], own[there.missing], strict=True)
    }
    # Like lengths together, and the ranks' shares alike.
    order = sorted(jobs.values(), key=lambda job: (-clips.shards.duration[job.clip], job.clip))
    return Outlook(store, keys, located, order, bytes_of(clips, frozen, index) * _variants(clips))


def _variants(clips: Examples) -> int:
    return clips.augment.variants if clips.augment else 1


def _locate(store: FeatureStore, keys: list[NDArray[np.uint64]], node: Node) -> list[Located]:
    """Where the features of each variant's clips are. Collective: on a shared disk rank 0 alone looks."""
    if not node.all_ranks:
        return [store.locate(own) for own in keys]
    found = [store.locate(own) for own in keys] if node.rank == 0 else None
    located: list[Located] = distributed.agree(found)
    return located


def _spread(located: Located, index: NDArray[np.int64], size: int) -> Located:
    """What is located of the clips `index` as what is located of all `size` clips of a set."""

    def whole(values: NDArray[Any], fill: int) -> NDArray[Any]:
        spread = np.full(size, fill, values.dtype)
        spread[index] = values
        return spread

    file, at, frames, crc = located.file, located.at, located.frames, located.crc
    return Located(located.files, whole(file, -1), whole(at, 0), whole(frames, 0), whole(crc, 0))


def _encode(
    store: FeatureStore,
    clips: Examples,
    frozen: FrozenEncoder,
    jobs: list[Job],
    node: Node,
    world: distributed.World,
    workers: int,
    go_on: Callable[[], object],
    title: str,
) -> None:
    """Encode this rank's share of the jobs, in rounds that all ranks do together. Collective."""
    rounds = distributed.most([-(-len(jobs[:: node.size]) // BATCH)])[0]
    mine = jobs[node.rank :: node.size]
    batches = [mine[i * BATCH : (i + 1) * BATCH] for i in range(rounds)]
    bad = BadClips(clips.max_bad, clips.shards.where, tell=False)  # it is told when a step asks for it
    problem: str | None = None
    with (
        bar(title=title, unit="clip", total=len(jobs), disable=not world.is_main, leave=False) as shown,
        store.writer() as writer,
        closing(_encoded(clips, frozen, [batch for batch in batches if batch], workers, bad)) as made,
    ):
        try:
            for number, batch in enumerate([*batches, None]):
                try:
                    if batch is None:
                        writer.publish()
                    for key, features in next(made) if batch else ():
                        writer.add(key, features)
                except UserError as error:
                    problem = str(error)
                if distributed.most([int(problem is not None)])[0]:
                    break
                go_on()
                shown.update(min((number + 1) * BATCH * node.size, len(jobs)) - shown.n)
            if found := next((said for said in distributed.gather(problem) if said), None):
                raise UserError(found)
        except BaseException:
            with suppress(UserError):  # of a full disk it is said already
                writer.publish()  # so that what is encoded is not lost, whatever has happened, here or to a peer
            raise


def _encoded(
    clips: Examples, frozen: FrozenEncoder, batches: list[list[Job]], workers: int, bad: BadClips
) -> Generator[list[tuple[int, torch.Tensor]], None, None]:
    """(key, features) of each clip of a batch that can be read."""
    decoder = clips.decoder(pad_speech)
    decoder.encoded, decoder.or_silence = None, True
    requests = (
        Request(0, 0, [[clips.requests(np.array([job.clip]), job.variant)[0] for job in batch]]) for batch in batches
    )
    for batch, answer in zip(batches, answers(decoder, requests, workers, bad), strict=True):
        [inputs] = answer.batches
        made = frozen(inputs["speech"], inputs["lengths"])
        yield [(job.key, own) for job, own in zip(batch, made, strict=True) if job.clip not in answer.bad]
