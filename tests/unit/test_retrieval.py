"""Retrieval across languages, against scikit-learn and by permutation."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from mser_dist.evaluation.retrieval import (
    across_languages,
    average_precision,
    r_precision,
    random_average_precision,
    random_recall,
)

scored = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30)


@given(scored.filter(lambda items: any(relevant for _, relevant in items)))
def test_average_precision_is_scikit_learns_with_ties_too(items: list[tuple[int, bool]]) -> None:
    score, relevant = np.array([s for s, _ in items], dtype=float), np.array([r for _, r in items])
    found = average_precision(np.sort(score), score[relevant])
    assert found == pytest.approx(average_precision_score(relevant, score))


def test_what_a_random_order_comes_to_is_exact() -> None:
    for n, count in ((1, 1), (4, 1), (5, 2), (6, 3), (6, 6)):
        relevant = np.arange(n) < count
        orders = [np.array(order, dtype=float) for order in permutations(range(n))]
        ap = [average_precision(np.sort(order), order[relevant]) for order in orders]
        assert random_average_precision(n, count) == pytest.approx(np.mean(ap))
        assert count / n == pytest.approx(np.mean([r_precision(np.sort(order), order[relevant]) for order in orders]))
        for k in (1, 2, 5):
            hit = [(order[relevant] >= n - k).any() for order in orders]
            assert random_recall(n, np.array([count]), k)[0] == pytest.approx(np.mean(hit))


def test_r_precision_of_ties_is_that_of_a_random_order_of_them() -> None:
    score, relevant = np.array([3.0, 2, 2, 2, 1]), np.array([True, True, False, False, False])
    # One of two places is the first's; a third of the three that share the other is relevant.
    assert r_precision(np.sort(score), score[relevant]) == pytest.approx((1 + 1 / 3) / 2)


def clips(seed: int = 0, n: int = 120) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    label = random.integers(0, 3, n)
    return {
        "embedding": (np.eye(8)[label] + random.normal(size=(n, 8))).astype(np.float32),
        "label": label,
        "language": np.array(["de", "el", "ru"], dtype=object)[np.arange(n) % 3],
        "source": np.arange(n) // 3,
        "speaker": np.array([f"s{i % 12}" for i in range(n)], dtype=object),
    }


def test_rows_are_means_over_the_queries_of_a_language() -> None:
    given = clips()
    rows = across_languages(**given)
    assert [row["language"] for row in rows] == ["de", "el", "ru"]
    unit = given["embedding"] / np.linalg.norm(given["embedding"], axis=1, keepdims=True)
    for row in rows:
        own = given["language"] == row["language"]
        assert (row["n"], row["gallery"], row["parallel"]) == (own.sum(), (~own).sum(), own.sum())
        ap, hits = [], []
        for i in np.flatnonzero(own):
            score = unit[~own] @ unit[i]
            ap.append(average_precision_score(given["label"][~own] == given["label"][i], score))
            hits.append((given["source"][~own] == given["source"][i])[np.argsort(-score)[:5]].any())
        assert row["map"] == pytest.approx(np.mean(ap))
        assert row["recall"]["5"] == pytest.approx(np.mean(hits))
        assert row["map_low"] < row["map"] < row["map_high"]
        assert row["map"] > row["map_chance"] and row["r_precision"] > row["r_precision_chance"]


def test_embeddings_that_tell_nothing_are_at_chance_whatever_their_order() -> None:
    given = clips() | {"embedding": np.ones((120, 8))}
    order = np.argsort(given["label"], kind="stable")
    for one in (given, {name: values[order] for name, values in given.items()}):
        for row in across_languages(**one):
            assert row["r_precision"] == pytest.approx(row["r_precision_chance"])
            assert row["map"] == pytest.approx(row["r_precision_chance"])
            assert row["recall"] == {"1": 0, "5": 0, "10": 0}


def test_one_language_has_nothing_to_ask() -> None:
    assert across_languages(**clips() | {"language": np.full(120, "de", dtype=object)}) == []


def test_labels_and_sources_that_no_other_language_has() -> None:
    given = clips(n=4)
    given |= {"label": np.arange(4), "source": np.arange(4)}
    for row in across_languages(**given):
        assert (row["n"], row["parallel"], row["map"], row["map_low"]) == (0, 0, None, None)
        assert "recall" not in row


def test_of_many_clips_some_are_drawn() -> None:
    rows = across_languages(**clips(), most=60)
    assert {(row["clips"], row["drawn"]) for row in rows} == {(120, 60)}
    assert sum(row["n"] for row in rows) == 60
    assert rows == across_languages(**clips(), most=60)


def test_an_embedding_of_nothing_is_no_error() -> None:
    given = clips()
    given["embedding"][0] = 0
    assert all(np.isfinite(row["map"]) for row in across_languages(**given))
