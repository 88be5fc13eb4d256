"""Frozen weights that no checkpoint holds, as every start loads them anew: from which files, and what is in these."""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mser_dist.errors import UserError
from mser_dist.files import file_sha256
from mser_dist.models.sources import Source, folder_of
from mser_dist.ranks import distributed


@dataclass(frozen=True)
class Base:
    """The files of weights that some parameters are loaded from."""

    name: str  # of the model or run, for a person
    files: list[Path] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)  # SHA-256 of files that was found to hold already, by name


def files_of(source: Source) -> list[Path]:
    """The files of weights behind a config's `pretrained`, which has been loaded."""
    if source.ctranslate2:
        return list(source.ctranslate2)
    folder = folder_of(source)
    if source.gguf_file:
        return [folder / source.gguf_file]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def reloaded(model: nn.Module, bases: Collection[str]) -> set[str]:
    """The frozen parameters that each start loads anew: those whose names begin as a base says, but no adapters."""
    return {
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and name.startswith(tuple(bases)) and "lora_" not in name
    }


def digests(bases: Mapping[str, Base]) -> dict[str, dict[str, Any]]:
    """What the files of each base hold, as JSON: {beginning of names: {name, files: {file: SHA-256}, sha256}}.

    Collective: each rank hashes its share of the files.
    """
    world = distributed.discover()
    work = [(prefix, file) for prefix in sorted(bases) for file in bases[prefix].files]
    mine = {(prefix, file.name): _sha256(file) for prefix, file in work[world.rank :: world.world_size]}
    everywhere = {key: found for part in distributed.gather(mine) for key, found in part.items()}
    result = {}
    for prefix, base in bases.items():
        files = base.sums | {name: found for (of, name), found in everywhere.items() if of == prefix}
        whole = hashlib.sha256("\n".join(f"{name} {files[name]}" for name in sorted(files)).encode()).hexdigest()
        result[prefix] = {"name": base.name, "files": dict(sorted(files.items())), "sha256": whole}
    return result


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    """Raise `UserError` where frozen weights have changed since a checkpoint was written, which does not hold them."""
    for prefix, there in saved.items():
        here = now.get(prefix, {"name": there["name"], "files": {}, "sha256": None})
        if here["sha256"] != there["sha256"]:
            files = {**there["files"], **here["files"]}
            changed = next((n for n in files if there["files"].get(n) != here["files"].get(n)), "")
            sums = [str(found["files"].get(changed, "not there"))[:12] for found in (there, here)]
            raise UserError(
                f"the frozen weights {prefix}* of {here['name']} have changed (sha256 of {changed}: {sums[0]} then, "
                f"{sums[1]} now): {remedy}"
            )


def _sha256(file: Path) -> str:
    """Of a file; the hub's cache has it for a name."""
    blob = file.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else file_sha256(file)
