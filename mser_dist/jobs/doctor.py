"""``mser doctor``: what this machine or allocation can do, one line a check, each problem with its remedy.

  mser doctor                    this machine, and an all-reduce between two processes on it
  srun mser doctor --out runs    in an allocation: its own ranks, and whether all its nodes see one folder

Nothing is changed or compiled, no secret is printed. Exit code 1 if a check failed; a warning is none.
"""

import errno
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from json import dumps, loads
from pathlib import Path

from mser_dist import tables
from mser_dist.errors import UserError
from mser_dist.files import fsync_tree, write_json, write_text
from mser_dist.jobs import doctor_checks as checks
from mser_dist.jobs.doctor_checks import GIB, Finding, Status, existing, file_system
from mser_dist.ranks import distributed
from mser_dist.ranks.distributed import World

_PATIENCE = 60.0  # seconds for one check: an import from a cold network file system takes long, a dead mount for ever
_ELEMENTS = 4 * 2**20  # of float32 in the all-reduce: 16 MiB
_MARKS: dict[Status, str] = {"ok": "✓", "warn": "!", "fail": "✗"}
_NO_RANKS = "see the line of network: GLOO_SOCKET_IFNAME names the card; or a firewall, or too little memory"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def run(out: Path, ranks: bool = True, json: Path | None = None) -> int:
    """Check everything, print it, and return 1 if something failed, else 0. Among several ranks, rank 0 speaks.

    out: the folder that run folders are made in. ranks: also all-reduce, over the ranks of this job or, in a single
    process, over two new ones. json: where the report is written too. Raises `UserError` if it cannot be.
    """
    world = distributed.discover()
    together = ranks and world.world_size > 1
    if not together and not world.is_main:
        return 0
    try:
        if world.is_main and json is not None:
            if json.is_dir():
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            json.touch()
    except OSError as error:
        raise UserError(f"{json} cannot be written ({error.strerror}): choose another place") from None
    report: list[Check] = []

    def note(check: Check) -> None:
        report.append(check)
        if world.is_main:
            show(check)

    if world.local_rank == 0:  # of every node: each has its own GPUs, disks and network
        for name, check in _machine(out, world):
            note(guarded(name, check))
    if together:
        for more in job_ranks(world, out, list(report)):
            note(more)
    elif ranks:
        note(guarded("all-reduce", two_processes, 2 * _PATIENCE))
    count = {status: sum(check.status == status for check in report) for status in _MARKS}
    if world.is_main:
        print(f"{count['ok']} ok, {tables.count(count['warn'], 'warning')}, {count['fail']} failed")
    if world.is_main and json is not None:
        write_json(json, {"ok": not count["fail"], "checks": [asdict(check) for check in report]})
    return 1 if world.is_main and count["fail"] else 0  # a launcher would end rank 0 when another rank fails


def _machine(out: Path, world: World) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """The checks of one machine, by name, in the order of the report."""
    for name in (
        "packages",
        "start_up",
        "gpu",
        "attention",
        "deepspeed_ops",
        "audio",
        "cores",
        "memory",
        "network",
        "hub",
        "weights",
    ):
        yield name.replace("_", " "), getattr(checks, name)
    yield "/dev/shm", partial(space, Path("/dev/shm"), 1, "docker run --shm-size=8g: NCCL uses it")
    yield "TMPDIR", partial(space, Path(tempfile.gettempdir()), 1, "export TMPDIR=/a/larger/place")
    yield "disk", partial(space, out, 20, "an --out with more room; a checkpoint takes up to 16 bytes a weight")
    yield "out", partial(folder, out)
    yield "mlflow", partial(checks.mlflow, out)
    state = guarded("slurm", slurm)
    yield "slurm", lambda: (state.status, state.found, state.remedy)
    if " UP" in state.found:  # else each of them would wait for the controller too
        yield "slurm job", slurm_job
        yield "accounting", accounting
    if os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1" and world.world_size == 1:
        yield "shared", lambda: ("warn", "one process cannot tell", f"srun mser doctor --out {out}")


def guarded(name: str, check: Callable[[], Finding], patience: float = _PATIENCE) -> Check:
    """A check's line; a crash or a hang of it (after `patience` seconds) is its "fail" line."""
    box: list[Finding] = []

    def call() -> None:
        try:
            box.append(check())
        except (Exception, SystemExit) as error:
            what = str(error) if isinstance(error, UserError) else f"it broke off: {type(error).__name__}: {error}"
            box.append(("fail", what, "mend what it names"))

    thread = threading.Thread(target=call, daemon=True)  # a call into a dead mount cannot be ended
    thread.start()
    thread.join(patience)
    box.append(("fail", f"no answer in {patience:.0f} s", "look for a dead mount or server: df, dmesg"))
    status, *texts = box[0]
    # One line each, and no password of a URL.
    secret = re.compile(r"(?i)(?<=//)[^/\s]*@|(?<=password=)[^&\s]+|(?<=token=)[^&\s]+")
    return Check(name, status, *(secret.sub("", " ".join(text.split())) for text in texts))


def show(check: Check) -> None:
    mark = _MARKS[check.status] if tables.is_unicode(sys.stdout) else f"{check.status:<4}"
    rows = [[f"{mark} {check.name}", check.found], *([["", f"-> {check.remedy}"]] if check.remedy else [])]
    tables.show(tables.Table((), [rows], align="ll", widths=[len(mark) + 14]))


def space(place: Path, floor: float, remedy: str) -> Finding:
    """Free space of a place, against a floor in GiB."""
    there = existing(place)
    usage, inodes = shutil.disk_usage(there), os.statvfs(there)
    found = f"{there} ({file_system(there)}): {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if inodes.f_files and inodes.f_favail < 10_000:
        return "warn", f"{found}, but only {tables.count(inodes.f_favail, 'more file')}", remedy
    return ("ok", found, "") if usage.free >= floor * GIB else ("warn", found, remedy)


def folder(out: Path) -> Finding:
    """Files can be written, fsynced, replaced by a rename, and kept private where run folders will be."""
    kind = file_system(out)
    found, remedy = f"{existing(out)} ({kind})", "choose another --out"
    try:
        with tempfile.TemporaryDirectory(prefix=".mser-doctor-", dir=existing(out)) as name:
            probe, start = Path(name), time.perf_counter()
            for text in ("old", "new"):
                write_text(probe / "file", text)
            fsync_tree(probe)
            milliseconds = (time.perf_counter() - start) * 1000
            state = probe.stat()
            if (probe / "file").read_text(encoding="utf-8") != "new":
                return "fail", f"{found}: a rename did not replace the file", remedy
    except OSError as error:
        return "fail", f"{found} cannot be written: {error.strerror}", remedy
    mode, owner, me = stat.S_IMODE(state.st_mode), state.st_uid, os.geteuid()
    if mode != 0o700 or owner != me:
        found += f": mode {mode:o} and owner {owner} of a folder, where 700 and {me} were asked for"
        return "warn", found, "choose a folder with POSIX permissions: others may read or change runs here"
    found += f": fsync and rename hold ({milliseconds:.0f} ms), folders are private"
    if kind in ("tmpfs", "ramfs", "overlay"):
        return "warn", f"{found}; {kind} ends with the machine or container", "choose an --out on a disk"
    return "ok", found, ""


def slurm() -> Finding:
    """SLURM's commands, and whether its controller answers."""
    commands = ("sbatch", "srun", "scontrol", "sacct")
    there = [name for name in commands if shutil.which(name)]
    missing = [name for name in commands if name not in there]
    if not there and (job := os.environ.get("SLURM_JOB_ID")):
        remedy = "mount SLURM's commands and munge's socket into the container, or requeue from outside it"
        return "warn", f"in job {job}, but without SLURM's commands: it cannot requeue itself", remedy
    if not there:
        return "ok", "not here: `mser train CONFIG --nproc N` starts several processes", ""
    answered, text = _ask("scontrol", "ping")
    found = f"{', '.join(there)}; {text.replace('*', '')}"
    if missing:
        return "warn", f"no {', '.join(missing)}, but {found}", "apt-get install slurm-client, or mend PATH"
    if not answered or " UP" not in text:
        return "warn", found, "SLURM_CONF names the cluster; is slurmctld up, munge here?"
    return "ok", found, ""


def slurm_job() -> Finding:
    """The allocation, and whether its job may go back to the queue."""
    job = os.environ.get("SLURM_JOB_ID")
    answered, text = _ask("scontrol", "show", *(("job", job, "-o") if job else ("config",)))
    if not answered:
        return "warn", f"not known: {text}", "see the line of slurm"
    fields = dict(re.findall(r"(\w+)\s*=\s*(\S*)", text))
    if not job:
        found = f"not inside one; JobRequeue={fields.get('JobRequeue')}"
        return ("ok", found, "") if fields.get("JobRequeue") == "1" else ("warn", found, "sbatch --requeue …")
    seconds = distributed.job_seconds_left()
    left = "no time limit known" if seconds is None else f"{timedelta(seconds=round(seconds))} left"
    found = f"{job}: {fields.get('NumNodes')} nodes, {fields.get('NumTasks')} tasks, {left}"
    found += f", restart {os.environ.get('SLURM_RESTART_COUNT', '0')}, Requeue={fields.get('Requeue')}"
    remedy = "#SBATCH --requeue: `scontrol requeue` refuses this job, which therefore ends at a preemption"
    return ("ok", found, "") if fields.get("Requeue") == "1" else ("warn", found, remedy)


def accounting() -> Finding:
    """``sacct``, which knows how a job has ended that squeue has forgotten."""
    answered, text = _ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", os.environ.get("SLURM_JOB_ID", "1"))
    remedy = "without it, how a job has ended is forgotten after some minutes: slurmdbd is the site's"
    return ("ok", "sacct answers", "") if answered else ("warn", f"sacct: {text}", remedy)


def _ask(*command: str, seconds: float = 10) -> tuple[bool, str]:
    """(True, what a command printed), or (False, its complaint)."""
    try:
        ended = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")
        return False, f"no answer from {command[0]} in {seconds:.0f} s. {said}"
    return ended.returncode == 0, ended.stdout if ended.returncode == 0 else ended.stderr + ended.stdout


def two_processes(limit: float = _PATIENCE) -> Finding:
    """An all-reduce between two new processes on this machine, which are ended after `limit` seconds at the latest."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    deadline, pipe, said = time.monotonic() + limit, subprocess.PIPE, subprocess.STDOUT
    command = [sys.executable, "-c", "from mser_dist.jobs.doctor import _local_rank; _local_rank()"]
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in ("0", "1"):
            env = os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            # The pipe into it ends with this process, by whatever that ends, and so does the rank: see `_local_rank`.
            ranks.append(
                subprocess.Popen(
                    command, env=env, stdin=pipe, stdout=pipe, stderr=said, encoding="utf-8", errors="replace"
                )
            )
        while (codes := [rank.poll() for rank in ranks]) != [0, 0] and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
        texts = [process.communicate()[0] for process in ranks]
    if codes == [0, 0]:
        status, found, remedy = loads(texts[0].splitlines()[-1])
        return status, found, remedy
    failed = sorted((code, rank) for rank, code in enumerate(codes) if code)
    if not failed:
        return "fail", f"two processes on this machine were not done after {limit:.0f} s", _NO_RANKS
    code, number = failed[0]  # one that a signal ended, with a negative code, before a peer that noticed it
    last = f"ended by {signal.Signals(-code).name}" if code < 0 else ["no message", *texts[number].splitlines()][-1]
    last = last.removeprefix("mser_dist.errors.UserError: ")
    return "fail", f"rank {number} of two on this machine: {last}", _NO_RANKS


def _local_rank() -> None:
    """One of the `two_processes`: prints the finding as its last line."""

    def follow() -> None:
        os.read(0, 1)  # returns when the parent, by whatever it ended, no longer holds the other end
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    world = distributed.discover()
    distributed.init(world, 1, "cpu")
    finding = all_reduce(world)
    distributed.shutdown()
    print(dumps(finding), flush=True)
    os._exit(0)  # nothing may be printed behind it


def all_reduce(world: World) -> Finding:
    """Sum a tensor over all ranks, check every element, time it: NCCL where each has its own GPU, else gloo."""
    import torch
    import torch.distributed as dist

    uuid = None
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    gpus = distributed.gather(uuid)
    nccl = None not in gpus and len(set(gpus)) == len(gpus)  # NCCL refuses two ranks on one GPU
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a rank that waits too long raises, where NCCL's watchdog aborts
    group = dist.new_group(backend="nccl", timeout=timedelta(minutes=1)) if nccl else None
    right, best = True, float("inf")
    for _ in range(4):  # the first one makes the connections
        tensor = torch.full((_ELEMENTS,), world.rank + 1.0, device="cuda" if nccl else "cpu")
        distributed.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if nccl:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        right = right and bool((tensor == world.world_size * (world.world_size + 1) / 2).all())
    results = distributed.gather((right, best))
    wrong = [rank for rank, (holds, _) in enumerate(results) if not holds]
    seconds, size = max(best for _, best in results), 4 * _ELEMENTS
    speed = f"{size / 2**20:.0f} MiB in {seconds:.4f} s, {size / 1e6 / seconds:.0f} MB/s"
    found = f"{'nccl' if nccl else 'gloo'}, {world.world_size} ranks: {speed}"
    if wrong:
        return "fail", f"{found}; wrong sums on rank {wrong}", "have the memory and network of its node tested"
    return "ok", found, ""


def job_ranks(world: World, out: Path, here: list[Check]) -> Iterator[Check]:
    """What only the ranks of a job can find together: the all-reduce, a folder of all nodes, what other nodes lack."""
    nodes: list[tuple[str, list[Check]]] = []
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    def join() -> Finding:
        distributed.init(world, 3, "cpu")  # longer than the slowest node's own checks
        nodes.extend(distributed.gather((node, here)))
        return all_reduce(world)

    check = guarded("all-reduce", join, 4 * _PATIENCE)
    yield check
    if check.status == "ok":
        yield guarded("shared", partial(shared, world, out, node), 4 * _PATIENCE)
        distributed.shutdown()
    known = {(check.name, check.status) for check in here}
    for name, report in nodes:
        news = [check for check in report if check.status != "ok" and (check.name, check.status) not in known]
        yield from (replace(check, name=f"{name}: {check.name}") for check in news)


def shared(world: World, out: Path, node: str) -> Finding:
    """Whether all nodes see what each of them writes under `out`. Collective."""
    made: str | None = None
    if world.is_main:
        with suppress(OSError):
            made = tempfile.mkdtemp(prefix=".mser-doctor-", dir=existing(out))
    made = distributed.agree(made)
    if made is None:
        return "fail", f"{existing(out)} cannot be written by rank 0", "choose another --out"
    place, first = Path(made), world.local_rank == 0  # one rank of each node
    writers = [place / str(rank) for rank, writes in enumerate(distributed.gather(first)) if writes]
    if first:
        with suppress(OSError):
            (place / str(world.rank)).touch()
    distributed.barrier()
    deadline = time.monotonic() + 10  # a client of NFS may answer from its cache for some seconds
    while first and not (sees := all(file.exists() for file in writers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = sorted({name for name, good in distributed.gather((node, not first or sees)) if not good})
    if world.is_main:
        shutil.rmtree(place, ignore_errors=True)
    if blind:
        return "fail", f"{place.parent} is not one folder on {', '.join(blind)}", "choose an --out that all nodes mount"
    return "ok", f"{place.parent} is one folder on all nodes ({len(writers)})", ""
