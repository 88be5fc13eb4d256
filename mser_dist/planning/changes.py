"""The changes to a config or cluster that would help most, found by planning each of them."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.planning.cluster import Cluster
from mser_dist.planning.collectives import Traffic
from mser_dist.planning.given import Given
from mser_dist.planning.plan import Network, TrainingPlan, look, plan
from mser_dist.planning.rehearsal import Rehearsed
from mser_dist.training.engine import find_json

Config = cfg.Stage1 | cfg.Stage2


@dataclass(frozen=True)
class Change:
    """what: as it can be typed. plan: with it. gain: GPU-seconds a clip, before over after. fits: only with it."""

    what: str
    plan: TrainingPlan
    gain: float
    fits: bool


def best(
    config: Config, cluster: Cluster, given: Given, network: Network, now: TrainingPlan, most: int = 3
) -> list[Change]:
    """Those that make a config fit that does not, then those that spend the fewest GPU-seconds on a clip."""
    found = []
    for what, other, machines in _candidates(config, cluster):
        try:
            then = plan(other, machines, given, _seen(config, other, machines, given, network))
        except UserError:  # a batch that does not divide, a file that is not there
            continue
        gain = _spent(now) / _spent(then)
        if then.fits and (not now.fits or gain > 1.02):
            found.append(Change(what, then, gain, not now.fits))
    return sorted(found, key=lambda change: -change.gain)[:most]


def _spent(found: TrainingPlan) -> float:
    return found.seconds.step * found.cluster.world_size / found.clips


def _candidates(config: Config, cluster: Cluster) -> Iterator[tuple[str, Config, Cluster]]:
    train, engine = config.train, config.engine
    micro, accumulation = cfg.batch_shape(train, cluster.world_size)
    if config.data.batching != "tokens":
        for size in (2 * micro, 4 * micro, micro // 2, micro // 4, micro // 8):
            if size and accumulation * micro % size == 0:
                yield f"train.micro_batch={size}", replace(config, train=replace(train, micro_batch=size)), cluster
        for times in (2, 4):
            changed = replace(train, global_batch=times * train.global_batch, micro_batch=times * micro)
            words = f"train.global_batch={changed.global_batch} train.micro_batch={changed.micro_batch}"
            yield words, replace(config, train=changed), cluster
    for name in ("zero2_bf16", "zero3_bf16", "zero3_hpz8", "zero3_offload"):
        fits_dtype = ("bf16" not in name and "hpz" not in name) or engine.dtype == "bfloat16"
        if fits_dtype and find_json(name) != find_json(engine.deepspeed):
            yield f"engine.deepspeed={name}", replace(config, engine=replace(engine, deepspeed=name)), cluster
    if isinstance(config, cfg.Stage2):
        llm, kept = config.llm, config.llm.gradient_checkpointing
        yield (
            f"llm.gradient_checkpointing={str(not kept).lower()}",
            replace(config, llm=replace(llm, gradient_checkpointing=not kept)),
            cluster,
        )
        if llm.packing != "prefix":
            yield "llm.packing=prefix", replace(config, llm=replace(llm, packing="prefix")), cluster
        if llm.lora is None and llm.pretrained and not llm.freeze:
            yield (
                "llm.lora={} (adapters alone are trained)",
                replace(config, llm=replace(llm, lora=cfg.LoraConfig())),
                cluster,
            )
    if config.encoder.cache == "off":
        cached = deepcopy(config)
        cached.encoder.cache = "auto"
        yield "encoder.cache=auto", cached, cluster
    for nodes in (cluster.nodes // 2, *(times * cluster.nodes for times in (2, 4, 8, 16, 32))):
        if nodes and train.global_batch % (nodes * cluster.gpus_per_node) == 0:
            per_rank = train.global_batch // (nodes * cluster.gpus_per_node)
            size = min(micro, per_rank)
            yield (
                f"--nodes {nodes}",
                replace(config, train=replace(train, micro_batch=size)),
                replace(cluster, nodes=nodes),
            )


def _seen(config: Config, other: Config, machines: Cluster, given: Given, network: Network) -> Network:
    """The network of a changed config, without rehearsing DeepSpeed again: what it sends is by the usual sums."""
    zero, before = (_settings(one) for one in (other, config))
    lora = isinstance(other, cfg.Stage2) and isinstance(config, cfg.Stage2) and other.llm.lora != config.llm.lora
    packing = (
        isinstance(other, cfg.Stage2) and isinstance(config, cfg.Stage2) and other.llm.packing != config.llm.packing
    )
    if packing:
        return look(other, machines, given)
    if zero == before and not lora:
        return network
    seen = network
    if lora:
        from mser_dist.planning import shapes

        model = shapes.on_meta(other, given.llm_shape, given.stage1)
        parameters = list(model.parameters())
        trained = [p.numel() for p in parameters if p.requires_grad]
        seen = replace(
            network, model=model, trained=trained, frozen=[p.numel() for p in parameters if not p.requires_grad]
        )
    return replace(seen, rehearsed=_summed(zero, seen, network.rehearsed.ranks, other))


def _settings(config: Config) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(find_json(config.engine.deepspeed).read_text(encoding="utf-8"))[
        "zero_optimization"
    ]
    return found


def _summed(zero: dict[str, Any], network: Network, ranks: int, config: Config) -> Rehearsed:
    """What a step says, by the sums of ds_configs/README.md: weights twice in ZeRO-3, once from the node with hpZ."""
    size = 4 if config.engine.dtype == "float32" else 2
    reduced = 4 * sum(network.trained)
    weights = size * (sum(network.trained) + sum(network.frozen))
    layers = max(1, len(network.trained) // 9)
    node = int(zero.get("zero_hpz_partition_size", 1))
    if zero["stage"] == 3:
        gathers = [Traffic("all-gather", ranks, layers * (1 if node > 1 else 2), weights * (1 if node > 1 else 2))]
        gathers += [Traffic("all-gather", node, layers, weights)] if node > 1 else []
        said = [*gathers, Traffic("reduce-scatter", ranks, math.ceil(reduced / 2e9), reduced)]
        return Rehearsed(ranks, 0, 0, 0, 1, said, said)
    more = [Traffic("reduce-scatter", ranks, math.ceil(reduced / 8e8), reduced)]
    end = [Traffic("all-gather", ranks, math.ceil(sum(network.trained) / 2e8), size * sum(network.trained))]
    return Rehearsed(ranks, 0, 0, 0, 1, [*more, *end], more if zero["stage"] == 2 else [])
