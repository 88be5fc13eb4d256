"""The mean over languages, and what is no part of it."""

import math
from typing import Any

import pytest

from mser_dist.evaluation.headline import headline
from mser_dist.evaluation.means import left_out, macro_interval, macro_ua, means


def row(language: str, ua: float, seen: bool = False, leaks: str | None = None) -> dict[str, Any]:
    of = {"model": "stage1", "corpus": "c", "language": language, "seen_language": seen, "leaks": leaks}
    return of | {"ua": ua, "ua_low": ua - 0.1, "ua_high": ua + 0.1}


ROWS = [row("de", 0.9, seen=True), row("ru", 0.4), row("fa", 0.6), row("el", 0.95, leaks="heard"), row("und", 0.9)]


def test_what_leaks_or_has_no_name_is_no_unseen_language() -> None:
    assert macro_ua(ROWS, "stage1", False) == pytest.approx(0.5) and macro_ua(ROWS, "stage1", True) == 0.9
    assert headline(ROWS, "stage1") == {"test/ua_unseen": pytest.approx(0.5), "test/ua_seen": 0.9}
    wide = 0.1 / math.sqrt(2)
    assert [*(macro_interval(ROWS, "stage1", False) or ())] == [pytest.approx(0.5 - wide), pytest.approx(0.5 + wide)]
    assert [(one["seen"], one["n_rows"]) for one in means(ROWS)] == [(True, 1), (False, 2)]
    assert left_out(ROWS) == [
        "the mean over unseen languages is without el of c (it leaks), und of c (its language is not named)"
    ]


def test_where_none_is_left_there_is_no_mean() -> None:
    assert math.isnan(macro_ua(ROWS[3:], "stage1", False)) and means(ROWS[3:]) == []
    assert left_out(ROWS[:3]) == []
