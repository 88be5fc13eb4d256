"""Whether an emotion is found across languages: clips ranked by the cosine of their embeddings.

Each clip asks for clips of the other languages: relevant are those of its label; and, where it is parallel to some,
those that speak or translate the same utterance (one `source`). The clips of its own language are not looked at.
Items of equal score are ranked together, as by scikit-learn, so that no order of the clips decides.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation.bootstrap import clusters_of, draw_values

MOST = 10_000  # clips; of more, so many are drawn
RECALL_AT = (1, 5, 10)


def across_languages(
    embedding: NDArray[Any],
    label: NDArray[Any],
    language: NDArray[Any],
    source: NDArray[Any],
    speaker: NDArray[Any],
    most: int = MOST,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each language that asks; none where there is one language alone.

    embedding: (n, D); label, language, source and speaker: (n,). Of a row: `n` queries that have something relevant, of
    clips drawn with `seed` where there are more than `most`; `gallery`, the clips that they are answered with; `map`
    and `r_precision`, means over queries, and `…_chance`, what a random order comes to; `map_low`, `map_high`, the 95 %
    interval over the speakers who ask, None where no two are known; `parallel`, queries that have a parallel clip, of
    which a share of `recall` has one among the first k, and of `recall_chance` by chance.
    """
    whole = len(label)
    if whole > most:
        some = np.sort(np.random.default_rng(seed).choice(whole, most, replace=False))
        embedding, label, language = embedding[some], label[some], language[some]
        source, speaker = source[some], speaker[some]
    unit = embedding.astype(np.float32)
    length = np.linalg.norm(unit, axis=1, keepdims=True)
    unit = np.divide(unit, length, out=np.zeros_like(unit), where=length > 0)
    _, label = np.unique(label, return_inverse=True)
    _, source = np.unique(source, return_inverse=True)
    rows = []
    for name in sorted(set(language.tolist())):
        own = language == name
        if not own.all():
            asked = _asked(unit[own], label[own], source[own], speaker[own], unit[~own], label[~own], source[~own])
            rows.append({"language": name, **asked, "clips": whole, "drawn": len(label)})
    return rows


def _asked(
    query: NDArray[np.float32],
    label: NDArray[np.int64],
    source: NDArray[np.int64],
    speaker: NDArray[Any],
    gallery: NDArray[np.float32],
    labels: NDArray[np.int64],
    sources: NDArray[np.int64],
    block: int = 256,
) -> dict[str, Any]:
    """The row of one language: queries (q, D) with their labels, sources and speakers (q,), gallery (N, D) with its."""
    n = len(gallery)
    of_label = {number: np.flatnonzero(labels == number) for number in np.unique(label)}
    by_source = np.argsort(sources, kind="stable")
    begin, end = (np.searchsorted(sources[by_source], source, side) for side in ("left", "right"))
    found: dict[str, list[float]] = {name: [] for name in ("ap", "ap_chance", "rp", "rp_chance", "rank", "parallel")}
    for start in range(0, len(query), block):
        scores = query[start : start + block] @ gallery.T  # (block, N): never all queries at once
        for row, score in enumerate(scores, start):
            relevant = of_label[label[row]]
            ordered = np.sort(score)
            if len(relevant):
                found["ap"].append(average_precision(ordered, score[relevant]))
                found["rp"].append(r_precision(ordered, score[relevant]))
                found["ap_chance"].append(random_average_precision(n, len(relevant)))
                found["rp_chance"].append(len(relevant) / n)
            if end[row] > begin[row]:
                best = score[by_source[begin[row] : end[row]]].max()
                found["rank"].append(n - np.searchsorted(ordered, best))
                found["parallel"].append(end[row] - begin[row])
    told: dict[str, Any] = {"n": len(found["ap"]), "gallery": n}
    for ours, theirs in (("map", "ap"), ("r_precision", "rp")):
        for end_of in ("", "_chance"):
            values = found[theirs + end_of]
            told[ours + end_of] = float(np.mean(values)) if values else None
    asking = np.isin(label, labels)
    cluster, by_speaker = clusters_of(np.array([name or "" for name in speaker[asking]], dtype=object))
    low, high = draw_values(np.array(found["ap"]), cluster).interval() if by_speaker else (None, None)
    told |= {"map_low": low, "map_high": high}
    rank, many = np.array(found["rank"]), np.array(found["parallel"])
    told["parallel"] = len(rank)
    if len(rank):
        told["recall"] = {str(k): float((rank <= k).mean()) for k in RECALL_AT}
        told["recall_chance"] = {str(k): float(random_recall(n, many, k).mean()) for k in RECALL_AT}
    return told


def average_precision(ordered: NDArray[Any], relevant: NDArray[Any]) -> float:
    """Mean, over the relevant items, of the share of relevant ones among all that score as high.

    ordered: all scores, rising; relevant: those of the relevant items among them.
    """
    own = np.sort(relevant)
    above = len(own) - np.searchsorted(own, own)  # relevant items that score as high, itself among them
    return float((above / (len(ordered) - np.searchsorted(ordered, own))).mean())


def r_precision(ordered: NDArray[Any], relevant: NDArray[Any]) -> float:
    """The share of relevant items among the first R, as many as there are relevant ones; of items that share the last
    places, what a random order among these comes to."""
    count = len(relevant)
    last = ordered[-count]
    low, high = np.searchsorted(ordered, last), np.searchsorted(ordered, last, "right")
    free = count - (len(ordered) - high)  # places for the items that score `last`
    return float(((relevant > last).sum() + free * (relevant == last).sum() / (high - low)) / count)


def random_average_precision(n: int, relevant: int) -> float:
    """What `average_precision` comes to in a random order, of `relevant` items among n (Bestgen, 2015): exact."""
    from scipy.special import digamma

    harmonic = float(digamma(n + 1)) + np.euler_gamma  # 1 + 1/2 + … + 1/n
    among = (relevant - 1) / (n - 1) if n > 1 else 0.0
    return (harmonic + among * (n - harmonic)) / n


def random_recall(n: int, parallel: NDArray[Any], k: int) -> NDArray[np.float64]:
    """Probability that one of `parallel` items among n is in the first k of a random order."""
    from scipy.stats import hypergeom

    chance: NDArray[np.float64] = hypergeom.sf(0, n, parallel, min(k, n))
    return chance
