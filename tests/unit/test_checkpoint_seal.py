import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mser_dist.checkpoint import Checkpoints, seal_fault
from mser_dist.distributed import World


def publish(run: Path, step: int, keep: int = 9) -> Path:
    """A published checkpoint with two small files in place of DeepSpeed's."""
    checkpoints = Checkpoints(run, World(), keep)
    staging = checkpoints.folder / f"step-{step:06d}.partial"
    (staging / "engine").mkdir(parents=True)
    (staging / "engine" / "zero_pp_rank_0.pt").write_bytes(bytes(range(256)) * step)
    (staging / "random-00000.safetensors").write_bytes(b"random")
    checkpoints._publish(staging, f"step-{step:06d}", {"step": step, "world_size": 1})
    return checkpoints.folder / f"step-{step:06d}"


def choose(run: Path) -> tuple[str | None, str | None]:
    return Checkpoints(run, World(), 2)._choose()


def test_a_published_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = publish(tmp_path, 3)
    assert seal_fault(folder) is None
    sealed = json.loads((folder / "seal.json").read_text())
    assert sealed.keys() == {"engine/zero_pp_rank_0.pt", "random-00000.safetensors", "state.json"}
    assert json.loads((folder / "state.json").read_text()) == {"step": 3, "world_size": 1}
    assert [path.name for path in folder.parent.iterdir()] == ["step-000003"], "nothing of the staging is left"


def flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda f: (f / "engine/zero_pp_rank_0.pt").write_bytes(b"\0"),
        "engine/zero_pp_rank_0.pt differs from its seal",
    ),
    "flipped": (lambda f: flip(f / "engine/zero_pp_rank_0.pt"), "engine/zero_pp_rank_0.pt differs from its seal"),
    "missing": (lambda f: (f / "random-00000.safetensors").unlink(), "random-00000.safetensors is missing"),
    "other state": (
        lambda f: (f / "state.json").write_text('{"step": 9, "world_size": 1}'),
        "state.json differs from its seal",
    ),
    "no seal": (lambda f: (f / "seal.json").unlink(), "has no readable seal.json"),
    "cut seal": (
        lambda f: (f / "seal.json").write_bytes((f / "seal.json").read_bytes()[:50]),
        "has no readable seal.json",
    ),
    "seal of zeros": (lambda f: (f / "seal.json").write_bytes(bytes(50)), "has no readable seal.json"),
    "seal of another shape": (lambda f: (f / "seal.json").write_text('{"state.json": 3}'), "has no readable seal.json"),
    "seal that is a list": (lambda f: (f / "seal.json").write_text("[]"), "has no readable seal.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_the_one_before_is_taken(name: str, tmp_path: Path) -> None:
    damage, says = DAMAGES[name]
    older, newer = publish(tmp_path, 1), publish(tmp_path, 2)
    damage(newer)
    fault = seal_fault(newer)
    assert fault and fault.startswith("step-000002") and fault.endswith(says)
    with pytest.warns(UserWarning, match="falling back to .*step-000001: step-000002"):
        assert choose(tmp_path) == (str(older), None)


def test_the_newest_whole_one_is_taken_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    publish(tmp_path, 1)
    newest = publish(tmp_path, 20)
    (newest.parent / "step-000030.partial").mkdir()
    (newest.parent / "step-notes").mkdir()
    (newest.parent / "step-000040").write_text("a file")
    assert choose(tmp_path) == (str(newest), None)
    assert not recwarn.list


def test_a_fresh_run_has_none(tmp_path: Path) -> None:
    assert choose(tmp_path) == (None, None)
    (tmp_path / "checkpoints" / "step-000001.partial").mkdir(parents=True)
    assert choose(tmp_path) == (None, None)


def test_none_whole_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(publish(tmp_path, step) / "engine/zero_pp_rank_0.pt")
    chosen, problem = choose(tmp_path)
    assert chosen is None
    assert problem is not None and "\n" not in problem
    assert "no checkpoint in" in problem and "step-000001" in problem and "step-000002" in problem


def test_pruning_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):  # a name of seven digits sorts before one of six
        publish_light(tmp_path, step)
    checkpoints = Checkpoints(tmp_path, World(), 2)
    assert [path.name for path in checkpoints.published()] == ["step-999999", "step-1000000"]
    assert choose(tmp_path)[0] == str(tmp_path / "checkpoints" / "step-1000000")


def publish_light(run: Path, step: int) -> None:
    checkpoints = Checkpoints(run, World(), keep=2)
    staging = checkpoints.folder / f"step-{step:06d}.partial"
    staging.mkdir(parents=True)
    checkpoints._publish(staging, f"step-{step:06d}", {"step": step})


def test_publishing_a_step_again_replaces_it(tmp_path: Path) -> None:
    flip(publish(tmp_path, 4) / "engine/zero_pp_rank_0.pt")
    assert seal_fault(publish(tmp_path, 4)) is None


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    publish(tmp_path, 1, keep=0)
    publish(tmp_path, 2, keep=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
