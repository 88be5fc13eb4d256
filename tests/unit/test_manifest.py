"""The manifest of a checkpoint says what the ranks' files say, and does not grow with their product."""

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mser_dist.state import manifest


def described(numels: list[int], ranks: int, flat: bool) -> list[dict[str, Any]]:
    """Every rank's description of parameters that are cut evenly, or flattened together and cut once."""
    total = -(-sum(numels) // ranks) * ranks
    found: list[dict[str, Any]] = []
    for rank in range(ranks):
        entries, before = dict[str, Any](), 0
        for number, numel in enumerate(numels):
            if flat:
                start = min(max(rank * total // ranks - before, 0), numel)
                count = max(0, min((rank + 1) * total // ranks - before, numel) - start)
            else:
                start, count = manifest.even(numel, rank, ranks)
            entries[f"p{number}"] = {"shape": [numel], "start": start, "count": count, "step": 3.0 if count else None}
            before += numel
        small: dict[str, Any] = {"buffers": {}, "groups": [], "scheduler": None, "loss_scaler": {}, "counters": {}}
        found.append({"rank": rank, "world_size": ranks, "parameters": entries, "slots": ["exp_avg"], **small})
    return found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 9), st.booleans(), st.data())
def test_it_finds_every_element_in_the_file_that_has_it(
    numels: list[int], ranks: int, flat: bool, data: st.DataObject
) -> None:
    ranked = described(numels, ranks, flat)
    found = json.loads(json.dumps(manifest.combine(ranked[0], [manifest.layout(one) for one in ranked])))
    for number, numel in enumerate(numels):
        name = f"p{number}"
        assert manifest.is_complete(found, name) and found["parameters"][name]["step"] == 3.0
        start = data.draw(st.integers(0, numel - 1))
        count = data.draw(st.integers(1, numel - start))
        held: dict[int, int] = {}
        for first, size, rank in manifest.pieces(found, name, start, count):
            entry = ranked[rank]["parameters"][name]
            assert (entry["start"], entry["count"]) == (first, size) and size
            held |= dict.fromkeys(range(first, first + size), rank)
        assert set(range(start, start + count)) <= held.keys()


def test_a_missing_piece_is_noticed() -> None:
    for flat in (True, False):
        ranked = described([40, 7], 4, flat)
        ranked[1]["parameters"]["p0"]["count"] = 0
        found = manifest.combine(ranked[0], [manifest.layout(one) for one in ranked])
        assert not manifest.is_complete(found, "p0") and manifest.is_complete(found, "p1")


def test_its_size_and_what_ranks_tell_do_not_grow_with_the_product() -> None:
    """300 parameters on 256 ranks: evenly cut they take no word of a rank's, flattened P + N pieces in all."""
    numels = [1000 + 7 * number for number in range(300)]
    for flat, most in ((False, 0), (True, 300 + 256)):
        ranked = described(numels, 256, flat)
        layouts = [manifest.layout(one) for one in ranked]
        assert sum(len(one["pieces"]) for one in layouts) <= most
        found = manifest.combine(ranked[0], layouts)
        assert len(json.dumps(found)) < 40_000 and math.prod(found["parameters"]["p9"]["shape"]) == 1063
