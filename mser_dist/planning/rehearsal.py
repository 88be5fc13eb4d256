"""Steps of a training in which nothing is computed: DeepSpeed's own engine at any number of ranks, on one process.

torch's fake process group answers every collective at once, and its fake tensors have shapes and no storage. What
DeepSpeed keeps on a rank and what it sends are then its own, not an estimate. `steps` is the same code for real ranks.
"""

import multiprocessing
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from mser_dist import config as cfg
from mser_dist import deepspeed_module, deepspeed_parts
from mser_dist.errors import UserError
from mser_dist.models.packed import SPEECH, batch_of
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.planning import shapes
from mser_dist.planning.collectives import Log, Traffic
from mser_dist.quiet import hush
from mser_dist.ranks.distributed import World
from mser_dist.training.engine import Engine

STEPS = 3  # DeepSpeed learns in the first which weights come next, and compares that between ranks in the second


@dataclass(frozen=True)
class Rehearsed:
    """What DeepSpeed holds and sends at `ranks` ranks.

    trained, frozen, masters: elements of this rank's parts. said: in a step of `micro` micro-batches; each further one
    adds `said_more`.
    """

    ranks: int
    trained: int
    frozen: int
    masters: int
    micro: int
    said: list[Traffic]
    said_more: list[Traffic]

    def step(self, micro: int) -> list[Traffic]:
        """What is said in a step of so many micro-batches, all of which but the last are alike."""
        more = {(one.kind, one.ranks): one for one in self.said_more}
        extra = micro - self.micro
        found = []
        for one in self.said:
            again = more.get((one.kind, one.ranks), Traffic(one.kind, one.ranks, 0, 0))
            found.append(Traffic(one.kind, one.ranks, one.calls + extra * again.calls, one.bytes + extra * again.bytes))
        return found


def deeper(short: Rehearsed, long: Rehearsed, between: int, more: int) -> Rehearsed:
    """Of an LLM with `more` layers above `long`'s: from `short` to it are `between`, and each further adds as much."""

    def on(one: int, other: int) -> int:
        return other + round((other - one) / between * more)

    def all_of(one: list[Traffic], other: list[Traffic]) -> list[Traffic]:
        before = {(t.kind, t.ranks): t for t in one}
        found = []
        for now in other:
            then = before.get((now.kind, now.ranks), Traffic(now.kind, now.ranks, 0, 0))
            found.append(replace(now, calls=on(then.calls, now.calls), bytes=on(then.bytes, now.bytes)))
        return found

    return replace(
        long,
        trained=on(short.trained, long.trained),
        frozen=on(short.frozen, long.frozen),
        masters=on(short.masters, long.masters),
        said=all_of(short.said, long.said),
        said_more=all_of(short.said_more, long.said_more),
    )


def rehearse(
    config: cfg.Stage1 | cfg.Stage2,
    ranks: int,
    micro: int,
    llm_shape: str | None = None,
    stage1: str | None = None,
    layers: int | None = None,
) -> Rehearsed:
    """A step of `micro` micro-batches, in a process of its own, with which the fake group ends.

    layers: of the LLM, in place of its own.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_alone, config, ranks, micro, llm_shape, stage1, layers).result()
        except UserError:
            raise
        except RuntimeError as error:
            line = " ".join(str(error).split())[:200]
            raise UserError(
                f"DeepSpeed could not be rehearsed at {ranks} ranks ({line}): --debug shows where"
            ) from error


def _alone(
    config: cfg.Stage1 | cfg.Stage2,
    ranks: int,
    micro: int,
    llm_shape: str | None,
    stage1: str | None,
    layers: int | None,
) -> Rehearsed:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hidden = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # a GPU of this machine has no part in it
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), **hidden}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    hush()
    warnings.simplefilter("ignore")  # torch's names that DeepSpeed uses are deprecated
    torch.set_num_threads(1)
    deepspeed_parts.skip_shared_memory_op()
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    deepspeed_module.module().init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = replace(config, train=replace(config.train, global_batch=ranks * micro, micro_batch=1))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = shapes.build(config, llm_shape, stage1, layers)
        for name in ("to", "bfloat16", "half", "float"):  # there is nothing to move, and Engine gives the dtype
            setattr(model, name, lambda *_, **__: model)
        with Log(pretending=True):
            engine = Engine(model, config, World(0, ranks, 0, "127.0.0.1", 29500, "torchrun"), STEPS, "cpu")
    made = batch(model)  # of real tensors: how many answers there are is looked up in them
    with fake, Log(pretending=True) as log:
        said_more = steps(engine, model, made, micro, log)
    parameters = list(engine.module.parameters())
    own = {
        wanted: sum(deepspeed_parts.own_numel(p) for p in parameters if p.requires_grad == wanted)
        for wanted in (True, False)
    }
    masters = {id(part.owner): part.owner.numel() for group in engine.parts() for part in group}
    return Rehearsed(ranks, own[True], own[False], sum(masters.values()), micro, log.said(), said_more)


def steps(engine: Engine, model: Any, made: dict[str, Any], micro: int, log: Log) -> list[Traffic]:
    """`STEPS` steps of forward and backward passes, as the stages make them; the log then holds the last one.

    Returns what its first micro-batch said, nothing where there is one alone.
    """
    first: list[Traffic] = []
    for _ in range(STEPS):
        log.clear()
        if isinstance(model, SpeechLLM):
            for number in range(micro):
                loss, _ = engine.forward({**made, "normalizer": 1.0})
                engine.backward(loss)
                engine.step()
                first = log.said() if number == 0 and micro > 1 else first
            continue
        with engine.one_reduction():
            for number in range(micro):
                rows = engine.forward({**made, "text": torch.zeros(len(made["lengths"]), model.text_head.in_features)})
                loss = sum((row.float().sum() for row in (*rows.rows, *rows.shared)), torch.zeros(()))
                with engine.no_sync() if number < micro - 1 else nullcontext():
                    engine.backward(loss)
                first = log.said() if number == 0 and micro > 1 else first
        engine.step()
    return first


def batch(model: Any, clips: int = 2) -> dict[str, Any]:
    """A micro-batch of so many clips of a second, as the model is given it: what is sent does not depend on it."""
    speech = model.speech
    made: dict[str, Any] = {"lengths": torch.full((clips,), 50)}
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if speech.frozen is not None:
        made["speech"] = torch.zeros(clips, 50, len(speech.layers), speech.any_encoder.width, dtype=dtype)
    else:
        features = speech.any_encoder.features
        size = features.size(1.0)
        made["lengths"] = torch.full((clips,), size)
        made["speech"] = (
            torch.zeros(clips, features.n_mels, size, dtype=dtype)
            if features.n_mels
            else torch.zeros(clips, size, dtype=dtype)
        )
    if isinstance(model, SpeechLLM):
        made |= batch_of(samples(speech.query_count, clips), "rows")
    return made


def samples(
    queries: int, clips: int, instruction: int = 4, kinds: int = 1
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Prompts and answers of the length of real ones: an instruction, of `kinds` different ones, speech, the turn's end
    (5 tokens), and an answer (3)."""
    made: list[tuple[Sequence[int], Sequence[int]]] = []
    for clip in range(clips):
        kind = clip * kinds // clips
        made.append(([kind] * instruction + [SPEECH] * queries + [7] * 5, [8] * 3))
    return made
