"""Who am I among how many: the only reader of RANK, WORLD_SIZE and SLURM_*.

Three launchers, one answer: a single process, ``torchrun`` (or anything that sets RANK and WORLD_SIZE), or one rank per
``srun`` task. ``torchrun`` inside ``srun`` wins over SLURM's own variables, because it is the inner launcher.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from mser_dist.errors import PassingError, UserError
from mser_dist.ranks import rendezvous
from mser_dist.ranks.limits import check_files
from mser_dist.ranks.store import Server, Store


@dataclass(frozen=True)
class World:
    """A process's place in its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    launcher: str = "single"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def discover(env: Mapping[str, str] | None = None) -> World:
    """Read the launcher's variables. Raises `UserError` on a half-set or contradictory environment."""
    env = os.environ if env is None else env
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_torchrun(env)
    # SLURM_STEP_NUM_TASKS exists only inside an srun step; SLURM_NTASKS also in the batch script itself, where one
    # process that believed it would wait for ever for peers that nobody starts.
    if "SLURM_STEP_NUM_TASKS" in env and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        return _from_slurm(env)
    return World()


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """An integer of the environment. Raises `UserError` where it is none, or missing without a default."""
    text = env.get(name, default)
    if text is None:
        raise UserError(f"the launcher's environment lacks {name}: check how the job starts its processes")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not a number: check the launcher's environment") from None


def _from_torchrun(env: Mapping[str, str]) -> World:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise UserError(
            f"the environment sets {'RANK' if 'RANK' in env else 'WORLD_SIZE'} but not {', '.join(missing)}: "
            "unset it for a single process, or start with torchrun, srun or `mser train --nproc N`"
        )
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}: check the launcher's environment")
    local = _number(env, "LOCAL_RANK", 0)
    return World(rank, size, local, env["MASTER_ADDR"], _number(env, "MASTER_PORT"), "torchrun")


def _from_slurm(env: Mapping[str, str]) -> World:
    rank, size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
    addr = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
    # Where `_meet` begins to look for a free port: 0 would be one that the peers cannot know.
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID", 0)
    port = _number(env, "MASTER_PORT", 20000 + (job * 7 + step) % 12000)
    return World(rank, size, _number(env, "SLURM_LOCALID", 0), addr, port, "srun")


def check_gpus(env: Mapping[str, str] | None = None) -> None:
    """Raise `UserError` where a SLURM step has more or fewer tasks on this node than GPUs.

    One task is one rank is one GPU. A task that sees a single one, by the step's binding or by CUDA_VISIBLE_DEVICES,
    may leave others idle.
    """
    env = os.environ if env is None else env
    if "RANK" in env or not env.get("SLURM_GPUS_ON_NODE") or not env.get("SLURM_STEP_TASKS_PER_NODE"):
        return  # another launcher inside the step, no step, or no GPU in it
    gpus, node = _number(env, "SLURM_GPUS_ON_NODE"), _number(env, "SLURM_NODEID", 0)
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # 8(x3),4
    counts = [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]
    tasks = counts[node] if node < len(counts) else gpus
    bound = len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    if tasks > gpus or (tasks < gpus and not bound):
        raise UserError(
            f"{tasks} task{'s' * (tasks > 1)} and {gpus} GPU{'s' * (gpus > 1)} on node {node} of the step: one task is "
            f"one rank is one GPU: set --ntasks-per-node to --gpus-per-node (in one task, mser train --nproc {gpus}; "
            "CUDA_VISIBLE_DEVICES=0 for a single GPU on purpose)"
        )


def _first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list, ``gpu[03-05,9],login1`` → ``gpu03``, as an address that resolves."""
    head = re.match(r"(?:[^\[\],]|\[\d+[^\]]*\])+", nodelist)  # up to the first comma outside brackets
    if head is None:
        raise UserError(f"SLURM's node list {nodelist!r} names no host: set MASTER_ADDR in the job script")
    return _address(re.sub(r"\[(\d+)[^\]]*\]", r"\1", head[0]))


def _address(node: str) -> str:
    """An address of a node: its name where that resolves, else the NodeAddr that SLURM has for it."""
    try:
        socket.getaddrinfo(node, None)
        return node  # the usual site; no question to slurmctld from each of a thousand ranks
    except OSError:
        pass
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", node],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return node  # no scontrol in the container: the name is what there is
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else node


def job_seconds_left() -> float | None:
    """Seconds until the scheduler will end this job, by this node's clock, or None where that is not known."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if text := os.environ.get("SLURM_JOB_END_TIME"):  # newer versions of SLURM say it
        return float(text) - time.time()
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", job, "--oneliner"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=True,
        ).stdout
        found = re.search(r"\bEndTime=(\S+)", shown)
        return datetime.fromisoformat(found[1]).timestamp() - time.time() if found else None
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # no scontrol in the container, or no limit: EndTime=Unknown


def free_port() -> int:
    """A port of this machine that nothing listens on, so that two jobs here do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def init(world: World, timeout_minutes: float, device: str) -> None:
    """Start the default process group (NCCL on CUDA, else gloo) through DeepSpeed. Idempotent.

    Raises `UserError` when the peers cannot be reached in time.
    """
    import torch

    from mser_dist import deepspeed_parts

    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_RANK=str(world.local_rank),
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(free_port() if world.launcher == "single" else world.master_port),
    )
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns of the GPU that it looked for
    if device == "cuda":
        # A launcher that shows each task its own GPU only has local ranks beyond what the task sees.
        count = torch.cuda.device_count()
        if count > 1 and world.local_rank >= count:
            raise UserError(
                f"rank {world.rank} is number {world.local_rank} on a node where it sees {count} GPUs: start as many "
                "tasks on a node as it has GPUs (--ntasks-per-node and --gpus-per-node are equal)"
            )
        local = world.local_rank % count
        os.environ["LOCAL_RANK"] = str(local)  # DeepSpeed reads it
        torch.cuda.set_device(local)
    else:
        deepspeed_parts.skip_shared_memory_op()
    global _store, _server
    try:
        if _store is None:
            serves = world.is_main and not rendezvous.served_by_agent()
            check_files(world.world_size, serves, mesh=device != "cuda")
            client, _server = _meet(world, timeout_minutes * 60)
            _store = Store(client, world.rank, world.world_size)
        if not torch.distributed.is_initialized():
            if device == "cuda":
                _check_own_gpu(local)
            _join(world, "nccl" if device == "cuda" else "gloo", timedelta(minutes=timeout_minutes))
    except (RuntimeError, ValueError) as error:
        raise PassingError(
            f"rank {world.rank} of {world.world_size} could not join {world.master_addr}:{world.master_port} "
            f"({str(error).splitlines()[0]}): check that every rank started and that MASTER_ADDR is reachable"
        ) from error


def _meet(world: World, seconds: float) -> tuple[Any, Server | None]:
    """The job's store, and what serves it on rank 0."""
    import torch.distributed as dist

    if world.world_size == 1:
        return dist.HashStore(), None
    if dist.is_initialized():  # somebody else's group, whose store is not ours to take
        server = Server() if world.is_main else None
        port = agree(server.port if server else None)
        return dist.TCPStore(world.master_addr, port, is_master=False, timeout=timedelta(seconds=seconds)), server
    if world.launcher == "srun":
        return rendezvous.meet(world.rank, world.world_size, world.master_addr, world.master_port, patience=seconds)
    return rendezvous.meet_at(world.rank, world.world_size, world.master_addr, world.master_port, seconds)


def _check_own_gpu(local: int) -> None:
    """Raise `UserError`, on every rank, where two of them compute on one GPU: NCCL cannot. Collective."""
    import torch

    mine = f"{socket.gethostname()}, {torch.cuda.get_device_properties(local).uuid}"
    everywhere = store().to_main(mine)
    if problem := store().agree(_shared_gpu(everywhere) if everywhere is not None else None):
        raise UserError(problem)


def _shared_gpu(everywhere: list[str]) -> str | None:
    """What to say where two ranks name the same GPU; None where each has its own."""
    first: dict[str, int] = {}
    for rank, gpu in enumerate(everywhere):
        if first.setdefault(gpu, rank) != rank:
            return (
                f"ranks {first[gpu]} and {rank} have one GPU ({gpu}), and a rank needs its own: start as many "
                "processes on a machine as it has GPUs (mser … --nproc, --ntasks-per-node); "
                "CUDA_VISIBLE_DEVICES= has them compute on the CPU"
            )
    return None


def _join(world: World, backend: str, limit: timedelta) -> None:
    import torch

    from mser_dist import deepspeed_module

    deepspeed = deepspeed_module.module()
    torch.distributed.init_process_group(
        backend, store=store().client, rank=world.rank, world_size=world.world_size, timeout=limit
    )
    deepspeed.init_distributed(backend, timeout=limit, auto_mpi_discovery=False, verbose=False)


def join_store(world: World, seconds: float) -> None:
    """Meet at the job's store alone: for ranks that compute nothing, as a rehearsal's. `leave_store` leaves it."""
    global _store, _server
    client, _server = _meet(world, seconds)
    _store = Store(client, world.rank, world.world_size)


def store() -> Store:
    """The job's store; one of this process alone where no job has been started."""
    return _store or Store(None, 0, 1)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is not None and deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # forgets the groups it keeps: the next training would use them
        else:
            dist.destroy_process_group()
    leave_store()


def leave_store() -> None:
    """Leave the job's store, and on rank 0 end what serves it."""
    global _store, _server
    _store = None
    if _server:
        _server.stop()
    _server = None


def warn(text: str) -> None:
    """One line for the person at the terminal, on standard error."""
    print(f"mser: warning: {text}", file=sys.stderr, flush=True)


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def most(values: list[int]) -> list[int]:
    """Each value's maximum over the ranks."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return values
    found = torch.tensor(values, device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def all_sum(values: list[float], device: Any = None) -> list[float]:
    """Each value summed over the ranks, in double precision; device: None: where the backend sums."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.float64, device=device or _device())
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def _device() -> str:
    """Where the backend's tensors are: NCCL has the GPU alone. A second group, of gloo, would be a mesh of sockets."""
    import torch.distributed as dist

    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


_store: Store | None = None
_server: Server | None = None  # on rank 0, where the launcher does not serve it


def first(problem: str | None) -> str | None:
    """What the first rank says that has a problem, on every rank; None where none has. No rank hears all the others."""
    import torch.distributed as dist

    if not dist.is_initialized():
        said = store().to_main(problem)
        return store().agree(next((one for one in said if one), None) if said else None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = most([ranks - rank if problem else 0])[0]
    if not found:
        return None
    box = [problem]
    dist.broadcast_object_list(box, src=ranks - found)
    return box[0]


def agree(value: Any) -> Any:
    """Rank 0's value on every rank: rank 0 decides, so that ranks that see different disks cannot diverge."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return store().agree(value)
    box = [value]
    dist.broadcast_object_list(box, src=0)  # over the backend's own device: NCCL has none but the GPU
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank: for once a run, and small values; else `Store.to_main`."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out
