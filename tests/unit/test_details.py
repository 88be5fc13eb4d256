"""What a row tells beside its scores, against scikit-learn; and which of it stands below the table."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support, recall_score

from mser_dist.evaluation.details import Clips, details
from mser_dist.evaluation.summary import below, calibration_table, group_table, retrieval_means, retrieval_table

LABELS = ["anger", "happy", "sad", "fear"]


def clips(n: int, **changes: Any) -> Clips:
    number = np.arange(n)
    speaker = np.array([f"s{i % 6}" for i in number], dtype=object)
    gender = np.array([("female", "male")[i % 2] for i in number], dtype=object)
    values: dict[str, Any] = {"speaker": speaker, "gender": gender, "duration": number % 10 + 0.5, "votes": [None] * n}
    return Clips(**values | changes)


def drawn(n: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels of three of the four classes, and scores that know something of them."""
    random = np.random.default_rng(seed)
    reference = random.integers(0, 3, n)
    return reference, (np.eye(4)[reference] * 1.5 + random.normal(size=(n, 4))).astype(np.float32)


def test_classes_are_scikit_learns() -> None:
    reference, scores = drawn()
    found = details(LABELS, reference, scores, None, None, clips(240))
    predicted = scores.argmax(1)
    theirs = precision_recall_fscore_support(reference, predicted, labels=range(4), zero_division=0)
    for i, label in enumerate(LABELS[:3]):
        own = found["classes"][label]
        expected = [values[i] for values in theirs]
        assert [own["precision"], own["recall"], own["f1"], own["n"]] == pytest.approx(expected)
    assert found["classes"]["fear"]["recall"] is None and found["classes"]["fear"]["n"] == 0
    assert found["classes"]["fear"]["precision"] == 0, "it was answered, and always wrongly"
    assert found["majority"] == np.bincount(reference).max() / 240
    assert "ece" not in found and "soft" not in found


def test_groups_by_length_and_gender() -> None:
    reference, scores = drawn()
    known = clips(240)
    found = details(LABELS, reference, scores, None, None, known)
    ends = [0, 2, 4, 8, np.inf]
    assert [(one["from"], one["to"]) for one in found["by_length"]] == [(0, 2), (2, 4), (4, 8), (8, None)]
    for one, low, high in zip(found["by_length"], ends, ends[1:], strict=False):
        mine = (low <= known.duration) & (known.duration < high)
        ua = recall_score(reference[mine], scores.argmax(1)[mine], labels=range(3), average="macro")
        assert (one["n"], one["ua"]) == (mine.sum(), pytest.approx(ua))
        assert one["ua_low"] <= one["ua"] <= one["ua_high"] and one["speakers"] >= 2
    assert {name: one["n"] for name, one in found["by_gender"].items()} == {"female": 120, "male": 120}


def test_who_is_not_named_has_no_interval() -> None:
    reference, scores = drawn(20)
    nobody = np.array([None, ""] * 10, dtype=object)
    found = details(LABELS, reference, scores, None, None, clips(20, speaker=nobody, gender=nobody))
    assert found["by_gender"] == {}
    assert all(one["ua_low"] is None and one["speakers"] is None for one in found["by_length"])
    half = np.array(["female", None] * 10, dtype=object)
    found = details(LABELS, reference, scores, None, None, clips(20, gender=half))
    assert {name: one["n"] for name, one in found["by_gender"].items()} == {"female": 10, "not named": 10}


def test_one_clip_of_one_class() -> None:
    found = details(LABELS, np.array([2]), np.zeros((1, 4), np.float32), 1.0, 3.0, clips(1))
    assert (found["majority"], found["ece"], found["brier"]) == (1.0, 0.25, 0.75)
    assert found["ece_calibrated"] == 0.25 and found["by_gender"]["female"]["ua_low"] is None


def test_votes_are_compared_with_calibrated_probabilities() -> None:
    votes = [{"anger": 2, "sad": 2}, None]
    scores = np.array([[2.0, -np.inf, 0.0, -np.inf]] * 2, dtype=np.float32)
    as_is = details(LABELS, np.array([0, 0]), scores, 1.0, None, clips(2, votes=votes))["soft"]
    assert (as_is["n"], as_is["calibrated"]) == (1, False)
    flat = details(LABELS, np.array([0, 0]), scores, 1.0, 50.0, clips(2, votes=votes))["soft"]
    assert flat["calibrated"] and flat["total_variation"] < 0.02 < as_is["total_variation"]
    assert flat["cross_entropy"] == pytest.approx(flat["entropy"], abs=1e-3) and flat["entropy"] == 1.0


def row(**changes: Any) -> dict[str, Any]:
    return {"model": "stage1", "corpus": "c", "language": "de", "k": 2, "majority": 0.5} | changes


def group(low: float | None, high: float | None, k: int = 2) -> dict[str, Any]:
    return {"n": 9, "k": k, "ua": 0.5, "ua_low": low, "ua_high": high, "speakers": 3}


def test_only_groups_that_differ_are_shown() -> None:
    apart = {"female": group(0.1, 0.3), "male": group(0.4, 0.6)}
    assert group_table([row(by_gender={"female": group(0.1, 0.4), "male": group(0.4, 0.6)})]) is None
    assert group_table([row(by_gender=apart | {"male": group(None, None)})]) is None
    assert group_table([row(by_gender=apart | {"male": group(0.4, 0.6, k=1)})]) is None, "of other labels"
    found = group_table([row(by_gender=apart), row(by_length=[{"from": 8.0, "to": None, **group(0.1, 0.2)}])])
    assert str(found).splitlines()[2:] == [
        "stage 1  c       de        female  9  0.500  0.10–0.30",
        "stage 1  c       de        male    9  0.500  0.40–0.60",
    ]


def test_what_stands_below_the_table_is_of_what_was_measured() -> None:
    assert [str(part)[:4] for part in below([row()], [])] == ["UA: "]
    plain = str(calibration_table([row(ece=0.1, brier=0.2, temperature=None)]))
    assert "with T" not in plain and "votes" not in plain
    soft = {"n": 3, "total_variation": 0.5, "jensen_shannon": 0.25}
    fitted = row(ece=0.1, brier=0.2, temperature=2.0, ece_calibrated=0.05, brier_calibrated=0.1, soft=soft)
    shown = str(calibration_table([fitted, row(model="svm")])).splitlines()
    numbers = ["0.500", "0.100", "0.050", "0.200", "0.100", "2.000", "3", "0.500", "0.250"]
    assert shown[2].split() == ["stage", "1", "c", "de", *numbers]
    assert shown[-1].split() == ["svm", "c", "de", "0.500"]


def test_retrieval_has_a_mean_where_two_languages_ask() -> None:
    one = {
        "map": 0.5,
        "map_chance": 0.2,
        "r_precision": 0.4,
        "r_precision_chance": 0.1,
        "map_low": 0.4,
        "map_high": 0.6,
    }
    asked = [row(n=9, parallel=0, clips=9, drawn=9, **one), row(n=9, parallel=0, clips=9, drawn=9, **one)]
    asked[1] |= {"language": "el", "map": 0.7}
    assert retrieval_means(asked)["stage1"]["map"] == pytest.approx(0.6)
    assert "mean over languages" in str(retrieval_table(asked)) and "R@1" not in str(retrieval_table(asked))
    nothing = asked[1] | dict.fromkeys(one)
    assert retrieval_means([asked[0], nothing]) == {}
    assert "were drawn" in str(below([row()], [asked[0] | {"clips": 20}])[-1])
