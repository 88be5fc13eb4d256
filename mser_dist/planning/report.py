"""A plan in words and tables, as JSON, and as a plot of step time and memory against ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.planning.changes import Change
from mser_dist.planning.cluster import Cluster
from mser_dist.planning.given import Given
from mser_dist.planning.memory import USABLE
from mser_dist.planning.plan import Network, TrainingPlan, plan
from mser_dist.tables import Table, count

_GIB = 2**30


def parts(found: TrainingPlan, changes: list[Change], price: float | None) -> list[Table | str]:
    """What is printed."""
    cluster, room = found.cluster, found.cluster.gpu.memory / _GIB
    verdict = (
        f"fits: {found.memory_sum / _GIB:.1f} of {room:.1f} GiB a GPU"
        if found.fits
        else f"does not fit: {found.memory_sum / _GIB:.1f} GiB a GPU, and {USABLE * room:.1f} of {room:.1f} can be used"
    )
    memory = [[name, f"{value / _GIB:.2f}"] for name, value in found.memory.items()]
    rest = [[f"host, a node: {name}", f"{value / _GIB:.2f}"] for name, value in found.host.items()]
    rest += [
        ["disk: a checkpoint", f"{found.checkpoint / _GIB:.2f}"],
        ["disk: the export", f"{found.export / _GIB:.2f}"],
    ]
    said = [
        [one.kind, f"{one.ranks:,}", f"{one.calls:,}", f"{one.bytes:,}", f"{one.sent / 1e9:.3f}"] for one in found.said
    ]
    nodes = f"{cluster.nodes:,} × {cluster.gpus_per_node} {cluster.gpu.name}"
    if cluster.nodes > 1:
        nodes += f", {cluster.across * 8 / 1e9:g} Gb/s a GPU between nodes"
    shown: list[Table | str] = [
        f"{nodes}: {count(cluster.world_size, 'rank')}, micro-batch {found.micro_batch}, {found.accumulation} a step",
        Table(["memory of a rank", "GiB"], [memory, [["sum", f"{found.memory_sum / _GIB:.2f}"]], rest]),
        verdict,
    ]
    if said:
        shown.append(Table(["a step's collectives", "ranks", "messages", "bytes", "GB a rank sends"], [said]))
    shown.append(Table(["", ""], [_time(found, price)], "lr"))
    if changes:
        rows = [
            [c.what, f"{c.plan.seconds.step:.2f}", f"{c.plan.memory_sum / _GIB:.1f}", f"{c.gain:.2f}×"] for c in changes
        ]
        shown.append(Table(["what would help", "s a step", "GiB", "clips a GPU-hour"], [rows]))
    elif not found.fits:
        shown.append(
            "no change that was tried makes it fit: take GPUs with more memory, more of them, or a smaller LLM"
        )
    else:
        shown.append("no change that was tried would spend less")
    shown.append("\n".join(f"note: {line}" for line in found.notes))
    return shown


def _time(found: TrainingPlan, price: float | None) -> list[list[str]]:
    low, high = found.interval
    rows = [
        ["clips a step", f"{found.clips:,}"],
        ["tokens a step" if found.tokens else "", f"{found.tokens:,.0f}"],
        ["computing, s", f"{found.seconds.compute:.3g}"],
        ["communicating, s (mostly beside it)", f"{found.seconds.communicate:.3g}"],
        ["step, s", f"{found.seconds.step:.3g}"],
        ["80 % of held-out figures lie within, s", f"{low:.3g} to {high:.3g}"],
    ]
    if found.duration is not None and found.gpu_hours is not None:
        rows.append(["steps", f"{found.steps:,}"])
        rows.append(
            [
                "of that hearing the clips once, h" if found.encoding_seconds else "",
                f"{found.encoding_seconds / 3600:.2g}",
            ]
        )
        rows.append(["whole training, h", f"{found.duration / 3600:.3g}"])
        rows.append(["GPU-hours", f"{found.gpu_hours:,.4g}"])
        if price is not None:
            rows.append([f"cost at {price:g} a GPU-hour", f"{price * found.gpu_hours:,.4g}"])
    return [row for row in rows if row[0]]


def as_json(found: TrainingPlan, changes: list[Change], price: float | None) -> dict[str, Any]:
    """All that is printed, in bytes and seconds."""
    cluster = found.cluster
    return {
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "gpu": cluster.gpu.name,
            "link_bytes_s": cluster.across,
        },
        "ranks": cluster.world_size,
        "micro_batch": found.micro_batch,
        "accumulation": found.accumulation,
        "clips_a_step": found.clips,
        "tokens_a_step": found.tokens,
        "memory": found.memory,
        "memory_sum": found.memory_sum,
        "memory_of_gpu": cluster.gpu.memory,
        "fits": found.fits,
        "host": found.host,
        "checkpoint": found.checkpoint,
        "export": found.export,
        "collectives": [
            {"kind": s.kind, "ranks": s.ranks, "messages": s.calls, "bytes": s.bytes, "sent": s.sent}
            for s in found.said
        ],
        "seconds": {
            "compute": found.seconds.compute,
            "communicate": found.seconds.communicate,
            "step": found.seconds.step,
        },
        "interval": list(found.interval),
        "steps": found.steps,
        "duration": found.duration,
        "gpu_hours": found.gpu_hours,
        "cost": None if price is None or found.gpu_hours is None else price * found.gpu_hours,
        "changes": [
            {"what": c.what, "step": c.plan.seconds.step, "memory": c.plan.memory_sum, "gain": c.gain} for c in changes
        ],
        "notes": found.notes,
    }


def against_ranks(
    config: cfg.Stage1 | cfg.Stage2, cluster: Cluster, given: Given, network: Network
) -> list[TrainingPlan]:
    """Plans at 1 to 4,096 ranks, twice as many each, at the same clips a rank and micro-batch as here."""
    micro, accumulation = cfg.batch_shape(config.train, cluster.world_size)
    found = []
    for power in range(13):
        ranks = 2**power
        train = replace(config.train, global_batch=ranks * micro * accumulation, micro_batch=micro)
        try:
            found.append(plan(replace(config, train=train), cluster.sized(ranks), given, network))
        except UserError:  # hpZ wants whole nodes
            continue
    return found


def draw(found: list[TrainingPlan], here: TrainingPlan, path: Path) -> None:
    """Step time and memory of a rank against ranks, at the same clips a rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    ranks = [one.cluster.world_size for one in found]
    above.fill_between(
        ranks, [p.interval[0] for p in found], [p.interval[1] for p in found], alpha=0.2, label="80 % interval"
    )
    above.plot(ranks, [p.seconds.step for p in found], marker="o", label="step")
    above.plot(ranks, [p.seconds.compute for p in found], ls="--", label="computing")
    above.plot(ranks, [p.seconds.communicate for p in found], ls=":", label="communicating")
    above.set_ylabel("seconds a step")
    above.set_ylim(bottom=0)
    below.plot(ranks, [p.memory_sum / _GIB for p in found], marker="o", color="C3", label="memory of a rank")
    room = here.cluster.gpu.memory / _GIB
    below.axhline(
        USABLE * room, color="0.4", ls="--", label=f"{USABLE * room:.0f} of a {here.cluster.gpu.name}'s {room:.0f} GiB"
    )
    below.set_ylabel("GiB")
    below.set_ylim(bottom=0)
    below.set_xscale("log", base=2)
    below.set_xticks(ranks, [f"{rank:,}" for rank in ranks], rotation=45)
    below.set_xlabel("ranks")
    for axes in (above, below):
        axes.axvline(here.cluster.world_size, color="0.8", zorder=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    clips = count(here.micro_batch * here.accumulation, "clip")
    above.set_title(f"{clips} a rank and step, {here.cluster.gpu.name}")
    figure.savefig(path, dpi=130)
