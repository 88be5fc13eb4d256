"""submitit on a real SLURM: results over two nodes, dependencies, time-outs, cancelling, sweeps."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mser_dist.errors import UserError
from mser_dist.jobs import launch, sweep
from mser_dist.jobs.job import Job
from mser_dist.runs.record import run_id_of
from mser_dist.synth.speech import SynthConfig
from mser_dist.synth.write import write_set
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

ENCODER = "encoder.arch={d_model: 32, encoder_layers: 1, encoder_attention_heads: 2, encoder_ffn_dim: 64}"
WORDS = ["data.sets=shards", "data.workers=1", ENCODER, "qformer.width=32", "qformer.heads=2", "train.global_batch=8"]
WORDS += ["data.labels=[anger, happy, neutral, sad]", "train.log_every=1", "train.val_every=0"]
STEPS = 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submitit")
    small = SynthConfig(
        languages=("en",), unseen_languages=("el",), train_sentences=4, val_sentences=1, test_sentences=1,
        train_takes=1, val_takes=1, test_takes=1, val_voices=2, test_voices=2,
    )  # fmt: skip
    write_set(folder / "shards", small)
    return folder


@pytest.fixture
def here(data: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder, with this process and its jobs as clients of the cluster."""
    monkeypatch.chdir(data)
    for name in ("SLURM_CONF", "PYTHONPATH", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, cluster.env[name])
    for name in ("_ASK_EVERY", "_LATE"):
        monkeypatch.setattr(f"mser_dist.jobs.job.{name}", 1)
    return data


def stage1(out: str, *more: str, **how: Any) -> Job:
    return launch.submit("demo_stage1", [*WORDS, f"out={out}", *more], cpus_per_task=1, time=60, **how)


def losses(run: Path) -> dict[int, float]:
    """The last that was logged of each step: a start from a checkpoint repeats those behind it."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def wait_for_steps(job: Job, run: Path, steps: int) -> None:
    while not job.done() and not ((run / "log.jsonl").exists() and len(losses(run)) >= steps):
        time.sleep(0.2)
    assert not job.done(), job.stderr()


@pytest.mark.drill("submitit-timeout-requeue")
def test_a_run_out_of_time_saves_goes_back_in_the_queue_and_ends_like_an_undisturbed_one(
    here: Path, cluster: Cluster
) -> None:
    """The time limit itself ends it: submitit's signal, all ranks save, rank 0 requeues, the same numbers come out."""
    # Saving at every step makes it slow, and changes no number.
    job = stage1("runs/disturbed", f"train.steps={STEPS}", "train.save_every=1", nodes=2, signal_seconds=100)
    undisturbed = stage1("runs/undisturbed", f"train.steps={STEPS}", nodes=2)
    wait_for_steps(job, here / "runs/disturbed", 5)
    hours, minutes, seconds = map(int, cluster.show(job.job_id)["RunTime"].split(":"))
    ran = 3600 * hours + 60 * minutes + seconds
    # A limit is in whole minutes since the start. The signal is then due at once, and at least 25 s are left to save.
    cluster.ask("scontrol", "update", f"JobId={job.job_id}", f"TimeLimit={-(-(ran + 25) // 60)}")
    cluster.wait_state(job.job_id, {"PENDING"}, timeout=120)
    assert not job.done()
    cluster.ask("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=60")
    summary, other = job.result(), undisturbed.result()
    assert cluster.show(job.job_id)["Restarts"] == "1"
    assert "SIGUSR2: stopped at step" in job.stdout(0) and "SIGUSR2: stopped at step" in job.stdout(1)
    assert "continuing from step" in job.stdout(0)
    for key in ("stage", "steps", "world_size", "zero_stage", "validation"):
        assert summary[key] == other[key]
    assert losses(here / "runs/disturbed") == losses(here / "runs/undisturbed")
    assert summary == json.loads((here / "runs/disturbed/summary.json").read_text())
    cluster.wait_state(job.job_id, {"COMPLETED"})


def test_a_job_waits_for_another_and_a_cancelled_one_does_not_come_back(here: Path, cluster: Cluster) -> None:
    first = stage1("runs/first", "train.steps=2000", nodes=2)
    evaluation = ["data.sets=shards", "data.labels=[anger, happy]", "stage1=runs/first", "stage2=null", "out=runs/e"]
    second = launch.submit("demo_eval", evaluation, after=first, time=60)
    wait_for_steps(first, here / "runs/first", 3)
    assert cluster.show(second.job_id)["Dependency"].startswith(f"afterok:{first.job_id}")
    first.cancel()
    with pytest.raises(UserError, match=rf"job {first.job_id}: ended as CANCELLED"):
        first.result()
    assert cluster.wait_state(first.job_id) == "CANCELLED"
    assert cluster.show(first.job_id)["Restarts"] == "0"
    assert list((here / "runs/first/checkpoints").glob("step-*")), "it has saved all the same"
    with pytest.raises(UserError, match=rf"job {second.job_id}: ended as CANCELLED"):  # its dependency can never hold
        second.result()


def test_a_crash_is_started_again_and_a_mistake_is_not(
    here: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rank is killed, as for lack of memory; the second job has no data. Without accounting, as on some clusters."""
    (tmp_path / "sacct").write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2; exit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with monkeypatch.context() as drill:
        drill.setenv("PYTHONPATH", str(ROOT / "tests/faults/inject"), prepend=os.pathsep)
        drill.setenv("MSER_DRILL", "0|step 4|KILL")
        killed = stage1("runs/killed", "train.steps=6", "train.save_every=2", "train.background_save=false")
    wrong = stage1("runs/none", "train.steps=2", "data.sets=no/shards", nodes=2)
    with pytest.raises(UserError) as failed:
        wrong.result()
    assert str(failed.value).startswith(f"job {wrong.job_id}: no/shards: no such data set")
    ended = cluster.show(wrong.job_id)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert killed.result()["steps"] == 6 and cluster.show(killed.job_id)["Restarts"] == "1"
    assert f"exit code 137: job {killed.job_id} is queued again" in killed.stderr()
    assert "continuing from step 2" in killed.stdout()


def test_what_sbatch_refuses_leaves_nothing_behind(here: Path) -> None:
    with pytest.raises(UserError, match="sbatch refused the job: invalid partition specified: moon"):
        stage1("runs/moon", partition="moon", folder="refused")
    assert not list((here / "refused").iterdir())


def test_a_sweep_is_an_array_of_children_of_one_mlflow_run(here: Path, cluster: Cluster) -> None:
    words = [*WORDS, "seed=0,1", "lr=1e-3", "train.steps=2", "out=runs/sweep"]
    jobs = sweep.sweep("demo_stage1", words, parallel=1, cpus_per_task=1, time=60)
    assert [job.job_id.partition("_")[2] for job in jobs] == ["0", "1"]
    assert sorted(cluster.ask("squeue", "-h", "-r", "-j", jobs[0].job_id.partition("_")[0], "-o", "%K").split()) == [
        "0",
        "1",
    ]
    results = [job.result() for job in jobs]
    assert [result["out"] for result in results] == ["runs/sweep/seed=0", "runs/sweep/seed=1"]
    client = MlflowClient(f"sqlite:///{here}/runs/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parent = run_id_of(here / "runs/sweep/sweep")
    assert parent in {run.info.run_id for run in runs}
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert {run.info.run_id for run in children} == {result["mlflow_run_id"] for result in results}


def test_the_jobs_of_a_sweep_evaluate_and_rank_it(here: Path) -> None:
    """Two ranks a job; the last job that ends brings the ranking and the sweep's MLflow run to their end."""
    words = [*WORDS, "seed=0,1", "train.steps=2", "out=runs/ranked", "eval.data.sets=shards", "eval.data.workers=0"]
    words.append("eval.data.labels=[anger, happy, neutral, sad]")
    jobs = sweep.sweep("demo_stage1", words, evaluate="demo_eval", nodes=2, cpus_per_task=1, time=60)
    for job in jobs:
        assert {row["language"]: row["seen_language"] for row in job.result()["zero_shot"]} == {"en": True, "el": False}
    place = here / "runs/ranked/sweep"
    table = (place / "table.txt").read_text()
    assert {f"seed={seed}" for seed in (0, 1)} <= set(table.split()) and "to repeat it: mser train" in table
    client = MlflowClient(f"sqlite:///{here}/runs/mlflow.db")
    parent = client.get_run(str(run_id_of(place)))
    assert parent.info.status == "FINISHED"
    assert {"table.txt", "compare.html"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}
    for seed in (0, 1):
        trained = client.get_run(str(run_id_of(here / f"runs/ranked/seed={seed}")))
        assert "test/ua_unseen" in trained.data.metrics and trained.info.status == "FINISHED"
