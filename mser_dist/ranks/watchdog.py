"""A dead, frozen or stuck rank ends the whole job in bounded time, and is named.

A collective waits for its peers: NCCL for ever, gloo until its time-out. So a thread of each rank tells rank 0 every
few seconds that the process lives and how far its main thread is. Rank 0 watches all; the others watch rank 0. Who
finds a rank silent, or stuck while the others wait for it, says so, and every rank ends with `LOST`.

A process that was stopped (SIGSTOP, a hung node) is silent; one whose main thread hangs beats on, but does not move.
A beat is a count, and who looks at it notes by its own monotonic clock when it changed: two nodes' clocks are never
compared, so that one that is off, or set while the job runs, names nobody.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mser_dist.ranks import distributed

LOST = 70  # exit code of a rank that gave up on a peer: EX_SOFTWARE of sysexits.h
_VERDICT = "verdict"


class Watchdog:
    """Watches the ranks of a job between `watch` and the end of its block.

    silence: seconds without a sign of life after which a rank counts as dead. stall: seconds in which no rank's main
    thread goes on, after which the one that is behind is named. `at_end` is called, on each rank, before it gives up.
    """

    def __init__(self, world: distributed.World, silence: float, stall: float) -> None:
        self.world = world
        self.silence = silence
        self.stall = stall
        self.at_end: Callable[[], None] = lambda: None
        self._ticks = 0
        self._where = "starting"
        self._last_answer = self._last_look = self._last_beat = time.monotonic()
        self._over = threading.Event()

    def tick(self, where: str) -> None:
        """The main thread goes on, and is now at `where`. Every rank calls it at the same places."""
        self._ticks += 1
        self._where = where

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch while the block runs. Collective at its start."""
        if self.world.world_size == 1:
            yield
            return
        store = distributed.store().clone(self.silence)  # the other may be held by a main thread that waits
        self._last_answer = self._last_look = self._last_beat = time.monotonic()
        for work in (lambda: self._beat(store), self._guard):
            threading.Thread(target=work, name="watchdog", daemon=True).start()
        try:
            yield
        except (RuntimeError, OSError) as error:
            # gloo notices at once that a peer has gone, but not which one: give rank 0 the time to find out.
            if _is_of_a_collective(error):
                print(f"mser: rank {self.world.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                self._over.wait(self.silence + 10)
            raise
        finally:
            self._over.set()

    def _beat(self, store: Any) -> None:
        rank, ranks = self.world.rank, self.world.world_size
        seen: dict[int, tuple[str, float]] = {}  # rank → (its last beat, when it came)
        begun: set[int] = set()
        moved, ticks_then = time.monotonic(), -1
        count, pulse = 0, b""
        while not self._over.wait(min(5.0, self.silence / 5)):
            if self._was_paused():
                seen, moved = {}, time.monotonic()
            count += 1
            try:
                store.set(f"beat/{rank}", f"{count} {self._ticks} {socket.gethostname()} {self._where}")
                if rank:  # rank 0 sets the pulse after each look at the others
                    last, pulse = pulse, store.get("beat/0")
                    if store.check([_VERDICT]):
                        return self._end(store.get(_VERDICT).decode())
                    if pulse != last:  # the store has a thread of its own: it answers also where rank 0 stands still
                        self._last_answer = time.monotonic()
                    continue
            except Exception:  # rank 0's process has gone, or does not answer: `_guard` counts the time
                continue
            before, self._last_answer = self._last_answer, time.monotonic()
            now = self._last_answer
            # One request for all who have begun; the others are asked about one by one, and soon there are none.
            try:
                begun |= {peer for peer in range(ranks) if peer not in begun and store.check([f"beat/{peer}"])}
                beats = dict.fromkeys(range(ranks), "0 0 an-unknown-host starting")
                listed = sorted(begun)
                found = store.multi_get([f"beat/{peer}" for peer in listed])
            except Exception:  # what serves the store has gone: `_guard` says so when its time is over
                self._last_answer = before
                continue
            beats |= {peer: beat.decode() for peer, beat in zip(listed, found, strict=True)}
            for peer, beat in beats.items():
                if peer not in seen or seen[peer][0] != beat:
                    seen[peer] = (beat, now)
            ticks = {peer: int(seen[peer][0].split(" ", 3)[1]) for peer in seen}
            if sum(ticks.values()) != ticks_then:
                ticks_then, moved = sum(ticks.values()), now
            silent = [peer for peer in seen if now - seen[peer][1] > self.silence]
            verdict = None
            if silent:
                verdict = f"{_named(silent, seen)}: no sign of life for {self.silence:g} s (dead or frozen)"
            elif now - moved > self.stall:
                behind = [peer for peer in ticks if ticks[peer] == min(ticks.values())]
                verdict = f"{_named(behind, seen)}: stuck for {self.stall:g} s, and the other ranks wait"
            if verdict:
                store.set(_VERDICT, verdict)
                self._over.wait(min(5.0, self.silence / 5) * 1.5)  # until the others have read it
                return self._end(verdict)

    def _guard(self) -> None:
        """End the process where `_beat` itself hangs: rank 0 does not answer."""
        while not self._over.wait(1.0):
            now = time.monotonic()
            if now - self._last_look > self.silence / 2:  # this process itself was stopped, as SLURM's suspend does
                self._last_answer = now
            self._last_look = now
            if time.monotonic() - self._last_answer > self.silence + 5:
                main = f"rank 0 ({self.world.master_addr})"
                what = "dead or frozen, it or the process beside it that serves the store"
                return self._end(f"{main}: no answer for {self.silence:g} s ({what})")

    def _was_paused(self) -> bool:
        """Whether all of this process was stopped for a while, after which nobody else's silence means a thing."""
        now = time.monotonic()
        long = now - self._last_beat > self.silence / 2 + 5
        self._last_beat = now
        return long

    def _end(self, verdict: str) -> None:
        if self._over.is_set():
            return
        print(
            f"mser: error (rank {self.world.rank}): {verdict}; the job ends, and the same command continues from the "
            "last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        closing = threading.Thread(target=self.at_end, daemon=True)  # it may hang too
        closing.start()
        closing.join(15)
        os._exit(LOST)


def _named(ranks: list[int], seen: dict[int, tuple[str, float]]) -> str:
    parts = []
    for rank in ranks[:4]:
        _, _, host, where = seen[rank][0].split(" ", 3)
        parts.append(f"rank {rank} on {host} (at: {where})")
    return ", ".join(parts) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _is_of_a_collective(error: BaseException) -> bool:
    text = str(error).lower()
    return any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "likely closed", "store")
    )
