"""Embeddings, kept by an evaluation, and as a map of two dimensions for its page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation.report import Answers
from mser_dist.files import whole

MOST = 2000  # points: t-SNE of more takes minutes, and the page megabytes
FEW = 30  # clips, below which t-SNE has no neighbourhoods to keep
_KEPT = 50  # dimensions that t-SNE sees, as its authors did (van der Maaten and Hinton 2008)


def keep_embeddings(answers: Mapping[str, Answers], out: Path) -> None:
    """Write ``embeddings_<model>.npy``, float16 (n, D) in the order of the model's predictions, of models that have
    some; those of an earlier evaluation are removed."""
    for path in out.glob("embeddings_*.npy"):
        path.unlink()
    for model, given in answers.items():
        if "embedding" in given.more:
            with whole(out / f"embeddings_{model}.npy") as staging, staging.open("wb") as file:
                np.save(file, given.more["embedding"].astype(np.float16), allow_pickle=False)


@dataclass(frozen=True)
class Map:
    """xy: (m, 2) places of the clips `drawn` (m,) of those given. told: how it was made, in a sentence."""

    xy: NDArray[np.float64]
    drawn: NDArray[np.int64]
    told: str


def flatten_map(embeddings: NDArray[Any], seed: int = 0) -> Map | None:
    """The map of (n, D) embeddings, of `MOST` clips drawn with the seed where there are more: t-SNE, of fewer than
    `FEW` their first two principal components. None where they do not differ."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n = len(embeddings)
    drawn = np.arange(n)
    if n > MOST:
        drawn = np.sort(np.random.default_rng(seed).choice(n, MOST, replace=False))
    x = embeddings[drawn].astype(np.float64)
    if len(x) < 3 or x.shape[1] < 2 or not (np.ptp(x, axis=0) > 0).any():
        return None
    which = f"{len(x):,} of {n:,} clips, drawn with seed {seed}" if n > MOST else f"all {n:,} clips"
    if len(x) < FEW:
        return Map(PCA(2, random_state=seed).fit_transform(x), drawn, f"The first two principal components of {which}.")
    if x.shape[1] > _KEPT:
        x = PCA(min(_KEPT, len(x)), random_state=seed).fit_transform(x)
    perplexity = min(30.0, (len(x) - 1) / 3)
    xy = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(x)
    how = f"t-SNE (perplexity {perplexity:g}, seed {seed}) of {which}: neighbours stay neighbours; distances between "
    return Map(xy.astype(np.float64), drawn, how + "groups, and their sizes, mean little.")
