"""A training planned: `plan(config, cluster)` says what a rank holds, what a step sends, and how long all takes."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.flops import Heard, StepCount, Work, work_of
from mser_dist.models.packed import batch_of
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.planning import memory, rehearsal, shapes, step_time
from mser_dist.planning.cluster import Cluster
from mser_dist.planning.collectives import Traffic
from mser_dist.planning.given import Given
from mser_dist.planning.memory import USABLE, Activations
from mser_dist.planning.rehearsal import Rehearsed, samples
from mser_dist.planning.step_time import Seconds
from mser_dist.training.engine import resolve_json
from mser_dist.training.peaks import peak_of

REHEARSED = 16  # ranks at most: beyond them the same is said, of parts that are padded otherwise
DEEP = 36  # layers of an LLM that are rehearsed as they are
SHALLOW = (8, 10)  # layers in place of more
_KINDS = 4  # of instruction, in a micro-batch


@dataclass(frozen=True)
class Network:
    """What does not depend on the cluster. elements: of each parameter, trained or not. encoder: of a frozen one."""

    model: Any
    trained: list[int]
    frozen: list[int]
    encoder: int
    clips: int  # of the micro-batch that `activations` are of
    activations: Activations
    rehearsed: Rehearsed


@dataclass(frozen=True)
class TrainingPlan:
    """memory: bytes of a rank by part; its sum decides whether it `fits`. host: of a node. interval: of the step's
    seconds, 80 % of held-out figures' lie in one like it. steps, hours: None where the number of clips is not known.
    """

    cluster: Cluster
    micro_batch: int
    accumulation: int
    tokens: float
    clips: int
    seconds: Seconds
    interval: tuple[float, float]
    memory: dict[str, float]
    host: dict[str, float]
    checkpoint: float
    export: float
    said: list[Traffic]
    steps: int | None
    encoding_seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def memory_sum(self) -> float:
        """Bytes of a rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_sum <= USABLE * self.cluster.gpu.memory

    @property
    def duration(self) -> float | None:
        """Seconds of all steps, and of hearing the clips once before."""
        return None if self.steps is None else self.steps * self.seconds.step + self.encoding_seconds

    @property
    def gpu_hours(self) -> float | None:
        return None if self.duration is None else self.duration / 3600 * self.cluster.world_size


def look(config: cfg.Stage1 | cfg.Stage2, cluster: Cluster, given: Given) -> Network:
    """Rehearse a config: its networks, what a micro-batch keeps, and what DeepSpeed holds and sends."""
    model = shapes.on_meta(config, given.llm_shape, given.stage1)
    parameters = list(model.parameters())
    micro, accumulation = cfg.batch_shape(config.train, cluster.world_size)
    frames = max(1, round(given.seconds * 50))
    kept = memory.activations(config, micro, frames, given.prompt_tokens, _KINDS, given.llm_shape, given.stage1)
    hpz = _zero(config, cluster).get("zero_hpz_partition_size", 1)
    ranks = min(cluster.world_size, REHEARSED) if hpz <= REHEARSED else cluster.world_size
    ranks -= ranks % max(1, hpz) if ranks > hpz else 0
    ranks = max(2, ranks)  # one rank says nothing; the plans of more that it is compared with do
    rehearsed = _rehearsed(config, model, ranks, min(2, accumulation), given)
    encoder = model.speech.frozen
    return Network(
        model,
        [p.numel() for p in parameters if p.requires_grad],
        [p.numel() for p in parameters if not p.requires_grad],
        sum(p.numel() for p in encoder.encoder.parameters()) if encoder else 0,
        micro,
        kept,
        rehearsed,
    )


def _rehearsed(config: cfg.Stage1 | cfg.Stage2, model: Any, ranks: int, micro: int, given: Given) -> Rehearsed:
    """DeepSpeed's; of a deep LLM that of two shallow ones, for all its layers are alike: it would take minutes."""
    text = model.llm_config.get_text_config() if isinstance(model, SpeechLLM) else None
    kinds = set(getattr(text, "layer_types", None) or ())
    if text is None or text.num_hidden_layers <= DEEP or len(kinds) > 1 or config.train.groups:
        return rehearsal.rehearse(config, ranks, micro, given.llm_shape, given.stage1)
    few, more = SHALLOW
    short, long = (
        rehearsal.rehearse(config, ranks, micro, given.llm_shape, given.stage1, layers) for layers in SHALLOW
    )
    return rehearsal.deeper(short, long, more - few, text.num_hidden_layers - more)


def _zero(config: cfg.Stage1 | cfg.Stage2, cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = resolve_json(config, cluster.world_size)["zero_optimization"]
    return found


def plan(
    config: cfg.Stage1 | cfg.Stage2, cluster: Cluster, given: Given | None = None, network: Network | None = None
) -> TrainingPlan:
    """The plan of a config on a cluster. network: of `look`, where it has been rehearsed on another number of ranks.

    Raises `UserError` for a batch that the ranks do not divide, a format that the GPU has not, unknown shapes.
    """
    given = given or Given.of(config)
    world = cluster.world_size
    ds_json = resolve_json(config, world)
    micro, accumulation = cfg.batch_shape(config.train, world)
    peak = peak_of(cluster.gpu.device, config.engine.dtype)
    if peak is None:
        raise UserError(
            f"a {cluster.gpu.name} does not compute in {config.engine.dtype}: set engine.dtype=float16, or name another"
        )
    if config.engine.peak_tflops is not None:
        peak = 1e12 * config.engine.peak_tflops
    network = network or look(config, cluster, given)
    zero = ds_json["zero_optimization"]
    size = torch.empty((), dtype=getattr(torch, config.engine.dtype)).itemsize
    kept = network.activations.times(micro / network.clips)
    said = [_at(one, world, network) for one in network.rehearsed.step(accumulation)] if world > 1 else []
    work = _work(config, network, micro, accumulation, given, cluster, said)
    constants, interval = step_time.shipped()
    machine = step_time.Machine(peak, cluster.gpu.like, cluster.across, cluster.gpu.within, cluster.nodes)
    seconds = step_time.seconds(work, machine, constants)
    trained, everything = sum(network.trained), sum(network.trained) + sum(network.frozen)
    notes = list(given.notes)
    if not cluster.gpu.fitted:
        notes.append(
            f"no figures of a {cluster.gpu.name} were fitted: it is taken to reach the share of its peak that an "
            f"{cluster.gpu.like} does"
        )
    steps = config.train.steps
    if steps is None and given.clips is not None:
        steps = max(1, round(config.train.epochs * -(-given.clips // config.train.global_batch)))
        if config.data.batching == "tokens":
            notes.append("data.batching=tokens: an entry of the batch is taken for one clip, so that steps are at most")
    return TrainingPlan(
        cluster,
        micro,
        accumulation,
        work.tokens * accumulation * world,
        config.train.global_batch,
        seconds,
        (seconds.step * interval[0], seconds.step * interval[1]),
        _memory(config, network, ds_json, kept, size, world),
        _host(config, network, zero, world, cluster, given, size, trained),
        trained * 12.0 + (4.0 * trained if config.train.ema else 0.0),
        size * (everything + network.encoder),
        said,
        steps,
        _encoding(config, network, given, peak, cluster, constants),
        notes,
    )


def _padded(sizes: list[int], ranks: int) -> int:
    """Elements of all ranks' parts of parameters, each cut in as many."""
    return sum(-(-size // ranks) for size in sizes) * ranks


def _at(one: Traffic, world: int, network: Network) -> Traffic:
    """What was said at some ranks, said at `world`: parts are padded otherwise."""
    ranks = network.rehearsed.ranks
    if one.ranks != ranks or one.bytes < 4096 or ranks == world:
        return one if one.ranks != ranks else replace(one, ranks=world)
    sizes = network.trained + network.frozen
    return replace(one, ranks=world, bytes=round(one.bytes * _padded(sizes, world) / _padded(sizes, ranks)))


def _memory(
    config: cfg.Stage1 | cfg.Stage2, network: Network, ds_json: dict[str, Any], kept: Activations, size: int, world: int
) -> dict[str, float]:
    zero = ds_json["zero_optimization"]
    stage, trained, frozen = int(zero["stage"]), sum(network.trained), sum(network.frozen)
    part = _padded(network.trained, world) / world
    wide = ds_json.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    gradient = 4 if wide else size
    offload = {key: zero.get(f"offload_{key}", {}).get("device", "none") != "none" for key in ("param", "optimizer")}
    found: dict[str, float] = {}
    if stage == 3:
        found["weights (trained part)"] = 0 if offload["param"] else part * size
        found["weights (frozen part)"] = 0 if offload["param"] else _padded(network.frozen, world) / world * size
        small = [n for n in network.trained + network.frozen if n < zero.get("stage3_param_persistence_threshold", 1e5)]
        found["weights kept whole"] = sum(small) * size
        node = int(zero.get("zero_hpz_partition_size", 1))
        if node > 1:
            found["second copy in the node"] = _padded(network.trained + network.frozen, node) / node * size
        if world > 1:
            live = zero.get("stage3_max_live_parameters", 10**9)
            found["gathered weights"] = min(live, trained + frozen) * size
    else:
        found["weights (trained)"], found["weights (frozen)"] = trained * size, frozen * size
    whole = stage == 1 or (config.stage == 1 and config.train.micro_batch is not None)
    found["gradients"] = gradient * (trained if whole else part)
    found["optimizer (masters, moments)"] = (
        0 if offload["optimizer"] else 12 * part + (4 * part if config.train.ema else 0)
    )
    if world > 1:
        bucket = min(zero.get("reduce_bucket_size", 5e8), trained)
        sent = 4 if ds_json.get("communication_data_type") == "fp32" else size
        found["reduce buckets"] = bucket * (
            size * (2 if zero.get("overlap_comm") else 1) + (sent if sent != size else 0)
        )
    checkpointing = isinstance(config, cfg.Stage2) and config.llm.gradient_checkpointing
    found["frozen encoder"] = network.encoder * size
    found["activations: aligner"] = kept.aligner
    if isinstance(config, cfg.Stage2):
        found["activations: LLM"] = kept.of_llm(checkpointing)
        found["logits"] = kept.logits
    found["features"] = kept.cache
    return {name: value for name, value in found.items() if value}


def _host(
    config: cfg.Stage1 | cfg.Stage2,
    network: Network,
    zero: dict[str, Any],
    world: int,
    cluster: Cluster,
    given: Given,
    size: int,
    trained: int,
) -> dict[str, float]:
    """Bytes of a node's memory beyond what the processes themselves take."""
    share = cluster.gpus_per_node / world
    found = {}
    if config.train.background_save:
        found["copy for a background save"] = 12.0 * trained * share
    for key, bytes_each, count in (("optimizer", 12.0, trained), ("param", float(size), trained + sum(network.frozen))):
        if zero.get(f"offload_{key}", {}).get("device", "none") != "none":
            found[f"offloaded {key}"] = bytes_each * count * share
    if config.encoder.cache == "memory" and network.model.speech.frozen is not None and given.clips:
        encoder = network.model.speech.any_encoder
        found["features in memory"] = (
            given.clips * given.seconds * 50 / encoder.stride * len(encoder.layers) * encoder.width * size
        )
    return found


def _work(
    config: cfg.Stage1 | cfg.Stage2,
    network: Network,
    micro: int,
    accumulation: int,
    given: Given,
    cluster: Cluster,
    said: list[Traffic],
) -> step_time.StepWork:
    model = network.model
    count = StepCount(model)
    speech = model.speech
    encoder = speech.any_encoder
    heard, checkpointing = _heard(config, model, micro, given), 0.0
    if isinstance(model, SpeechLLM):
        assert isinstance(config, cfg.Stage2)
        made = batch_of(samples(speech.query_count, micro, given.prompt_tokens, _KINDS), config.llm.packing)
        _, computed = work_of(made, flash=False)
        without = Work(computed.tokens, 0.0, computed.answers)
        linear = count(heard, without, without).flops.model
        attention = (count(heard, computed, computed).flops.model - linear) / 2
        text = model.llm_config.get_text_config()
        width, layers, tokens = text.hidden_size, text.num_hidden_layers, computed.tokens
        checkpointing = float(config.llm.gradient_checkpointing)
    else:
        load = count(heard._replace(again=accumulation > 1))
        linear, attention, tokens = load.flops.hardware, 0.0, load.computed
        qformer = model.speech.qformer.config
        trained = speech.frozen is None
        width = encoder.width if trained else qformer.hidden_size
        layers = qformer.num_hidden_layers + (max(encoder.layers) if trained else 0)
    across = within = messages = 0.0
    nodes, inside = cluster.nodes, min(cluster.gpus_per_node, cluster.world_size)
    for one in said:
        twice = 2 if one.kind == "all-reduce" else 1
        everywhere = one.ranks > inside
        across += one.bytes * twice * (1 - 1 / nodes) / inside * everywhere
        within += one.bytes * twice * (1 - 1 / min(one.ranks, inside))
        messages += one.calls * everywhere
    return step_time.StepWork(
        linear, attention, checkpointing, width, layers, tokens, accumulation, across, within, messages
    )


def _heard(config: cfg.Stage1 | cfg.Stage2, model: Any, clips: int, given: Given) -> Heard:
    encoder, frames = model.speech.any_encoder, max(1, round(given.seconds * 50))
    if model.speech.frozen is not None and config.encoder.cache != "off":
        return Heard(torch.full((clips,), -(-frames // encoder.stride)), encoded=True)
    mels = encoder.features.n_mels
    return Heard(torch.full((clips,), frames * (2 if mels else 320)), encoded=False)


def _encoding(
    config: cfg.Stage1 | cfg.Stage2,
    network: Network,
    given: Given,
    peak: float,
    cluster: Cluster,
    constants: step_time.Constants,
) -> float:
    """Seconds in which a frozen encoder hears each clip once, at the share of the peak that its width allows."""
    speech = network.model.speech
    if speech.frozen is None or config.encoder.cache == "off" or given.clips is None:
        return 0.0
    encoder = speech.frozen.encoder
    frames = max(1, round(given.seconds * 50)) * (2 if encoder.features.n_mels else 320)
    tokens = float(encoder.frames(encoder.fed(torch.tensor([frames])))[0])
    flops = 2.0 * network.encoder * tokens
    share = (
        getattr(constants, cluster.gpu.like)
        / (1 + constants.width * 1024 / encoder.width)
        / (1 + constants.tokens * 1024 / tokens)
    )
    return math.ceil(given.clips / cluster.world_size) * (
        flops / (peak * share) + constants.launch / 3 * max(encoder.layers)
    )
