"""What this machine can do: one small function a check, which changes and compiles nothing.

A check returns a `Finding`; `doctor` names, guards and prints it. A crash in a check is its "fail" line.
"""

import importlib.util
import io
import os
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]
Finding = tuple[Status, str, str]  # what was found, and for "warn" and "fail" how to mend it

GIB = 2**30
_SITE_CARDS = "for several nodes: export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME=CARD, as slurm/sites/bare.sh shows"
# Locks of POSIX and SQLite are slow or wrong on these.
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "smb", "ceph", "9p", "afs", "pvfs", "orangefs", "weka", "fuse.")


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def file_system(path: Path) -> str:
    """Type of the file system that holds a path: ext4, nfs4, lustre, tmpfs, …; "unknown" where the system hides it."""
    import psutil

    real, best, kind = existing(path).resolve(), -1, "unknown"
    for mount in psutil.disk_partitions(all=True):
        depth = len(Path(mount.mountpoint).parts)
        if depth >= best and real.is_relative_to(mount.mountpoint):  # of two mounts at one point the later one counts
            best, kind = depth, mount.fstype
    return kind


def packages(name: str = "mser-dist") -> Finding:
    """Installed versions against the floors in the package's own metadata, those that close a CVE among them."""
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(text) for text in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return "warn", f"{name} is not installed, so there are no floors to compare with", "pip install -e ."
    low: dict[bool, list[str]] = {True: [], False: []}
    good = 0
    for need in needs:
        required = need.marker is None or need.marker.evaluate({"extra": ""})
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            if required:
                low[True].append(f"{need.name} is missing")
            continue
        if need.specifier.contains(version, prereleases=True):
            good += 1
        else:
            low[required].append(f"{need.name} {version} is not {need.specifier}")
    if low[True] or low[False]:
        mend = "in the repository: pip install -U -e . -c constraints.txt"
        return "fail" if low[True] else "warn", "; ".join(low[True] + low[False]), mend
    main = ", ".join(f"{part} {metadata.version(part)}" for part in ("deepspeed", "transformers", "mlflow"))
    return "ok", f"Python {sys.version.split()[0]}; {good} packages at or above their floors ({main})", ""


def gpu() -> Finding:
    """torch, its CUDA build against the driver, and one kernel on every GPU."""
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = ""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        driver = (re.findall(r"\s(\d{3,}\.\d+[.\d]*)\s", text) or ["unknown"])[0]
    build = f"torch {torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU")
    build += f", driver {driver}" if driver else ""
    if said and not count:
        return "fail", f"{build}: {said[0].message}", "update the NVIDIA driver, or install a torch for an older CUDA"
    if driver and not torch.version.cuda:
        return "warn", f"{build}: the GPU here is not used", "install torch's CUDA build: pip install -U torch"
    if not count:
        why = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) else ""
        return "warn", f"{build}; no GPU{why}: backend gloo", "on a node with GPUs: srun --gpus-per-node=N mser doctor"
    devices, busy = [], []
    for index in range(count):
        card = torch.cuda.get_device_properties(index)
        devices.append(f"{card.name} ({card.total_memory / GIB:.0f} GiB, compute {card.major}.{card.minor})")
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            remedy = "see `nvidia-smi`: a GPU in use, damaged, or older than this torch was built for"
            return "fail", f"{build}; cuda:{index}, {devices[-1]}: {str(error).splitlines()[0]}", remedy
        if free < 0.8 * total:
            busy.append(f"cuda:{index} has {free / GIB:.0f} GiB free")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    named = ", ".join(f"{number} x {name}" for name, number in Counter(devices).items())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = f"{build}; {named}; bfloat16 {'yes' if bf16 else 'no'}; backend nccl {nccl}"
    if busy:
        return "warn", f"{found}; {', '.join(busy)}", "end the other processes: `nvidia-smi` names them"
    return ("ok", found, "") if bf16 else ("warn", found, "engine.dtype=float16, or float32")


def attention() -> Finding:
    """The kernel that ``engine.attention=auto`` takes; a flash kernel is run once and compared with SDPA."""
    import torch

    from mser_dist.models.attention import choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = choose("auto", torch.bfloat16, device)
    found = f"auto takes {chosen.kernel} ({chosen.reason.removeprefix('auto: ')})"
    if not chosen.kernel.startswith("flash"):
        if device == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
            return "warn", found, "optional: pip install 'mser-dist[flash-attn]', built against this torch"
        there = importlib.util.find_spec("flash_attn") is not None
        return "ok", f"{found}; flash_attn is {'' if there else 'not '}installed", ""
    rebuild = "build flash-attn anew against this torch, or set engine.attention=sdpa"
    query = torch.randn(1, 16, 4, 64, device=device, dtype=torch.bfloat16)  # [batch, time, heads, width]
    try:
        module = import_module("flash_attn" if chosen.kernel == "flash_attention_2" else "flash_attn_interface")
        out = module.flash_attn_func(query, query, query)
    except (ImportError, RuntimeError) as error:
        return "fail", f"{found}, but it does not run: {error}", rebuild
    out = out[0] if isinstance(out, tuple) else out  # some versions of 3 return the softmax's log-sum too
    heads_first = query.transpose(1, 2)
    plain = torch.nn.functional.scaled_dot_product_attention(heads_first, heads_first, heads_first).transpose(1, 2)
    if not torch.allclose(out.float(), plain.float(), atol=2e-2):  # two roundings to bfloat16 of values near 1
        return "fail", f"{found}, but its numbers are not SDPA's", rebuild
    return "ok", f"{found}; it ran, with SDPA's numbers", ""


def deepspeed_ops() -> Finding:
    """Whether CPU Adam, which optimizer offload needs, can be compiled or is; nothing is compiled here."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns of the GPU that it looked for
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from torch.utils import cpp_extension

    said = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(said or cpp_extension.get_default_build_root())
    # Only the default cache has a level for the Python and CUDA version.
    folders = [cache] if said else [*cache.glob(f"py{sys.version_info.major}{sys.version_info.minor}*")]
    locks = [lock for folder in folders for lock in folder.glob("*/lock")]
    if locks:
        minutes = (time.time() - min(lock.stat().st_mtime for lock in locks)) / 60
        found = f"a compilation's lock, {minutes:.0f} min old, for which every job waits: {', '.join(map(str, locks))}"
        remedy = f"if nothing is compiling, rm {' '.join(map(str, locks))}"
        return "fail" if minutes > 30 else "warn", found, remedy  # CPU Adam takes a few minutes
    if installed_ops.get("cpu_adam"):
        return "ok", "CPU Adam came with DeepSpeed", ""
    builder, compiler = get_accelerator().create_op_builder("CPUAdamBuilder"), os.environ.get("CXX", "c++")
    fits = builder is not None and builder.is_compatible(verbose=False)
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    beside = Path(sys.executable).with_name("ninja")  # an environment that is not activated has it off the PATH
    get_ninja = f"export PATH={beside.parent}:$PATH" if beside.exists() else "pip install ninja"
    conditions = (
        (fits, "CPU Adam is not for this machine", "do without engine.deepspeed=zero3_offload"),
        (shutil.which(compiler), f"no compiler {compiler}", "load the compiler's module, or apt-get install g++"),
        (shutil.which("ninja"), "no ninja on the PATH", get_ninja),
        (headers, "no Python.h", "apt-get install python3-dev, or take a Python that has its headers"),
    )
    lacks = [(what, remedy) for holds, what, remedy in conditions if not holds]
    if lacks:
        what, remedies = (", ".join(texts) for texts in zip(*lacks, strict=True))
        return "warn", f"optimizer offload cannot run: {what}", remedies
    if (kind := file_system(cache)).startswith(_NETWORK):
        remedy = "export TORCH_EXTENSIONS_DIR to a folder of the node, as slurm/common.sh does"
        return "warn", f"compiled ops are cached in {cache} ({kind}): nodes that share it disturb each other", remedy
    built = any((folder / "cpu_adam/cpu_adam.so").exists() for folder in folders)
    state = "compiled already" if built else "compiled at the first use, which takes minutes"
    return "ok", f"CPU Adam for optimizer offload: {state} ({cache})", ""


_OF_A_RANK = "import mser_dist.training.loop; from mser_dist.deepspeed_module import module; module()"


def start_up(imports: str = _OF_A_RANK) -> Finding:
    """What a rank imports before it can meet the others, timed in a process of its own, and from which disk."""
    told = "print(len(sys.modules), time.perf_counter() - began)"
    code = f"import sys, time; began = time.perf_counter(); {imports}; {told}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        return "fail", f"a rank's imports break off: {done.stderr.strip()[-200:]}", "install again: make install"
    count, seconds = done.stdout.split()[-2:]
    kind = file_system(Path(sysconfig.get_path("purelib")))
    found = f"a rank imports {int(count):,} modules from {kind}, in {float(seconds):.1f} s here and now"
    if not kind.startswith(_NETWORK):
        return "ok", found, ""
    remedy = "one file that each node mounts (slurm/containers), or a copy of the environment on each node's own disk"
    return "warn", f"{found}: each of N ranks asks the network disk for all of them at once", remedy


def mlflow(out: Path) -> Finding:
    """The tracking store that runs under `out` would use: it answers within 5 s, or its file is sound."""
    from mser_dist import config as cfg
    from mser_dist.runs.tracking import tracking_uri

    uri = tracking_uri(cfg.TrackingConfig(), out / "run")
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        try:
            if path.exists():
                with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5) as store:
                    store.execute("select count(*) from sqlite_master")
        except sqlite3.Error as error:
            return "fail", f"{uri}: {error}", f"move {path.name} away, or set MLFLOW_TRACKING_URI to another store"
        if (kind := file_system(path)).startswith(_NETWORK):
            remedy = "if several runs go on at once, a server: mlflow server --backend-store-uri URI"
            return "warn", f"{uri} on {kind}, where SQLite's locks are slow or do not hold", remedy
        return "ok", f"{uri}, {'there' if path.exists() else 'made by the first run'}", ""
    if not uri.startswith(("http:", "https:")):
        return "ok", f"{uri} (not asked: only http, https and sqlite are)", ""
    os.environ.update(MLFLOW_HTTP_REQUEST_TIMEOUT="5", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    from mlflow import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:  # whatever the client, the network or the server raises
        remedy = "start it, or set MLFLOW_TRACKING_URI; a training goes on without, log.jsonl in its folder is complete"
        return "warn", f"{uri} does not answer: {first_cause(error)}", remedy
    return "ok", f"{uri} answers", ""


def first_cause(error: BaseException) -> str:
    """One line of the error at the bottom of a chain: "Connection refused", not what the layers made of it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def hub() -> Finding:
    """Whether Hugging Face's hub answers, or is not to be asked. A token is named, not shown."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    token = "; HF_TOKEN is set" if os.environ.get("HF_TOKEN") else ""
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")
    ]
    if offline:
        models = len([*home.glob("hub/models--*")])
        return "ok", f"{offline[0]} is set: {models} models in {home}/hub, none is fetched{token}", ""
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        with suppress(HTTPError):  # an answer, if not a kind one
            urlopen(Request(url, method="HEAD"), timeout=5).close()
    except (OSError, ValueError) as error:
        remedy = "fetch models where there is a way out, into an HF_HOME that nodes share, and export HF_HUB_OFFLINE=1"
        return "warn", f"{url} does not answer: {first_cause(error)}{token}", remedy
    return "ok", f"{url} answers{token}", ""


def weights() -> Finding:
    """Which pretrained weights lie in installed packages; their sums are checked when they are loaded."""
    from mser_dist.models.sources import at_hand

    found = ", ".join(at_hand()) or "no package that carries any"
    return "ok", f"for `pretrained`, without a network: {found}", ""


def audio() -> Finding:
    """FLAC and MP3 are written and read back, a log-mel is taken; eSpeak NG is optional."""
    import numpy as np
    import soundfile

    from mser_dist.audio import SAMPLE_RATE, log_mel

    wave = np.zeros(SAMPLE_RATE, dtype=np.float32)
    for kind in ("FLAC", "MP3"):
        file = io.BytesIO()
        try:
            soundfile.write(file, wave, SAMPLE_RATE, format=kind)
            file.seek(0)
            soundfile.read(file)
        except (RuntimeError, ValueError) as error:  # soundfile's own errors are RuntimeErrors
            return (
                "fail",
                f"no {kind}: {error}",
                "pip install -U soundfile: its wheels bring a libsndfile that reads MP3",
            )
    log_mel(wave, 80)
    espeak = "yes" if importlib.util.find_spec("espeakng_loader") else "no"
    return "ok", f"soundfile {soundfile.__version__} reads FLAC and MP3; asrfront; eSpeak NG (demo only): {espeak}", ""


def cores() -> Finding:
    """Cores against threads, and how many files may be open at once."""
    count, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{count} for this process, OMP_NUM_THREADS {threads or 'not set'}; {soft} open files (ulimit -n)"
    first = threads.split(",")[0]
    if threads and not (first.isdigit() and 1 <= int(first) <= count):
        return (
            "warn",
            f"{found}: not 1 to {count} threads",
            f"export OMP_NUM_THREADS={count}, or SLURM's --cpus-per-task",
        )
    if 0 <= soft < 4096:  # -1: no limit
        return "warn", found, f"ulimit -n {hard if 0 < hard < 65536 else 65536}: data workers hand over open files"
    return "ok", found, ""


def memory() -> Finding:
    """The machine's memory, and what the control groups (version 1 or 2) around this process leave it."""
    import psutil

    machine = psutil.virtual_memory()
    limit = machine.total
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kind, inside = line.split(":", 2)
            top, name = {"": ("", "memory.max"), "memory": ("/memory", "memory.limit_in_bytes")}.get(kind, ("", ""))
            here = Path(f"/sys/fs/cgroup{top}{inside}")
            for group in (here, *here.parents) if name else ():
                with suppress(OSError, ValueError):  # "max" is no number: no limit
                    limit = min(limit, int((group / name).read_text(encoding="ascii")))
    found = f"{machine.total / GIB:.1f} GiB, {machine.available / GIB:.1f} available"
    found += f", {limit / GIB:.1f} the limit of this job or container" if limit < machine.total else ""
    if min(machine.available, limit) < 2 * GIB:
        return "warn", found, "ask for more (#SBATCH --mem=0 is all of a node), or end other programs"
    return "ok", found, ""


def network() -> Finding:
    """Cards that NCCL and gloo may choose from, and whether this host's name leads to itself alone."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    entries = [(name, entry) for name, all in psutil.net_if_addrs().items() if name in up for entry in all]
    addresses = {name: entry.address for name, entry in entries if entry.family == socket.AF_INET}
    cards = {n: a for n, a in addresses.items() if not n.startswith(("lo", "docker", "veth", "br-", "virbr", "cni"))}
    found = ", ".join(f"{name} {address}" for name, address in sorted(cards.items())) or "no card but loopback"
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    found += f"; InfiniBand {', '.join(adapters)}" if adapters else ""
    # gloo takes names; NCCL takes prefixes, after "=" names, after "^" what to leave out.
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        said = os.environ.get(variable, "")
        names = tuple(name for name in said.lstrip("=").split(",") if name and not said.startswith("^"))
        whole = variable.startswith("GLOO") or said.startswith("=")
        if names and not any(card in names if whole else card.startswith(names) for card in addresses):
            return "fail", f"{variable}={said}, but there is: {found}", f"export {variable}=CARD, or unset it"
        found += f"; {variable}={said}" if said else ""
    if os.environ.get("GLOO_SOCKET_IFNAME") and os.environ.get("NCCL_SOCKET_IFNAME"):
        return "ok", found, ""
    if len(cards) > 1:
        return "warn", f"{found}: several to choose from", _SITE_CARDS
    with suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if address.startswith("127.") and cards:
            return "warn", f"{found}; this host's name leads to {address}, where no other node finds it", _SITE_CARDS
    return "ok", found, ""
