"""The difference between corpora taken out of an encoder's features: microphone, room, level and the like.

Every clip's features x become (x - mean) / std by the statistics of the group that it belongs to: its corpus (those of
one name and language), or its speaker.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet

OVERALL = ""  # the group of what is in no other
Group = str


def corpora_of(shards: ShardSet) -> list[Group]:
    """The corpus of each of n clips, as a group's name."""
    return [
        f"{corpus} {language}"
        for corpus, language in zip(shards.column("corpus"), shards.column("language"), strict=True)
    ]


def speakers_of(shards: ShardSet) -> list[Group]:
    """The speaker of each of n clips, as a group's name: that of the corpus, and more."""
    pairs = zip(corpora_of(shards), shards.column("speaker"), strict=True)
    return [f"{corpus}/{speaker}" if speaker else corpus for corpus, speaker in pairs]


class Statistics:
    """Mean and standard deviation of features (T, L, D) by group: (G, L, D) each, in float32.

    mode: overall, corpus or speaker, as encoder.normalize. clips: of how many each group's statistics are.
    """

    def __init__(self, mode: str, groups: Mapping[Group, int], mean: Tensor, std: Tensor) -> None:
        self.mode = mode
        self.clips = dict(groups)
        self.mean, self.std = mean, std
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._number = {name: number for number, name in enumerate(groups)}

    def groups(self, shards: ShardSet) -> NDArray[np.int64]:
        """(n,) the group of each clip: its speaker where there are statistics of it, else its corpus, else all."""
        corpora = corpora_of(shards)
        finest = speakers_of(shards) if self.mode == "speaker" else corpora
        number, overall = self._number, self._number[OVERALL]
        return np.array(
            [number.get(one, number.get(other, overall)) for one, other in zip(finest, corpora, strict=True)]
        )

    def apply(self, features: Tensor, group: Tensor) -> Tensor:
        """Features (B, T, L, D) of clips of these groups (B,), in the features' dtype."""
        device = features.device
        if device not in self._copies:  # sent once: from memory that is not pinned the GPU's queue is waited for
            self._copies[device] = self.mean.to(device), self.std.to(device)
        mean, std = (of[group.to(device)].unsqueeze(1) for of in self._copies[device])
        return ((features.float() - mean) / std).to(features.dtype)

    def without_speakers(self) -> "Statistics":
        """Those of corpora and of all: what is kept of a training."""
        kept = [name for name in self.clips if "/" not in name]
        rows = torch.tensor([self._number[name] for name in kept])
        return Statistics(self.mode, {name: self.clips[name] for name in kept}, self.mean[rows], self.std[rows])

    def save(self, path: Path) -> None:
        facts = {"mode": self.mode, "clips": json.dumps(self.clips, ensure_ascii=False)}
        save_file({"mean": self.mean.contiguous(), "std": self.std.contiguous()}, path, metadata=facts)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Raises `UserError` for a file that is not there or damaged."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                return cls(facts["mode"], json.loads(facts["clips"]), file.get_tensor("mean"), file.get_tensor("std"))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): train or copy the run again") from error


def shrunk(
    mode: str,
    names: Sequence[Group],
    counts: NDArray[np.int64],
    mean: NDArray[np.float64],
    square: NDArray[np.float64],
    parent: Statistics | None = None,
    clips: float = 10.0,
) -> Statistics:
    """Statistics of groups from those of their clips, drawn towards their parent's where the clips are few.

    A group of n clips has (n · own + clips · parent's) / (n + clips), of the mean and of the variance: with as many
    clips as `clips` it is halfway. A speaker's parent is the corpus; a corpus' is the mean of all corpora, each of
    which counts the same, or, of unlabelled test clips, `parent`.

    Args:
        names: of G groups: corpora, or speakers (`speakers_of`).
        counts: (G,) clips of each.
        mean: (G, L, D) mean of their clips' means over frames.
        square: (G, L, D) mean of their clips' means of squares.
    """
    corpora = sorted({name.split("/")[0] for name in names})
    of = np.array([corpora.index(name.split("/")[0]) for name in names])
    weight = counts / np.bincount(of, counts)[of]  # (G,) share of its corpus
    total = np.bincount(of, counts)  # (C,)
    corpus_mean, corpus_square = (np.zeros((len(corpora), *mean.shape[1:])) for _ in range(2))
    np.add.at(corpus_mean, of, weight[:, None, None] * mean)
    np.add.at(corpus_square, of, weight[:, None, None] * square)
    corpus_var = (corpus_square - corpus_mean**2).clip(min=0)
    if parent is None:
        all_mean, all_var, heard = corpus_mean.mean(0), corpus_var.mean(0), int(total.sum())
    else:
        row = list(parent.clips).index(OVERALL)
        all_mean, all_var = parent.mean[row].double().numpy(), parent.std[row].double().numpy() ** 2
        heard = parent.clips[OVERALL]
    all_var = np.maximum(all_var, 1e-8)  # of features that never change

    def towards(own: NDArray[np.float64], other: NDArray[np.float64], n: NDArray[np.int64]) -> NDArray[np.float64]:
        share = (n / (n + clips))[:, None, None]
        return share * own + (1 - share) * other

    corpus_mean, corpus_var = towards(corpus_mean, all_mean, total), towards(corpus_var, all_var, total)
    groups, means, variances = {OVERALL: heard}, [all_mean[None], corpus_mean], [all_var[None], corpus_var]
    groups |= {name: int(n) for name, n in zip(corpora, total, strict=True)}
    if mode == "speaker":
        known = np.array([i for i, name in enumerate(names) if "/" in name], dtype=np.int64)
        groups |= {names[i]: int(counts[i]) for i in known}
        means.append(towards(mean[known], corpus_mean[of[known]], counts[known]))
        own_var = (square[known] - mean[known] ** 2).clip(min=0)
        variances.append(towards(own_var, corpus_var[of[known]], counts[known]))
    std = np.sqrt(np.maximum(np.concatenate(variances), 1e-8))
    return Statistics(mode, groups, *(torch.from_numpy(x).float() for x in (np.concatenate(means), std)))
