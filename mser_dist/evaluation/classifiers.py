"""Classifiers on one vector a clip: what features tell by themselves, without a network trained on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from mser_dist.models.normalize import Statistics, corpora_of, shrunk, speakers_of
from mser_dist.shards.shard_set import ShardSet

Vectors = NDArray[np.float32]  # (n, D), one a clip
# What fits to vectors of a width, and then scores the classes. Labels count alike, however many clips they have. C is
# the prior variance of a weight: so divided, that of a score is the same for few features and for many. 1.5 was best
# where each of three corpora in turn was left out of the training (README.md).
CLASSIFIERS: dict[str, Callable[[int, int], Any]] = {
    "logistic_regression": lambda width, seed: LogisticRegression(
        C=1.5 / width, class_weight="balanced", max_iter=5000, random_state=seed
    ),
    "svm": lambda width, seed: SVC(C=1.0, kernel="rbf", class_weight="balanced", random_state=seed),
}


def majority(label: NDArray[np.integer[Any]], classes: int, clips: int) -> Vectors:
    """(clips, classes) log shares of the (n,) training labels, the same for every clip: the most frequent one scores
    best. -inf of a class without a clip."""
    with np.errstate(divide="ignore"):
        shares = np.log(np.bincount(label, minlength=classes) / len(label))
    return np.tile(shares.astype(np.float32), (clips, 1))


def fitted(name: str, x: Vectors, label: NDArray[np.integer[Any]], seed: int) -> Any:
    """A classifier of `CLASSIFIERS` fitted to standardised (n, D) vectors and (n,) labels, two or more of them."""
    return make_pipeline(StandardScaler(), CLASSIFIERS[name](x.shape[1], seed)).fit(x.astype(np.float64), label)


def scores(classifier: Any, x: Vectors, classes: int) -> Vectors:
    """(n, classes) log-probabilities, or an SVM's decision values, of (n, D) vectors; -inf of a class it never met."""
    found = torch.from_numpy(classifier.decision_function(x.astype(np.float64)))
    if found.ndim == 1:  # of two classes: the difference
        found = torch.stack([-found / 2, found / 2], 1)
    if hasattr(classifier, "predict_log_proba"):
        found = found.log_softmax(1)  # what that gives, but finite
    spread = np.full((len(x), classes), -np.inf, np.float32)
    spread[:, classifier.classes_] = found.numpy()
    return spread


class Heard(NamedTuple):
    """One vector a clip, of n clips of a set: (n, D), and their (n,) numbers in it."""

    x: Vectors
    numbers: NDArray[np.int64]
    shards: ShardSet


def normalised(train: Heard, test: Heard, normalize: str) -> list[tuple[Vectors, Vectors, Statistics | None]]:
    """Training's vectors and the test's, as they are compared: first inductive, then adapted to the test clips.

    Inductive: as they are; or, with encoder.normalize=corpus or speaker, as stage 1's features: training's by its own
    corpora or speakers, the test's by the mean of training's corpora. Adapted: both by their own (by corpus, if
    normalize is none or overall), without any label; the third are the test's statistics.
    """
    mode = normalize if normalize in ("corpus", "speaker") else "corpus"
    own = _statistics(train, mode)
    theirs = _statistics(test, mode, own)
    x_own = _by(own, train)
    inductive = (x_own, _by(own, test)) if mode == normalize else (train.x, test.x)
    return [(*inductive, None), (x_own, _by(theirs, test), theirs)]


def _statistics(clips: Heard, mode: str, parent: Statistics | None = None) -> Statistics:
    """Mean and spread of vectors by corpus or speaker."""
    names = np.array(speakers_of(clips.shards) if mode == "speaker" else corpora_of(clips.shards))[clips.numbers]
    groups, group, counts = np.unique(names, return_inverse=True, return_counts=True)
    sums = np.zeros((2, len(groups), clips.x.shape[1]))
    for power in (1, 2):
        np.add.at(sums[power - 1], group, clips.x.astype(np.float64) ** power)
    mean, square = (sums / counts[:, None])[:, :, None]  # (G, 1, D): one layer
    return shrunk(mode, groups.tolist(), counts, mean, square, parent)


def _by(statistics: Statistics, clips: Heard) -> Vectors:
    group = torch.from_numpy(statistics.groups(clips.shards)[clips.numbers])
    normal: Vectors = statistics.apply(torch.from_numpy(clips.x)[:, None, None], group)[:, 0, 0].numpy()
    return normal
