"""Runs at the start of each rank of a drill and does to one rank what MSER_DRILL says: ``RANK|POINT|WHAT[|WHAT …]``.

POINT: where the watchdog was told that the rank is ("step 3", "step 3, data", "step 3, saving", "validating"),
"drawing", or a point of a save (half-written, written, sealed, published, mid-prune). WHAT: a signal that the rank
sends itself, HANG, RAISE (an error of the code), or NAN: its speech in that step is not a number. Several drills are
separated by ";". RANK is SLURM's too, and "single" where there is none. A requeued SLURM job is left alone.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any


def _install(drills: dict[str, list[str]]) -> None:
    from mser_dist.models.speech import SpeechModel
    from mser_dist.ranks import watchdog
    from mser_dist.runs import plots
    from mser_dist.state import checkpoint, engine_state

    poisoned = False

    def at(point: str) -> None:
        nonlocal poisoned
        for what in drills.pop(point, []):
            if what == "NAN":
                poisoned = True
            elif what == "RAISE":
                raise RuntimeError(f"broken on purpose: {point}")
            elif what == "HANG":
                time.sleep(10_000)
            else:
                os.kill(os.getpid(), signal.Signals[f"SIG{what}"])

    def around(owner: Any, name: str, before: str = "", after: str = "") -> None:
        plain = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            at(before)
            result = plain(*arguments, **options)
            at(after)
            return result

        setattr(owner, name, wrapped)

    def tick(self: Any, where: str) -> None:
        plain_tick(self, where)
        at(where)

    def prepared(self: Any, batch: dict[str, Any], device: str) -> dict[str, Any]:
        nonlocal poisoned
        if poisoned:
            batch["speech"][0] = float("nan")
            poisoned = False
        return plain_prepared(self, batch, device)

    def write(path: Path, tensors: dict[str, Any], description: dict[str, Any]) -> None:
        plain_write(path, tensors, description)
        if "half-written" in drills:
            os.truncate(path, path.stat().st_size // 2)
            at("half-written")

    def prune(folder: Any) -> None:
        if "mid-prune" in drills:
            doomed = folder.with_suffix(".partial")
            folder.rename(doomed)
            (doomed / "rank-00000.safetensors").unlink()
            at("mid-prune")
        shutil.rmtree(folder)

    plain_tick, plain_prepared, plain_write = watchdog.Watchdog.tick, SpeechModel.prepared, engine_state.write
    watchdog.Watchdog.tick = tick  # type: ignore[method-assign]
    SpeechModel.prepared = prepared  # type: ignore[method-assign]
    engine_state.write = write
    around(checkpoint, "seal", before="written", after="sealed")
    around(checkpoint, "publish", after="published")
    around(plots, "curves", before="drawing")
    checkpoint.prune = prune


_rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "single"))
_mine: dict[str, list[str]] = {}
for _drill in filter(None, os.environ.get("MSER_DRILL", "").split(";")):
    _who, _point, *_whats = _drill.split("|")
    if _who == _rank:
        _mine[_point] = _whats
if _mine and "SLURM_RESTART_COUNT" not in os.environ:
    _install(_mine)
