import socket
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mser_dist.errors import UserError
from mser_dist.ranks.distributed import World, check_gpus, discover, job_seconds_left

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODELIST": "localhost"}
SRUN = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "localhost",
}


def test_nothing_set_is_one_process() -> None:
    assert discover({}) == discover() == World(0, 1, 0, launcher="single")
    assert World().is_main and not World(rank=1, world_size=2).is_main


def test_torchrun() -> None:
    assert discover(TORCHRUN) == World(3, 8, 1, "10.0.0.1", 1234, "torchrun")
    without_local = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    assert discover(without_local).local_rank == 0


def test_srun() -> None:
    world = discover(SRUN)
    assert (world.rank, world.world_size, world.local_rank) == (3, 4, 1)
    assert (world.master_addr, world.launcher) == ("localhost", "srun")
    assert 20000 <= world.master_port < 32000


def test_srun_ranks_agree_and_jobs_and_steps_differ() -> None:
    ports = {discover(SRUN | {"SLURM_PROCID": str(rank)}).master_port for rank in range(4)}
    assert len(ports) == 1
    others = {discover(SRUN | change).master_port for change in ({"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "3"})}
    assert len(ports | others) == 3


def test_srun_takes_a_master_from_the_job_script() -> None:
    world = discover(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "5"})
    assert (world.master_addr, world.master_port) == ("head", 5)


def test_a_batch_script_without_srun_is_one_process() -> None:
    assert discover(BATCH_SCRIPT) == World()
    assert discover(BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1"}) == World()


def test_torchrun_inside_srun_wins() -> None:
    assert discover(SRUN | TORCHRUN) == discover(TORCHRUN)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "0"}, "sets RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "sets WORLD_SIZE but not RANK"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"}, "but not MASTER_ADDR: unset"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1 is not below"),
        (TORCHRUN | {"RANK": ""}, "RANK='' is not a number"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many' is not a number"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}, "lacks SLURM_PROCID"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_JOB_ID"}, "lacks SLURM_JOB_ID"),
        (SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_NODELIST": ""}, "names no host: set MASTER_ADDR"),
    ],
)
def test_half_set_environments_are_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        discover(env)
    assert "\n" not in str(caught.value)


GPUS = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "8"}
ONE_TASK = GPUS | {"SLURM_STEP_TASKS_PER_NODE": "1"}


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (ONE_TASK, "1 task and 8 GPUs on node 0"),
        (ONE_TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "mser train --nproc 8"),
        (GPUS | {"SLURM_NODEID": "2"}, "4 tasks and 8 GPUs on node 2"),
        (GPUS | {"SLURM_GPUS_ON_NODE": "1"}, "8 tasks and 1 GPU on node 0"),
    ],
)
def test_tasks_that_do_not_match_the_gpus_are_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_gpus(env)
    assert "--ntasks-per-node" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "env",
    [
        {},
        SRUN,
        GPUS,
        GPUS | {"SLURM_NODEID": "1"},
        GPUS | {"CUDA_VISIBLE_DEVICES": "0"},  # each task is shown its own
        ONE_TASK | TORCHRUN,  # which starts a rank for each GPU itself
        ONE_TASK | {"CUDA_VISIBLE_DEVICES": "0"},
        BATCH_SCRIPT | {"SLURM_GPUS_ON_NODE": "8"},
    ],
)
def test_a_rank_for_each_gpu_is_in_order(env: dict[str, str]) -> None:
    check_gpus(env)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu03,gpu01", "gpu03"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[9]", "gpu9"),
        ("rack1-gpu[001-004,7]-ib,x", "rack1-gpu001-ib"),
        ("login1,gpu[03-05]", "login1"),
        ("r[2-3]n[07-09]", "r2n07"),
        ("10.0.0.[4-6]", "10.0.0.4"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodelist: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])  # every name resolves, and no test asks a DNS server
    assert discover(SRUN | {"SLURM_STEP_NODELIST": nodelist}).master_addr == first


def test_a_name_that_does_not_resolve_is_looked_up_in_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("PATH", str(tmp_path))
    env = SRUN | {"SLURM_STEP_NODELIST": "node[4-5]"}
    assert discover(env).master_addr == "node4"  # no scontrol in a container: the name is what there is
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 Arch=x86_64"\necho "   NodeAddr=127.0.0.9 NodeHostName=$3"\n')
    scontrol.chmod(0o755)
    assert discover(env).master_addr == "127.0.0.9"
    scontrol.write_text("#!/bin/sh\necho slurm_load_node error >&2\nexit 1\n")
    assert discover(env).master_addr == "node4"


def test_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_seconds_left() is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert job_seconds_left() is None, "no scontrol, as in a container"
    scontrol = tmp_path / "scontrol"
    end = datetime.now() + timedelta(seconds=500)
    scontrol.write_text(f'#!/bin/sh\necho "JobId=7 EndTime={end.isoformat(timespec="seconds")}"\n')
    scontrol.chmod(0o755)
    assert job_seconds_left() == pytest.approx(500, abs=5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 100))
    assert job_seconds_left() == pytest.approx(100, abs=5)
