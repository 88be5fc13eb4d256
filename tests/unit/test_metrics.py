import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
)

from mser_dist.evaluation.metrics import score


def numbers(*values: int) -> np.ndarray:
    return np.array(values)


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    classes = draw(st.integers(2, 8))
    n = draw(st.integers(1, 40))
    # Of some classes only: others are absent from the reference, from the predictions, or from both.
    some = st.sets(st.integers(0, classes - 1), min_size=1).map(sorted)
    reference, predicted = (st.lists(st.sampled_from(draw(some)), min_size=n, max_size=n) for _ in range(2))
    return np.array(draw(reference)), np.array(draw(predicted)), classes


@given(answers())
@example((numbers(0, 0, 1), numbers(0, 1, 1), 4))  # two classes that nobody names
@example((numbers(0, 0, 1), numbers(2, 0, 3), 4))  # predictions of classes that the reference lacks
@example((numbers(0, 0), numbers(1, 1), 2))  # nothing in common
@example((numbers(2), numbers(2), 3))
def test_equal_to_scikit_learn(drawn: tuple[np.ndarray, np.ndarray, int]) -> None:
    reference, predicted, classes = drawn
    found = score(reference, predicted, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that some predicted classes are not in the reference
        ua = balanced_accuracy_score(reference, predicted)
    assert found.ua == pytest.approx(ua)
    assert found.wa == pytest.approx(accuracy_score(reference, predicted))
    # Classes without clips in the reference do not count; scikit-learn has to be told.
    macro = f1_score(reference, predicted, average="macro", labels=np.unique(reference), zero_division=0)
    assert found.macro_f1 == pytest.approx(macro)
    np.testing.assert_array_equal(found.confusion, confusion_matrix(reference, predicted, labels=range(classes)))
    assert (found.n, found.k) == (len(reference), len(np.unique(reference)))
    assert found.chance == 1 / found.k


def test_by_hand() -> None:
    # Three of class 0, two right; one of class 1, right; class 2 has none, and one clip is taken for it.
    found = score(np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1]), 3)
    assert found.ua == pytest.approx((2 / 3 + 1) / 2)
    assert found.wa == 3 / 4
    assert found.macro_f1 == pytest.approx((4 / 5 + 1) / 2)
    assert found.confusion.tolist() == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("there", [2, 5, 6])
def test_one_answer_for_all_is_chance(there: int) -> None:
    """Whatever labels could be answered too."""
    found = score(np.repeat(np.arange(there), 5), np.zeros(5 * there, dtype=int), 6)
    assert (found.k, found.constant) == (there, 0)
    assert found.ua == pytest.approx(found.chance)
    assert found.confusion.shape == (6, 6)


def test_one_answer_is_no_fault_where_clips_have_one_label() -> None:
    assert score(numbers(1, 1), numbers(1, 1), 2).constant is None
    assert score(numbers(1, 0), numbers(1, 0), 2).constant is None
    assert score(numbers(1, 0), numbers(2, 2), 3).constant == 2


@pytest.mark.parametrize(("reference", "predicted"), [([], []), ([0], [0, 1])])
def test_nothing_to_score_is_an_error(reference: list[int], predicted: list[int]) -> None:
    with pytest.raises(ValueError, match="references and"):
        score(np.array(reference, dtype=int), np.array(predicted, dtype=int), 2)
