"""`mser translate`: every recording of a set into other languages, by many processes, gone on with after a stop."""

import atexit
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from mser_dist import files
from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.corpora.encode import follow_parent
from mser_dist.errors import Stopped, UserError
from mser_dist.progress import bar
from mser_dist.ranks import distributed, preempt
from mser_dist.shards import index as shard_index
from mser_dist.shards.writer import DATASET_FILE
from mser_dist.translation import backends, made, plan
from mser_dist.translation.making import Maker, one_thread
from mser_dist.translation.seal import seal
from mser_dist.translation.selection import Outcomes
from mser_dist.translation.sources import Block, Recordings

STOPPED = "while it translated; the same command goes on with the clips that are missing"


class Share(NamedTuple):
    """The blocks of a job that one process, with its workers, makes: number `part` of `parts`, from 0."""

    part: int = 0
    parts: int = 1

    def of(self, blocks: list[Block]) -> list[Block]:
        return blocks[self.part :: self.parts]


def share_of(part: tuple[int, int]) -> Share:
    """This rank's share where a job of several ranks does part (i, n) of the work."""
    world = distributed.discover()
    return Share(part[0] * world.world_size + world.rank, part[1] * world.world_size)


def translate(
    path: str,
    out: Path,
    config: TranslateConfig,
    *,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    merge: bool = False,
    keep_made: bool = False,
    overwrite: bool = False,
) -> Outcomes | None:
    """Make the set `out` of the recordings in the set at `path`, as `config` says.

    What is made lies in `<out>.made`, a file for each few recordings, until the set is whole: a call that was stopped
    goes on from there, and where it was kept another selection makes nothing anew. Parts write into the same folder;
    the one that finds all of it there seals the set.

    Args:
        workers: processes, each of which loads the backends.
        part: (i, n): number i of n calls that share the work, from 0; the ranks of a job share its part.
        merge: make nothing; seal what is there.
        keep_made: leave `<out>.made` where it is, to select anew.
        overwrite: replace a set that is there.

    Returns what became of each clip; None where other parts are still at work.

    Raises `UserError` for a mistake in the set, the config or a backend; `Stopped` after a signal.
    """
    if Path(path).exists() and (Path(path).resolve() == out.resolve() or out.resolve() in Path(path).resolve().parents):
        raise UserError(f"{out} is the set that is translated, or holds it: name another folder")
    recordings = Recordings(path, config)
    blocks = recordings.blocks()
    recipe = files.digest([[block.recipe for block in blocks], asdict(config.selection), config.shard_clips])
    folder = out.absolute().with_name(f"{out.absolute().name}.made")
    if _is_there(out, recipe):
        if not keep_made:
            shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed behind its last line
        return None
    if out.exists() and not overwrite and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out}: already exists and was made in another way; choose another, or --overwrite it")
    folder.mkdir(parents=True, exist_ok=True)
    share = share_of(part)
    mine = share.of(blocks)
    missing = [block for block in mine if not _is_made(folder, block)]
    print(plan.outlook(recordings, blocks, mine, missing), flush=True)
    if merge and missing:
        raise UserError(f"{folder}: {len(missing)} of {len(blocks)} blocks are missing: run the parts first")
    if missing:
        _make(path, config, folder, missing, recordings, workers)
    if _is_there(out, recipe):  # the last other part was faster
        return None
    if lacking := [block for block in blocks if not _is_made(folder, block)]:
        print(f"part {share.part} of {share.parts} is done; other parts have {len(lacking)} blocks to make", flush=True)
        return None
    lock = files.lock_file(folder / ".seal")
    if lock is None:
        print("another part writes the set", flush=True)
        return None
    try:
        if _is_there(out, recipe):
            return None
        outcomes = seal(out, folder, recordings, blocks, recipe, overwrite=overwrite)
    finally:
        files.unlock_file(lock)
    if not keep_made:
        shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def _is_there(out: Path, recipe: str) -> bool:
    """Whether the set is whole, as this config makes it."""
    file = out / DATASET_FILE
    there = file.is_file() and shard_index.read_facts(file).get("made_by", {}).get("recipe") == recipe
    if there:
        print(f"{out}: is whole", flush=True)
    return there


def _is_made(folder: Path, block: Block) -> bool:
    return made.read(folder / f"{block.name}.tar", block.recipe) is not None


def _make(
    path: str, config: TranslateConfig, folder: Path, blocks: list[Block], recordings: Recordings, workers: int
) -> None:
    total = recordings.pairs([i for block in blocks for i in block.clips])
    with preempt.listen() as flag, bar(title="translate", unit="clip", total=total) as shown:

        def go_on() -> None:
            if flag.number:
                raise Stopped(signal.Signals(flag.number).name, None, STOPPED)

        if workers == 1:
            with one_thread(), closing(_Worker(path, config, folder, recordings)) as worker:
                for block in blocks:
                    worker.make(block, shown.update, go_on)
            return
        for block in _by_processes(path, config, folder, blocks, min(workers, len(blocks)), go_on):
            shown.update(recordings.pairs(block.clips))


class _Worker:
    """The backends of one process, and the files that it writes."""

    def __init__(self, path: str, config: TranslateConfig, folder: Path, recordings: Recordings | None = None) -> None:
        self._recordings = recordings or Recordings(path, config)
        self._backends = backends.build(config, self._recordings, folder)
        self._maker = Maker(self._recordings, self._backends)
        self._folder = folder

    def make(self, block: Block, done: Callable[[], object], go_on: Callable[[], object]) -> None:
        def each() -> Iterator[made.Made]:
            for clip in block.clips:
                go_on()
                for one in self._maker.of(clip):
                    yield one
                    done()

        made.write(self._folder / f"{block.name}.tar", block.recipe, each())

    def close(self) -> None:
        """End what a backend has started."""
        for part in self._backends:
            if close := getattr(part, "close", None):
                close()


# ---- in processes of their own

_worker: _Worker | None = None
_stop: Any = None


def _begin(stop: Any) -> None:
    global _stop
    _stop = stop
    follow_parent()
    for number in preempt.SIGNALS:  # SLURM sends them to every process of a task: they are the first one's to handle
        signal.signal(number, signal.SIG_IGN)


def _make_block(path: str, config: TranslateConfig, folder: Path, block: Block) -> Block | str:
    """The block, or a mistake in a line; the first call loads the backends."""
    global _worker
    try:
        if _worker is None:
            from mser_dist.quiet import hush

            hush()
            import torch

            torch.set_num_threads(1)
            _worker = _Worker(path, config, folder)
            atexit.register(_worker.close)
        _worker.make(block, lambda: None, _go_on)
    except (UserError, Stopped) as error:
        return str(error)
    return block


def _go_on() -> None:
    if _stop.is_set():
        raise Stopped("stop", None)


def _by_processes(
    path: str, config: TranslateConfig, folder: Path, blocks: list[Block], workers: int, go_on: Callable[[], object]
) -> Iterator[Block]:
    context = get_context("spawn")  # a fork of a process that runs threads (torch) can deadlock
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(stop,))
    try:
        under_way: set[Future[Block | str]] = {pool.submit(_make_block, path, config, folder, b) for b in blocks}
        while under_way:
            done, under_way = wait(under_way, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                found = future.result()
                if isinstance(found, str):
                    raise UserError(found)
                yield found
            go_on()
    except BrokenProcessPool:
        raise UserError("a process died (out of memory?); free memory, and the same command continues") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
