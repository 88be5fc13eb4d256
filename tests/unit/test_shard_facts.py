"""What a dataset.json that anyone may have written can make of a set."""

from typing import Any

import pytest

from mser_dist.errors import UserError
from mser_dist.shards.source import facts

GOOD: dict[str, Any] = {"file": "train-000000.tar", "count": 1, "bytes": 1, "sha256": "a" * 64, "index": "b" * 64}


def described(**change: Any) -> dict[str, Any]:
    return {"splits": {"train": {"shards": [GOOD | change]}}}


def test_a_described_shard_is_taken() -> None:
    assert facts(described(), "dataset.json") == {GOOD["file"]: GOOD}


@pytest.mark.parametrize("key", ["sha256", "index"])
@pytest.mark.parametrize("value", ["../../../../evil", "", "a" * 63, "a" * 64 + "\n", 7])
def test_a_hash_that_is_none_is_refused(key: str, value: Any) -> None:
    """It becomes the name of a file in the cache."""
    with pytest.raises(UserError, match=r"dataset.json: does not"):
        facts(described(**{key: value}), "dataset.json")
