"""Two real ranks under ZeRO-3 are killed, stopped, signalled and fed with what is not a number: nothing is lost.

`tools/fault_drill.py` runs these tests and writes what they found to a JSON file.
"""

import json
import shutil
import time
from pathlib import Path

import pandas
import psutil
import pytest
import torch
from safetensors.torch import load_file

from mser_dist.ranks.boundary import time_to_save
from mser_dist.ranks.preempt import SAVED
from mser_dist.ranks.watchdog import LOST
from mser_dist.state import seal
from mser_dist.state.seal import read_seal, seal_fault
from tests.tiny_runs import LLM, TWO, losses, mser, stage1, stage2

pytestmark = [pytest.mark.faults, pytest.mark.distributed, pytest.mark.timeout(600)]

PLAIN = ["train.save_every=2", "train.keep=9", "tracking.enabled=false"]


def drilled(what: str, *words: str, cwd: Path, code: int) -> str:
    """Run a command in whose ranks `what` happens (see ``inject/sitecustomize.py``)."""
    return mser(*words, *TWO, cwd=cwd, code=code, MSER_DRILL=what)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def whole(folder: Path) -> bool:
    sealed, fault = read_seal(folder)
    return fault is None and seal_fault(folder, sealed) is None


def same_model(one: Path, two: Path) -> None:
    for part in sorted((one / "export").rglob("*.safetensors")):
        a, b = load_file(part), load_file(two / "export" / part.relative_to(one / "export"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), part


def no_orphan(folder: Path) -> None:
    left = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]
    _, alive = psutil.wait_procs(left, timeout=3)  # what serves the store looks after its rank five times a second
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"


@pytest.fixture(scope="module")
def work(finished_stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small set and an undisturbed stage 1 of six steps, in ``runs/whole``."""
    folder = tmp_path_factory.mktemp("drills") / "work"
    shutil.copytree(finished_stage1, folder)
    return folder


@pytest.mark.drill("kill9")
def test_a_kill_at_any_point_of_a_save_loses_nothing_that_was_saved(work: Path) -> None:
    run, folder = work / "runs/killed", work / "runs/killed/checkpoints"
    words = stage1("runs/killed", "train.save_every=2", "train.keep=1", "tracking.enabled=false", "train.val_every=0")
    kill = 128 + 9
    drilled("0|half-written|KILL", *words, cwd=work, code=kill)
    assert checkpoints(run) == ["step-000002.partial"]
    drilled("0|written|KILL", *words, cwd=work, code=kill)
    assert checkpoints(run) == ["step-000002.partial"], "all of it is there, and no seal"
    drilled("0|sealed|KILL", *words, cwd=work, code=kill)
    assert checkpoints(run) == ["step-000002.partial"], "sealed, and not published"
    drilled("0|published|KILL", *words, cwd=work, code=kill)
    assert checkpoints(run) == ["step-000002"] and whole(folder / "step-000002")
    drilled("1|half-written|KILL", *words, cwd=work, code=kill)
    assert whole(folder / "step-000002"), "of the other rank's death too"
    drilled("0|mid-prune|KILL", *words, cwd=work, code=kill)
    assert "step-000004" in checkpoints(run) and whole(folder / "step-000004")
    mser(*words, *TWO, cwd=work)
    assert checkpoints(run) == ["step-000006"], "the remains are cleared away"
    assert losses(run) == losses(work / "runs/whole")
    same_model(work / "runs/whole", run)
    no_orphan(work)


@pytest.mark.drill("broken-end")
def test_what_breaks_behind_the_last_step_leaves_its_checkpoint(work: Path) -> None:
    """The last validation, the export and a plot: the same command goes on from the last step."""
    run = work / "runs/broken"
    words = stage1("runs/broken", "train.val_every=0", "tracking.enabled=false")
    for point in ("validating", "exporting", "drawing"):
        error = drilled(f"0|{point}|RAISE", *words, cwd=work, code=1)
        assert f"broken on purpose: {point}" in error
        assert checkpoints(run) == ["step-000006"] and whole(run / "checkpoints/step-000006")
        assert not (run / "summary.json").exists()
    assert "continuing from step 6" in mser(*words, *TWO, cwd=work)
    assert len((run / "log.jsonl").read_text().splitlines()) == 6 + 1, "six steps and one validation, each once"
    same_model(work / "runs/whole", run)


@pytest.mark.drill("two-generations")
def test_the_older_checkpoint_goes_only_when_the_newer_one_is_published(work: Path) -> None:
    words = stage1("runs/two", "train.save_every=2", "train.keep=2", "tracking.enabled=false", "train.val_every=0")
    drilled("0|mid-prune|KILL", *words, cwd=work, code=128 + 9)
    found = checkpoints(work / "runs/two")
    assert found == ["step-000002.partial", "step-000004", "step-000006"]
    assert whole(work / "runs/two/checkpoints/step-000004") and whole(work / "runs/two/checkpoints/step-000006")


@pytest.mark.drill("corrupt-checkpoint")
def test_a_damaged_checkpoint_is_found_and_never_a_silent_restart(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "LATE", 0.0)  # of this process: no file here is late
    run = work / "runs/damaged"
    shutil.copytree(work / "runs/whole", run)
    (run / "summary.json").unlink()
    (run / "log.jsonl").unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("runs/whole", "runs/damaged"))
    newest = run / "checkpoints/step-000006"
    files = sorted(newest.iterdir())
    assert [file.name for file in files if "rank" in file.name] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    for file in files:
        good = file.read_bytes()
        for bad in (good[: len(good) // 2], b"", bytes([good[0] ^ 1]) + good[1:], good[:-1] + bytes([good[-1] ^ 1])):
            file.write_bytes(bad)
            assert not whole(newest), f"{file.name} was changed"
        file.unlink()
        assert not whole(newest), f"{file.name} was removed"
        file.write_bytes(good)
    (newest / "more.bin").write_bytes(b"x")
    assert not whole(newest), "a file was added"
    (newest / "more.bin").unlink()
    assert whole(newest)
    weights = newest / "rank-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    words = stage1("runs/damaged", *PLAIN)
    mser(*words, *TWO, cwd=work)
    assert sorted(losses(run)) == [5, 6], "it went on from the one before"
    same_model(work / "runs/whole", run)
    (run / "summary.json").unlink()
    for folder in (run / "checkpoints").iterdir():
        (folder / "random-00001.safetensors").write_bytes(b"")
    error = mser(*words, *TWO, cwd=work, code=2)
    assert "step-000006/random-00001.safetensors differs" in error and "move the folder away" in error
    assert "Traceback" not in error and sorted(losses(run)) == [5, 6], "nothing was trained"


@pytest.mark.drill("signal-one-rank")
def test_a_signal_to_one_rank_saves_the_same_step_everywhere(work: Path) -> None:
    run = work / "runs/signalled"
    words = stage1("runs/signalled", "train.save_every=5", "train.keep=9", "tracking.enabled=false")
    words.append("train.save_best=false")
    error = drilled("1|starting DeepSpeed|INT", *words, cwd=work, code=SAVED)  # before the first step
    assert "SIGINT: stopped at step 0" in error and not (run / "checkpoints").exists()
    error = drilled("1|step 1|TERM", *words, cwd=work, code=SAVED)  # in a step
    [stopped] = checkpoints(run)  # in that step, or in the next where rank 0 had looked already
    assert stopped in ("step-000001", "step-000002") and f"SIGTERM: stopped at step {stopped[-1]}" in error
    error = drilled("0|validating|USR2", *words, cwd=work, code=SAVED)  # in a validation
    assert "SIGUSR2: stopped at step 2" in error and checkpoints(run)[-1] == "step-000002"
    drilled("1|half-written|USR2|TERM", *words, cwd=work, code=SAVED)  # in the save of step 5, and twice
    assert int(checkpoints(run)[-1][5:]) in (5, 6)
    if not (run / "summary.json").exists():
        mser(*words, *TWO, cwd=work)
    assert losses(run) == losses(work / "runs/whole")
    same_model(work / "runs/whole", run)
    assert json.loads((run / "summary.json").read_text())["validation"]


@pytest.mark.drill("signal-one-rank")
def test_a_signal_to_one_rank_ends_an_evaluation_which_goes_on(work: Path) -> None:
    """What was scored before the signal, what after it, and what one process scores, are the same to the last bit."""
    words = ["eval", "demo_eval", "data.sets=shards", "stage1=runs/whole", "stage2=null", "batch=4"]
    mser(*words, "out=runs/alone", "tracking.enabled=false", cwd=work, OMP_NUM_THREADS="1")  # as ranks have
    words.append("out=runs/eval")
    error = drilled("1|evaluate stage 1, batch 1|USR2", *words, cwd=work, code=SAVED)
    assert "SIGUSR2: stopped between two batches; the same command goes on from there" in error
    stopped = json.loads((work / "runs/eval/mlflow.json").read_text())
    assert stopped["status"] == "KILLED"
    output = mser(*words, *TWO, cwd=work)
    clips = pandas.read_parquet(work / "runs/alone/predictions.parquet")
    assert len(clips) % 4, "the last batch is filled up"
    assert f"evaluate stage 1: 2 of {-(-len(clips) // 4)} batches were done before" in output
    assert "unseen languages" in output
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(work / "runs/eval/predictions.parquet"), clips, check_exact=True
    )
    assert not (work / "runs/eval/parts").exists()
    ended = json.loads((work / "runs/eval/mlflow.json").read_text())
    assert ended["status"] == "FINISHED" and ended["key"] == stopped["key"], "the same MLflow run"


@pytest.mark.drill("peer-killed")
def test_a_killed_rank_ends_the_job(work: Path) -> None:
    error = drilled("1|step 3|KILL", *stage1("runs/dead", *PLAIN), cwd=work, code=128 + 9)
    assert "rank 1 was ended by SIGKILL" in error
    assert checkpoints(work / "runs/dead")[-1].startswith("step-000002")
    no_orphan(work)


@pytest.mark.drill("encode-killed")
def test_a_rank_killed_while_it_encodes_costs_what_it_had_in_hand(work: Path) -> None:
    """The other one keeps what it has encoded; the next start encodes what is missing."""
    words = stage1("runs/encoding", *PLAIN, "encoder.freeze=true", "encoder.cache_dir=features")
    error = drilled("1|encoding the clips|KILL", *words, cwd=work, code=128 + 9)
    assert "rank 1 was ended by SIGKILL" in error
    no_orphan(work)
    kept = list((work / "features").rglob("*.features"))
    assert len(kept) == 1, "of rank 0, whole; what rank 1 had begun has no name yet"
    output = mser(*words, *TWO, cwd=work)
    there = int(output.split("features: 48 clips")[1].split(" were there")[0].rpartition("(")[2])
    assert 0 < there < 48 and all(file.exists() for file in kept)
    assert sorted(losses(work / "runs/encoding")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.drill("peer-frozen")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_is_named_and_the_job_ends(work: Path, rank: int) -> None:
    words = stage1(f"runs/frozen{rank}", *PLAIN, "engine.peer_seconds=6")
    error = drilled(f"{rank}|step 3|STOP", *words, cwd=work, code=LOST)
    assert f"rank {rank} " in error and "dead or frozen" in error
    no_orphan(work)


@pytest.mark.drill("peer-frozen")
def test_a_rank_that_hangs_is_named_although_its_process_lives(work: Path) -> None:
    words = stage1("runs/stuck", *PLAIN, "engine.timeout_minutes=0.2")
    error = drilled("1|step 3, data|HANG", *words, cwd=work, code=LOST)
    assert "rank 1 on " in error and "(at: step 3, data)" in error and "stuck" in error
    no_orphan(work)


@pytest.mark.drill("time-limit")
def test_a_job_stops_and_saves_before_its_time_is_over(work: Path) -> None:
    words = stage1("runs/late", "train.steps=5000", "train.val_every=0", "tracking.enabled=false")
    job = {"SLURM_JOB_ID": "1"}
    ends = str(time.time() + time_to_save(0) + 35)
    error = mser(*words, *TWO, cwd=work, code=SAVED, SLURM_JOB_END_TIME=ends, **job)
    assert "the job's time is almost over: stopped at step" in error
    saved = checkpoints(work / "runs/late")
    assert len(saved) == 1 and time.time() < float(ends)
    error = mser(*words, *TWO, cwd=work, code=2, SLURM_JOB_END_TIME=str(time.time() + 5), **job)
    assert "a save alone may take" in error and "--time" in error
    assert checkpoints(work / "runs/late") == saved


@pytest.mark.drill("nonfinite-one-rank")
def test_what_is_not_finite_changes_nothing_and_is_written_down(work: Path) -> None:
    words = stage1("runs/nan", "train.save_every=1", "train.keep=9", "tracking.enabled=false", "train.val_every=0")
    error = drilled("1|step 3|NAN;1|step 5|NAN;1|step 6|NAN", *words, "train.max_skipped=1", cwd=work, code=2)
    assert "not finite at rank 1" in error and "train.max_skipped=1" in error and "Traceback" not in error
    run = work / "runs/nan"
    for rank in range(2):
        before, after = (
            load_file(run / f"checkpoints/step-00000{step}/rank-0000{rank}.safetensors") for step in (2, 3)
        )
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    rows = [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5, 6]
    assert [row["ranks"]["0"]["finite_input"] for row in rows] == [True] * 3
    assert [row["ranks"]["1"]["finite_input"] for row in rows] == [False] * 3
    assert all(len(row["ranks"]["1"]["samples"]) == 4 for row in rows)


@pytest.mark.drill("elastic-2-1-2")
@pytest.mark.timeout(900)
def test_another_number_of_ranks_goes_on_with_the_same_batches(work: Path) -> None:
    """2 → 1 → 2 ranks, in both stages. Without dropout, which another number of ranks draws otherwise."""
    words = ["train.steps=6", "train.save_every=2", "train.keep=9", "train.val_every=0", "tracking.enabled=false"]
    words += ["data.val_split=null"]

    def one(out: str) -> list[str]:
        return stage1(out, "qformer.dropout=0.0", *words)

    def two(out: str) -> list[str]:
        # One rank accumulates twice as many micro-batches as each of two, and 3 steps of those do not fill its own.
        return stage2(out, LLM, "stage1=runs/straight-one", "train.micro_batch=2", *words)

    for make in (one, two):
        straight, elastic = (f"runs/{kind}-{make.__name__}" for kind in ("straight", "elastic"))
        mser(*make(straight), *TWO, cwd=work)
        drilled("0|step 3|USR1", *make(elastic), cwd=work, code=SAVED)
        inject = {"MSER_DRILL": "single|step 4|USR1"}
        mser(*make(elastic), cwd=work, code=SAVED, **inject)
        mser(*make(elastic), *TWO, cwd=work)
        assert losses(work / elastic) == pytest.approx(losses(work / straight), rel=1e-5)
        for part in sorted((work / straight / "export").rglob("*.safetensors")):
            a, b = load_file(part), load_file(work / elastic / part.relative_to(work / straight))
            for name in a:
                if name.endswith(("key.bias", "k_proj.bias")):
                    continue  # softmax does not see them: their gradient is of rounding alone, which Adam scales up
                if not a[name].is_floating_point():  # the hashes of the ledger
                    assert torch.equal(a[name], b[name])
                    continue
                assert (a[name] - b[name]).norm() <= 1e-5 * a[name].norm() + 1e-7, name
