"""Which rank's file holds which elements of each parameter: ``manifest.json``, so that a rank opens what it needs.

Each rank's own file describes what is in it. To find a slice by these alone, every rank would have to open every
other's: N² files in all. So rank 0 writes down, when it seals a checkpoint, where everything is. As most parameters are
cut evenly (ZeRO-3's, and all that every rank holds and of which each writes a share), the manifest says so in a word;
of the others (a group of ZeRO-1 or 2, flattened and cut once) it lists the pieces, P parameters and N ranks together
being at most P + N. It grows with neither's product.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from mser_dist.errors import UserError

FILE = "manifest.json"

Manifest = dict[str, Any]


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank's part of a checkpoint lies."""
    return folder / f"rank-{rank:05d}.safetensors"


def even(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first element, number of elements) of an even cut: ZeRO-3's own, the last parts short or empty."""
    size = -(-numel // ranks)
    first = min(rank * size, numel)
    return first, min(size, numel - first)


def layout(description: dict[str, Any]) -> dict[str, Any]:
    """What a rank tells rank 0 of its file, as JSON: of which parameters it holds an even part, and its other pieces.

    description: as `engine_state.collect` gives it.
    """
    rank, ranks = description["rank"], description["world_size"]
    is_even, pieces = [], {}
    for name, entry in description["parameters"].items():
        first, count = even(math.prod(entry["shape"]), rank, ranks)
        fits = count == entry["count"] and (not count or first == entry["start"]) and not entry.get("reloaded")
        is_even.append(fits)
        if entry["count"] and not fits:
            pieces[name] = [entry["start"], entry["count"], entry["step"]]
    packed = np.packbits(np.array(is_even, dtype=np.uint8)).tobytes().hex()
    return {"even": packed, "pieces": pieces, "slots": description["slots"]}


def combine(description: dict[str, Any], layouts: Sequence[dict[str, Any]]) -> Manifest:
    """The manifest of a checkpoint, by rank 0's description and every rank's `layout`."""
    ranks, own = description["world_size"], description["parameters"]
    packed = np.array([np.frombuffer(bytes.fromhex(one["even"]), dtype=np.uint8) for one in layouts])  # (N, P / 8)
    is_even = np.unpackbits(packed, axis=1, count=len(own)).astype(bool)  # (N, P)
    pieces: dict[str, list[list[int]]] = {}
    steps = {}
    for rank, one in enumerate(layouts):
        for name, (start, count, step) in one["pieces"].items():
            pieces.setdefault(name, []).append([start, count, rank])
            steps[name] = step
    parameters = {}
    for number, (name, entry) in enumerate(own.items()):
        kept = {"shape": entry["shape"], "step": steps.get(name, entry["step"])}
        if entry.get("reloaded"):
            kept |= {"reloaded": True, "pieces": []}
        elif not is_even[:, number].all():
            numel = math.prod(entry["shape"])
            held = [[*even(numel, rank, ranks), rank] for rank in np.flatnonzero(is_even[:, number]).tolist()]
            kept["pieces"] = sorted(pieces.get(name, []) + [piece for piece in held if piece[1]])
        parameters[name] = kept
    return {
        "world_size": ranks,
        "parameters": parameters,
        "slots": sorted({slot for one in layouts for slot in one["slots"]}),
        **{key: description[key] for key in ("buffers", "groups", "scheduler", "loss_scaler", "counters")},
    }


def load(folder: Path) -> tuple[Manifest, str | None]:
    """(the manifest of a checkpoint, what is wrong). One that was written without is read from all ranks' files."""
    try:
        if (folder / FILE).is_file():
            return json.loads((folder / FILE).read_text(encoding="utf-8")), None
        return by_files(sorted(folder.glob("rank-*.safetensors"))), None
    except UserError as error:
        return {}, str(error)
    except Exception as error:  # of whatever kind: the other ranks wait for what this one says
        return {}, f"{folder / FILE} cannot be read ({error}): remove the folder to resume from an older checkpoint"


def by_files(files: Sequence[Path]) -> Manifest:
    """The manifest that a checkpoint of an earlier version lacks. Raises `UserError` where a rank's file is missing."""
    found = sorted((describe(path) for path in files), key=lambda one: int(one["rank"]))
    wanted = found[0]["world_size"] if found else 0
    if not found or [one["rank"] for one in found] != list(range(wanted)):
        where = files[0].parent if files else "the checkpoint"
        raise UserError(
            f"{where}: the checkpoint was written by {wanted or 'some'} ranks and has the files of {len(found)}: "
            "remove the folder to resume from an older one"
        )
    return combine(found[0], list(map(layout, found)))


def describe(path: Path) -> dict[str, Any]:
    """What a rank's file says of itself."""
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["mser"])
    return found


def pieces(manifest: Manifest, name: str, start: int = 0, count: int | None = None) -> list[tuple[int, int, int]]:
    """(first element, number of elements, rank) of each piece with some of ``start … start + count``, in order."""
    entry, ranks = manifest["parameters"][name], manifest["world_size"]
    numel = math.prod(entry["shape"])
    end = numel if count is None else start + count
    if "pieces" in entry:
        return [(first, size, rank) for first, size, rank in entry["pieces"] if first < end and start < first + size]
    if start >= end:
        return []
    size = -(-numel // ranks)
    return [(*even(numel, rank, ranks), rank) for rank in range(start // size, (end - 1) // size + 1)]


def is_complete(manifest: Manifest, name: str) -> bool:
    """Whether all elements of a parameter are in the files."""
    entry = manifest["parameters"][name]
    return "pieces" not in entry or sum(count for _, count, _ in entry["pieces"]) == math.prod(entry["shape"])
