"""The job scripts on a real SLURM: both stages, evaluation and packing, and what ends a job early."""

import csv
import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from mser_dist import audio
from mser_dist.runs.tracking import run_id_of
from mser_dist.synth.speech import SynthConfig
from mser_dist.synth.write import write_set
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT
from tests.tiny_runs import ENCODER, LLM, QFORMER, losses, mser
from tests.unit import made_up_recordings
from tests.unit.made_up_set import pcm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

CPU_ONLY = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=20"]
TWO_NODES = ["--nodes=2", *CPU_ONLY]
LONG = 100  # steps: a quarter of a minute, or more
COMMON = ["data.sets=shards", "data.workers=0", "train.global_batch=8", "train.log_every=1", "train.val_every=0"]
STAGE1 = ["demo_stage1", *COMMON, ENCODER, *QFORMER]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are submitted: a small synthetic set in `shards`."""
    folder = tmp_path_factory.mktemp("jobs")
    small = SynthConfig(
        languages=("en", "de"), unseen_languages=("el",), train_sentences=2, val_sentences=1, test_sentences=1,
        train_takes=1, val_takes=1, test_takes=1, val_voices=2, test_voices=2,
    )  # fmt: skip
    write_set(folder / "shards", small)
    return folder


def script(stage: str) -> Path:
    return ROOT / "slurm" / f"{stage}.sh"


def wait_for(text: str, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in {log.name}: {log.read_text() if log.exists() else 'none'}"
        time.sleep(0.3)


def test_stage_1_stage_2_and_evaluation_follow_each_other(cluster: Cluster, folder: Path) -> None:
    """Submitted at once, each waiting for the one before; every part runs on two nodes."""
    tmp = {"TMPDIR": str(folder / "node")}
    (folder / "node").mkdir()
    one = cluster.sbatch(*TWO_NODES, script("stage1"), *STAGE1, "out=runs/one", "train.steps=2", cwd=folder, env=tmp)
    words = ["demo_stage2", *COMMON, LLM, "stage1=runs/one", "out=runs/two", "train.steps=2"]
    two = cluster.sbatch(*TWO_NODES, f"--dependency=afterok:{one}", script("stage2"), *words, cwd=folder, env=tmp)
    words = ["demo_eval", "stage1=runs/one", "stage2=runs/two", "data.sets=shards", "data.workers=0", "out=runs/eval"]
    three = cluster.sbatch(*TWO_NODES, f"--dependency=afterok:{two}", script("eval"), *words, cwd=folder, env=tmp)
    for name, job in (("stage1", one), ("stage2", two), ("eval", three)):
        state, log = cluster.wait_state(job, timeout=200), folder / f"slurm-mser-{name}-{job}.out"
        assert state == "COMPLETED", log.read_text() if log.exists() else f"{name}: no output"
    assert sorted(losses(folder / "runs/one")) == [1, 2] and sorted(losses(folder / "runs/two")) == [1, 2]
    assert (folder / "runs/eval").is_dir() and "el" in (folder / f"slurm-mser-eval-{three}.out").read_text()
    step = {row["JobID"]: row for row in cluster.sacct(two, "NTasks", "NodeList")}[f"{two}.0"]
    assert (step["NTasks"], step["NodeList"]) == ("2", "node[1-2]")
    assert not list((folder / "node").glob("mser-*")), "caches of compiled kernels stay behind"


def test_the_jobs_of_an_array_encode_what_a_training_then_reads(cluster: Cluster, folder: Path) -> None:
    """Two jobs, each its part of the clips, into a folder that both see."""
    words = [*STAGE1, "encoder.freeze=true", "out=runs/frozen", "train.steps=2"]
    features = str(folder / "features")
    options = ["--array=0-1", *CPU_ONLY]
    job = cluster.sbatch(*options, script("features"), *words, cwd=folder, env={"MSER_FEATURES": features})
    logs = [folder / f"slurm-mser-features-{job}_{task}.out" for task in range(2)]
    for task, log in enumerate(logs):
        state = cluster.wait_state(f"{job}_{task}", timeout=200)
        assert state == "COMPLETED", log.read_text() if log.exists() else f"part {task}: no output"
        assert f"all of part {task} of 2 is there: {folder}/features" in log.read_text()
    kept = list((folder / "features").rglob("*.features"))
    whole = mser("features", *words, "--dry-run", cwd=folder, OMP_NUM_THREADS="1", MSER_FEATURES=features)
    assert whole.count(" 0 to encode") == 2 and len(kept) >= 2, whole


def test_pack_makes_shards(cluster: Cluster, tmp_path: Path) -> None:
    with (tmp_path / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "emotion", "language", "speaker"])
        for i in range(12):
            (tmp_path / f"{i}.wav").write_bytes(audio.encode(pcm(i), 16000, "wav"))
            table.writerow([f"{i}.wav", "happy" if i % 2 else "sad", "de", f"speaker {i % 6}"])
    words = ["manifest", "clips.csv", "my shards", "--val-fraction", "0.2"]
    job = cluster.sbatch("--cpus-per-task=1", script("pack"), *words, cwd=tmp_path)
    log = tmp_path / f"slurm-mser-pack-{job}.out"
    assert cluster.wait_state(job) == "COMPLETED", log.read_text()
    assert list((tmp_path / "my shards").glob("train-*.tar")) and "12 clips" in log.read_text()


def test_the_jobs_of_an_array_translate_a_set(cluster: Cluster, tmp_path: Path) -> None:
    """Two jobs, each its part; the last one writes the set, which is that of one process."""
    recordings = made_up_recordings.write_set(tmp_path / "set", {f"a{i}": "train" for i in range(40)})
    asked = made_up_recordings.config(tmp_path)
    made_up_recordings.run(recordings, tmp_path / "alone", asked)
    words = [f"text.table={asked.text.table}", "speech.backend=command", f"speech.command={asked.speech.command}"]
    words += ["selection.whisper=null", "--to", "de,fr"]
    options = ["--array=0-1", "--cpus-per-task=1", "--time=20"]
    job = cluster.sbatch(*options, script("translate"), "set", "whole", *words, cwd=tmp_path)
    for task in range(2):
        log = tmp_path / f"slurm-mser-translate-{job}_{task}.out"
        state = cluster.wait_state(f"{job}_{task}", timeout=200)
        assert state == "COMPLETED", log.read_text() if log.exists() else f"part {task}: no output"
        assert f"{[48, 32][task]} of them here" in log.read_text()
    assert made_up_recordings.same(tmp_path / "alone", tmp_path / "whole")


def test_an_allocation_that_does_not_match_the_config_is_one_line_and_no_requeue(
    cluster: Cluster, folder: Path
) -> None:
    words = [*STAGE1, "out=runs/uneven", "train.global_batch=9"]
    for check in ("0", "1"):  # by the ranks, and by the check in front of them
        job = cluster.sbatch(*TWO_NODES, script("stage1"), *words, cwd=folder, env={"MSER_CHECK": check})
        assert cluster.wait_state(job) == "FAILED"
        shown, log = cluster.show(job), (folder / f"slurm-mser-stage1-{job}.out").read_text()
        assert shown["ExitCode"] == "2:0" and shown["Restarts"] == "0"
        said = [line for line in log.splitlines() if "mser: error" in line]
        assert len(said) == 1 and "global_batch" in said[0] and "Traceback" not in log
        assert ("would fail" in log) == (check == "1")


def test_a_cancelled_training_saves_and_stays_cancelled(cluster: Cluster, folder: Path) -> None:
    words = [*STAGE1, "out=runs/cancelled", "train.steps=100000"]
    job = cluster.sbatch(*TWO_NODES, script("stage1"), *words, cwd=folder)
    wait_for('"step": 3', folder / "runs/cancelled/log.jsonl")
    cluster.ask("scancel", job)
    assert cluster.wait_state(job) == "CANCELLED"
    log = (folder / f"slurm-mser-stage1-{job}.out").read_text()
    assert cluster.sacct(job)[0]["State"].startswith("CANCELLED") and cluster.show(job)["Restarts"] == "0"
    assert list((folder / "runs/cancelled/checkpoints").glob("step-*")), log


def undisturbed(folder: Path) -> dict[int, float]:
    """The losses of the same training, two ranks without SLURM."""
    run = folder / "runs/undisturbed"
    if not run.exists():
        words = ["train", *STAGE1, "out=runs/undisturbed", f"train.steps={LONG}", "tracking.enabled=false"]
        mser(*words, "--nproc", "2", cwd=folder, OMP_NUM_THREADS="1")
    return losses(run)


def seconds_to_a_step(cluster: Cluster, job: str, run: Path, after: int = 0) -> float:
    """From the job's last start to the first step behind `after`."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = next(row["time"] for row in rows if "train/loss" in row and row["step"] > after)
    return float(first) - datetime.fromisoformat(cluster.show(job)["StartTime"]).timestamp()


def rank_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("SLURM_PROCID")
    except psutil.Error:  # it has just ended
        return None


@pytest.mark.drill("slurm-node-death")
def test_a_node_that_dies_takes_the_job_back_to_its_last_checkpoint(cluster: Cluster, folder: Path) -> None:
    """All processes of one node's step are killed, SLURM's own among them; the rest ends, and the job starts again."""
    run = folder / "runs/node"
    words = [*STAGE1, "out=runs/node", f"train.steps={LONG}", "train.save_every=4", "engine.peer_seconds=10"]
    words.append("tracking.run_name=node")
    job = cluster.sbatch(*TWO_NODES, script("stage1"), *words, cwd=folder, env={"MSER_LINGER": "20"})
    wait_for('"step": 6', run / "log.jsonl")
    name = f"slurmstepd: [{job}.0]"
    steps = [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]
    assert len(steps) == 2, "one for each node"
    victim = next(p for p in steps if any(rank_of(c) == "1" for c in p.children(recursive=True)))
    for process in [victim, *victim.children(recursive=True)]:
        process.kill()
    expected = undisturbed(folder)  # meanwhile: the machine has nothing to do until the job starts again
    log = folder / f"slurm-mser-stage1-{job}.out"
    assert cluster.wait_state(job, timeout=240) == "COMPLETED", log.read_text()
    assert cluster.show(job)["Restarts"] == "1"
    assert losses(run) == expected
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    mine = client.get_run(str(run_id_of(run)))
    logged = Counter(point.step for point in client.get_metric_history(mine.info.run_id, "train/loss"))
    assert mine.info.status == "FINISHED" and logged == Counter(range(1, LONG + 1)), "one run, and no step twice"
    assert len(client.search_runs([mine.info.experiment_id], "tags.mlflow.runName = 'node'")) == 1


@pytest.mark.drill("slurm-preempt-requeue")
def test_a_preempted_training_saves_in_the_grace_time_and_goes_on(
    cluster: Cluster, folder: Path, record_property: Callable[[str, object], None]
) -> None:
    """USR2 reaches the ranks, they save and leave with 75, the job script queues the job again, and it ends well."""
    run = folder / "runs/preempted"
    words = [*STAGE1, "out=runs/preempted", f"train.steps={LONG}"]
    low = cluster.sbatch(*TWO_NODES, "--exclusive", script("stage1"), *words, cwd=folder)
    wait_for('"step": 3', run / "log.jsonl")
    cold = seconds_to_a_step(cluster, low, run)
    high = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    high_job = cluster.sbatch(*high, "--wrap", "true", cwd=folder)
    assert cluster.wait_state(high_job) == "COMPLETED"
    [saved] = (int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    log = folder / f"slurm-mser-stage1-{low}.out"
    assert cluster.wait_state(low, timeout=240) == "COMPLETED", log.read_text()
    again = seconds_to_a_step(cluster, low, run, saved)
    record_property("from the job's start to its first new step", f"cold {cold:.1f} s, requeued {again:.1f} s")
    assert again <= 1.5 * cold, "a start after a requeue takes as long as any other"
    assert cluster.show(low)["Restarts"] == "1" and "USR2" in log.read_text()
    assert losses(run) == undisturbed(folder)
