"""Site files on a real SLURM with pretended GPUs: each way to ask for them, and a container that cannot reach SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

from mser_dist.jobs import check, launch
from mser_dist.synth.speech import SynthConfig
from mser_dist.synth.write import write_set
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT
from tests.tiny_runs import ENCODER, QFORMER, losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

WORDS = ["demo_stage1", "data.sets=shards", "data.workers=0", "train.global_batch=8", "train.log_every=1"]
WORDS += ["train.val_every=0", "train.steps=2", "tracking.enabled=false", ENCODER, *QFORMER]
GPUS = ["--gpus-per-node=%n", "--gres=gpu:%n", "--gpus-per-task=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    small = SynthConfig(
        languages=("en",), unseen_languages=("el",), train_sentences=2, val_sentences=1, test_sentences=1,
        train_takes=1, val_takes=1, test_takes=1, val_voices=2, test_voices=2,
    )  # fmt: skip
    write_set(folder / "shards", small)
    return folder


def site_file(folder: Path, name: str, *lines: str) -> Path:
    file = folder / f"{name}.sh"
    file.write_text(
        "\n".join(["SITE_SBATCH=(--partition=low --cpus-per-task=1 --time=20)", "SITE_NODE_GPUS=2", *lines])
    )
    return file


def submit(cluster: Cluster, site: Path, folder: Path, *words: str, **env: str) -> tuple[str, Path]:
    """Submit by submit.sh; the job's id, and its output."""
    more = {"MSER_SITE": str(site), **env}
    job = cluster.ask(ROOT / "slurm/submit.sh", "--parsable", *words, cwd=folder, env=more)
    return job, folder / f"slurm-mser-stage1-{job}.out"


@pytest.mark.parametrize("gpus", GPUS)
def test_every_way_to_ask_for_gpus_gives_each_rank_its_own_and_the_sight_of_all(
    cluster: Cluster, folder: Path, gpus: str
) -> None:
    """Two ranks, each of which sees both GPUs of its node, as NCCL wants it. Of one way they train, being checked."""
    name = gpus.strip("-").split("=")[0]
    lines = [f"SITE_GPUS={gpus}", f"site_begin() {{ export RUNS={name}; }}", 'SITE_RUN=(bash "$PWD/look.sh")']
    trains = gpus == GPUS[-1]
    (folder / "look.sh").write_text(
        'echo "rank $SLURM_PROCID sees ${CUDA_VISIBLE_DEVICES-nothing} of $SLURM_GPUS_ON_NODE in $RUNS"\n'
        f'{"exec" if trains else ":"} "$@"\n'
    )
    words = ["--nodes=1", str(ROOT / "slurm/stage1.sh"), *WORDS, f"out=runs/{name}"]
    site = site_file(folder, name, *lines)
    job, log = submit(cluster, site, folder, *words, MSER_CHECK=str(int(trains)))
    assert cluster.wait_state(job, timeout=200) == "COMPLETED", log.read_text()
    seen = sorted({line for line in log.read_text().splitlines() if " sees " in line})  # `mser check` was first
    assert seen == [f"rank {rank} sees 0,1 of 2 in {name}" for rank in range(2)]
    assert not trains or sorted(losses(folder / "runs" / name)) == [1, 2]


def test_a_submission_from_python_follows_the_site_file(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("SLURM_CONF", "PYTHONPATH", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, cluster.env[name])
    site = site_file(folder, "python", "SITE_GPUS=--gpus-per-task=1", "site_begin() { echo the site is here; }")
    job = launch.submit(
        WORDS[0], [*WORDS[1:], "out=runs/python"], nodes=1, gpus_per_node=2, time=20, site=site, folder="jobs"
    )
    assert job.result()["world_size"] == 2
    shown = cluster.show(job.job_id)
    assert shown["Partition"] == "low" and shown["NumCPUs"] == "2" and shown["TresPerTask"].endswith("gpu:1")
    assert "the site is here" in job.stdout(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace wants root")
def test_a_job_whose_container_cannot_reach_slurm_is_queued_again_after_a_crash(cluster: Cluster, folder: Path) -> None:
    """In a mount namespace without SLURM's commands, as in an image: the job's shell asks SLURM for another start."""
    hide = folder / "enter.sh"
    hidden = [
        subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        for name in ("squeue", "scontrol")
    ]
    hide.write_text("".join(f"mount --bind /dev/null {path}\n" for path in hidden) + 'exec "$@"\n')
    # On this cluster only scontrol knows where node1 is.
    lines = [f'SITE_RUN=(unshare --mount bash "{hide}")', "site_begin() { export MASTER_ADDR=127.0.0.1; }"]
    site = site_file(folder, "container", *lines, f"SITE_MSER={cluster.env['MSER']}")
    drill = {"PYTHONPATH": f"{ROOT / 'tests/faults/inject'}:{ROOT}", "MSER_DRILL": "0|step 4|KILL"}
    words = [*WORDS, "out=runs/container", "train.steps=6", "train.save_every=2", "train.background_save=false"]
    options = ["--nodes=1"]
    job, log = submit(cluster, site, folder, *options, str(ROOT / "slurm/stage1.sh"), *words, **drill)
    assert cluster.wait_state(job, timeout=300) == "COMPLETED", log.read_text()
    assert cluster.show(job)["Restarts"] == "1", log.read_text()
    assert "continuing from step 2" in log.read_text()
    assert sorted(losses(folder / "runs/container")) == [1, 2, 3, 4, 5, 6]


def test_what_sbatch_would_refuse_is_told_before_it_is_submitted(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    config = launch.resolve(WORDS[0], [*WORDS[1:], "out=runs/check"])
    moon = site_file(folder, "moon", "SITE_SBATCH+=(--partition=moon)")
    for site, gpus, said in (
        (site_file(folder, "fits"), 2, "sbatch would take it"),
        (site_file(folder, "large"), 8, "Requested node configuration is not available"),
        (moon, 2, "invalid partition specified: moon"),
    ):
        need = launch.Resources(nodes=1, gpus_per_node=gpus, site=site)
        script = check.check(config, need)[-1]
        assert script.name == "script" and said in script.found
        assert script.status == ("ok" if site.stem == "fits" else "fail")
    assert cluster.ask("squeue", "-h") == "", "nothing was submitted"
