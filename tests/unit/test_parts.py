"""What an evaluation keeps of itself while it is under way."""

from pathlib import Path

import numpy as np
import pytest

from mser_dist.errors import UserError
from mser_dist.evaluation import parts
from mser_dist.evaluation.parts import Parts
from mser_dist.ranks.distributed import World

MADE_OF = {"card": {"stage": 1, "labels": ["anger", "Ärger"]}, "clips": 5}


def add(kept: Parts, number: int, *clips: int) -> None:
    found = {"scores": np.array([[clip, clip / 2] for clip in clips]), "embedding": np.ones((len(clips), 3))}
    kept.add(number, np.array(clips), found)


def test_what_was_added_is_there_for_the_next_start(tmp_path: Path) -> None:
    kept = Parts(tmp_path / "stage1", MADE_OF, World())
    assert len(kept.done()) == 0
    with pytest.raises(KeyboardInterrupt), kept.writing():
        add(kept, 3, 6, 7)
        add(kept, 1, 2)  # one of its clips could not be read
        raise KeyboardInterrupt
    again = Parts(tmp_path / "stage1", MADE_OF, World())
    assert again.done().tolist() == [1, 3]
    with again.writing():
        add(again, 0, 1, 0)
        add(again, 2, 5, 4)
    numbers, found = again.read(4)
    assert numbers.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert found["scores"].tolist() == [[clip, clip / 2] for clip in numbers] and found["embedding"].shape == (7, 3)


@pytest.mark.parametrize("what", ["card", "clips", "new"])
def test_rows_of_anything_else_are_removed(tmp_path: Path, what: str) -> None:
    kept = Parts(tmp_path / "stage1", MADE_OF, World())
    kept.done()
    with kept.writing():
        add(kept, 0, 0, 1)
    assert len(Parts(tmp_path / "stage1", MADE_OF, World()).done()) == 1
    assert len(Parts(tmp_path / "stage1", MADE_OF | {what: 6}, World()).done()) == 0
    assert not list((tmp_path / "stage1").glob("*.npz"))


def test_a_damaged_file_costs_its_batches_alone(tmp_path: Path) -> None:
    kept = Parts(tmp_path / "stage1", MADE_OF, World())
    kept.done()
    for number in range(2):
        with kept.writing():
            add(kept, number, number)
    first, _ = sorted((tmp_path / "stage1").glob("*.npz"))
    first.write_bytes(first.read_bytes()[:-40])
    assert kept.done().tolist() == [1] and not first.exists()


def test_files_that_do_not_come_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PATIENCE", 0.0)
    kept = Parts(tmp_path / "stage1", MADE_OF, World())
    kept.done()
    with kept.writing():
        add(kept, 0, 0)
    with pytest.raises(UserError, match="shows 1 of 3 batches that the ranks have scored: set out= to a folder on a"):
        kept.read(3)
