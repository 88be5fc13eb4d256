"""A model's weights written as safetensors of a bounded size, by all ranks: a rank has one file in memory at a time.

A part of a model is one file, ``stem.safetensors``, or, where it is larger than a shard, several with an index, as
Hugging Face names them: ``stem-00001-of-00003.safetensors`` and ``stem.safetensors.index.json``.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mser_dist.errors import UserError
from mser_dist.files import file_sha256, fsync_tree

SHARD_BYTES = 5 * 10**9  # of a file at most, but for a tensor that alone is larger; transformers' own default was so


@dataclass(frozen=True)
class Weights:
    """A model's tensors by name, given one at a time.

    facts: each one's shape and dtype, as a tensor on the meta device. get: of a name, and a place for it on the CPU,
    or None on ranks that do not write: the tensor on the CPU, in its place if it was not there before. It may be
    collective: all ranks ask for the same names in the same order. forget: what was kept for names that follow, which
    another rank may want.
    """

    facts: Mapping[str, Tensor]
    get: Callable[[str, Tensor | None], Tensor | None]
    forget: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Weights":
        """Those of a state that is there, without a copy on the CPU."""
        facts = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        return cls(facts, lambda name, place: None if place is None else state[name].detach().cpu())

    def beside(self, state: Mapping[str, Tensor]) -> "Weights":
        """These, and those of a state that is there."""
        more = Weights.of(state)
        both = {**self.facts, **more.facts}
        return Weights(both, lambda name, place: (more if name in more.facts else self).get(name, place), self.forget)

    def part(self, wanted: Callable[[str], bool], rename: Callable[[str], str] = lambda name: name) -> "Weights":
        """Those whose names are wanted, under other names."""
        names = {rename(name): name for name in self.facts if wanted(name)}
        facts = {new: self.facts[old] for new, old in names.items()}
        return Weights(facts, lambda name, place: self.get(names[name], place), self.forget)

    def all(self, main: bool) -> dict[str, Tensor]:
        """All of them, on the ranks that are `main`. Collective where they are."""
        asked = {name: torch.empty_like(fact, device="cpu") if main else None for name, fact in self.facts.items()}
        found = {name: self.get(name, place) for name, place in asked.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


_File = tuple[str, list[str]]  # its name, and those of the tensors in it


def plan(facts: Mapping[str, Tensor], stem: str, shard_bytes: int) -> list[_File]:
    """The files of a part and the names in each, in order; a tensor larger than a shard has a file of its own."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, fact in facts.items():
        if files[-1] and filled + fact.nbytes > shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += fact.nbytes
    if len(files) == 1:
        return [(f"{stem}.safetensors", files[0])]
    return [(f"{stem}-{i:05d}-of-{len(files):05d}.safetensors", names) for i, names in enumerate(files, 1)]


@dataclass(frozen=True)
class Writers:
    """Who writes: rank `rank` of `ranks`, each a file of its own at the same time; shard_bytes: of a file at most."""

    rank: int = 0
    ranks: int = 1
    shard_bytes: int = SHARD_BYTES

    @property
    def main(self) -> bool:
        return self.rank == 0

    def rounds(self, files: Sequence[_File]) -> Iterator[dict[int, _File]]:
        """Files that are written at once, by the rank that writes each: far apart, so that these are of many nodes."""
        for first in range(0, len(files), self.ranks):
            several = files[first : first + self.ranks]
            yield {i * (self.ranks // len(several)): file for i, file in enumerate(several)}


def write_part(folder: Path, stem: str, weights: Weights, writers: Writers) -> dict[str, str]:
    """Write this rank's files of a part into `folder`, and return their sums (SHA-256) by name, on the main rank with
    that of an index. Collective where the weights are.

    Where writing fails, the others' collectives are gone through all the same, and the error is raised behind them.
    """
    failure: Exception | None = None
    sums: dict[str, str] = {}
    files = plan(weights.facts, stem, writers.shard_bytes)
    for several in writers.rounds(files):
        mine: dict[str, Tensor] = {}
        for rank, (_, names) in several.items():
            here = rank == writers.rank
            # One piece of memory for all of a file, which goes back at once: glibc would keep that of many small ones.
            places = _places({name: weights.facts[name] for name in names}) if here else {}
            for name in names:
                found = weights.get(name, places.get(name))
                if here and found is not None:
                    mine[name] = found.contiguous()
                del found
            weights.forget()
            del places
        if writers.rank in several and failure is None:
            file = folder / several[writers.rank][0]
            try:
                save_file(mine, file, metadata={"format": "pt"})
                fsync_tree(file, below=False)
                sums[file.name] = file_sha256(file)
            except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
                failure = error
        del mine  # or it would live on beside the next round's
    if failure is not None:
        raise failure
    if writers.main and len(files) > 1:
        index = {
            "metadata": {"total_size": sum(fact.nbytes for fact in weights.facts.values())},
            "weight_map": {name: file for file, names in files for name in names},
        }
        file = folder / f"{stem}.safetensors.index.json"
        file.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        sums[file.name] = file_sha256(file)
    return sums


def _places(facts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tensor for each fact, all in one piece of memory, of which what is not written to takes none."""
    sizes = [-(-fact.nbytes // 16) * 16 for fact in facts.values()]  # a tensor begins at a whole number of elements
    parts = torch.empty(sum(sizes), dtype=torch.uint8).split(sizes)
    named = zip(facts.items(), parts, strict=True)
    return {name: part[: fact.nbytes].view(fact.dtype).view(fact.shape) for (name, fact), part in named}


def files_of(folder: Path, stem: str) -> list[Path]:
    """The files of a part that was written."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    names: Sequence[str] = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    return [folder / name for name in names]


def read_part(folder: Path, stem: str) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Each file of a part with its tensors, which are mapped and not yet read. `UserError` for a damaged one."""
    for file in files_of(folder, stem):
        try:
            yield file, load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): train or copy the run again") from error
