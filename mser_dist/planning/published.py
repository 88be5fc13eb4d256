"""Published figures of trainings' speed, as the step-time model sees them. published.csv has each with its source."""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from mser_dist.planning.cluster import GPUS
from mser_dist.planning.step_time import Machine, StepWork
from mser_dist.training.peaks import peak_of

FILE = Path(__file__).with_name("published.csv")
NODE = 8  # GPUs of a node in the figures of several nodes
MANY = 64  # GPUs: what is planned for, and what errors are reported over

_GPU = {
    "h100_80gb": "h100",
    "h100_96gb_hbm2e_500W": "h100",
    "h100": "h100",
    "a100": "a100",
    "a100_80gb": "a100",
    "a100_40gb": "a100-40gb",
}
# (layers, width) by billions of parameters: those of the MPT family from llm-foundry's configs, of the others from
# their papers. A model is taken for the nearest.
_MPT = {"125m": (12, 768), "350m": (24, 1024), "760m": (24, 1536), "1b": (24, 2048), "3b": (32, 2560)}
_MPT |= {"7b": (32, 4096), "13b": (40, 5120), "30b": (48, 7168), "70b": (64, 8192)}
_SHAPES = {3.6: (32, 3072), 6.74: (32, 4096), 8.03: (32, 4096), 10.0: (48, 4096), 13.0: (40, 5120)}
_SHAPES |= {34.0: (48, 8192), 52.0: (62, 8192), 70.6: (80, 8192), 80.0: (80, 8192)}
_NOT_OURS = ("tp ", "tp=2", "tp=4", "tp=8", "cp ", "async", "pp=", "lora", "deepcompile", "offload", "8-bit")


@dataclass(frozen=True)
class Figure:
    """One row. number: its id. source: the repository. A link that nobody states is the GPU's own default."""

    number: str
    source: str
    model: str
    strategy: str
    ranks: int
    work: StepWork
    machine: Machine
    seconds: float


def figures() -> list[Figure]:
    """Those that this project's trainings can be compared with: data-parallel alone (ZeRO-1, 2, 3, FSDP), in 16 bits,
    on a GPU whose peak is known, with tokens and micro-batch said."""
    with FILE.open(encoding="utf-8", newline="") as opened:
        found = [_figure(row) for row in csv.DictReader(opened)]
    return [figure for figure in found if figure is not None]


def _number(text: str) -> float | None:
    found = re.match(r"[0-9.]+(e[0-9]+)?", text or "")
    return float(found[0]) if found else None


def _figure(row: dict[str, str]) -> Figure | None:
    size, ranks, length, clips = (_number(row[key]) for key in ("params", "n_gpus", "seq_len", "micro_batch"))
    strategy, said = f"{row['strategy']} {row['model']}".lower(), f"{row['precision']} {row['note']}".lower()
    gpu = _GPU.get(row["gpu"].split(" ")[0])
    speed, tflops = _number(row["tokens_s_gpu"]), _number(row["model_tflops_gpu"])
    if size is None or ranks is None or length is None or clips is None or gpu is None or not (speed or tflops):
        return None
    if any(word in strategy for word in _NOT_OURS) or "fp8" in said or "float8" in said:
        return None
    global_batch, stated = _number(row["global_batch_seqs"]), _number(row["grad_accum"])
    micro = round(stated or (global_batch / (ranks * clips) if global_batch else 1))
    step = _number(row["step_time_s"])  # what is published as TFLOP/s counts what is computed again in some rows
    speed = speed or (tflops or 0) * 1e12 / (6 * size)
    layers, width = _shape(row["model"].lower(), size)
    tokens = clips * length
    checkpointing = row["activation_ckpt"].lower()
    recomputed = 1.0 if checkpointing.startswith(("true", "full")) else 0.3 if "s" in checkpointing[:1] else 0.0
    stage = 1 if "zero-1" in strategy else 2 if "grad_op" in strategy else 3
    nodes, inside = max(1, math.ceil(ranks / NODE)), min(NODE, ranks)
    reduced = _reduced_bytes(row)
    total = {1: 2 + reduced, 2: (2 + reduced) * micro, 3: (4 + reduced) * micro}[stage] * size
    across, within = total * (1 - 1 / nodes) / inside, total * (1 - 1 / inside)
    if "hybrid" in strategy or "hsdp" in strategy:  # shards within a node; between nodes an all-reduce of gradients
        across = 2 * reduced * size / inside * (1 - 1 / nodes) * (micro if stage == 3 else 1)
    messages = layers * {1: 2, 2: 2 * micro, 3: 3 * micro}[stage]
    work = StepWork(
        6 * size * tokens,
        6 * layers * width * length * tokens,
        recomputed,
        width,
        layers,
        tokens,
        micro,
        across,
        within,
        messages,
    )
    link, known = _link(row["interconnect"]), GPUS[gpu]
    peak = peak_of(known.device, "bfloat16")
    assert peak is not None
    machine = Machine(peak, known.like, link or known.across, known.within, nodes)
    source = row["source_repo"]
    return Figure(
        row["id"],
        source,
        row["model"],
        row["strategy"],
        int(ranks),
        work,
        machine,
        step or tokens * micro / speed,
    )


def _shape(model: str, size: float) -> tuple[int, int]:
    for name, shape in _MPT.items():
        if model.startswith(f"mpt-{name}"):
            return shape
    return _SHAPES[min(_SHAPES, key=lambda billions: abs(math.log(billions * 1e9 / size)))]


def _reduced_bytes(row: dict[str, str]) -> int:
    """Bytes that a gradient is sent in. Composer's mixed precision DEFAULT and FSDP2 as torchtitan sets it reduce in
    float32, Composer's PURE and DeepSpeed's bf16 in bfloat16."""
    wide = (
        "DEFAULT" in row["precision"]
        or "torchtitan" in row["framework"]
        or "fp32" in row["strategy"].lower().split("master")[0]
    )
    return 4 if wide else 2


def _link(said: str) -> float | None:
    """Bytes a second of a GPU's share; a figure that does not say of what is a node's."""
    if several := re.search(r"([0-9]+) x ([0-9]+) Gb", said):
        return float(several[1]) * float(several[2]) * 1e9 / 8 / NODE
    found = re.search(r"([0-9]+) ?Gb(?:/s|ps)", said)
    if found is None:
        return None
    return float(found[1]) * 1e9 / 8 / (1 if "per GPU" in said else NODE)


def split(found: list[Figure]) -> tuple[list[Figure], list[Figure]]:
    """(to fit on, held out), whole sources each, by a rule that looks at no speed.

    Held out is every source that has figures of `MANY` GPUs, for they are what is planned for, but the one with the
    most figures, which alone varies sizes, ranks, batches and GPUs enough to tell the constants apart.
    """
    sources = {figure.source for figure in found}
    largest = max(sources, key=lambda source: sum(figure.source == source for figure in found))
    held = {figure.source for figure in found if figure.ranks >= MANY} - {largest}
    return [f for f in found if f.source not in held], [f for f in found if f.source in held]
