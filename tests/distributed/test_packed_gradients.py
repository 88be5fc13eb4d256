"""Two ranks under ZeRO-1, 2 and 3 that read packed rows have the gradients of one process, clip by clip."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mser_dist import config as cfg
from mser_dist.models.aligner import AlignHeads
from mser_dist.models.likelihood import Likelihoods, Way
from mser_dist.models.packed import IGNORE, Packing
from mser_dist.models.self_check import check_llm
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.ranks.distributed import World
from mser_dist.training.engine import Engine
from tests.contrastive_reference import reference
from tests.distributed.spawn import run
from tests.packed_llms import ANSWERS, PROMPTS, SAMPLES, clips, furthest, gradients, micro_batch, one_by_one, speech_llm

pytestmark = pytest.mark.distributed
KINDS = ["llama", "qwen3", "gemma3, window 5 in one layer", "mistral, window 5"]
ALIGNED = "llama, stage 1's loss beside"
PACKINGS: tuple[Packing, ...] = ("prefix", "rows", "off")
SHARES = ([[0, 1], [3]], [[2], [4, 5]])  # of each rank: two micro-batches of the step, of different sizes
EXACT = 1e-5  # relative, fp32: another order of summation


def engine_of(kind: str, stage: int, rank: int, folder: str) -> Engine:
    path = Path(folder) / f"{stage}-{rank}.json"
    small = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **small}}))
    # Steps that change nothing: several packings are held against the same weights.
    train = cfg.TrainConfig(global_batch=4, micro_batch=1, lr=0.0, grad_clip=0.0)
    config = cfg.Stage2(stage1="", train=train, engine=cfg.EngineConfig(deepspeed=str(path)))
    return Engine(model_of(kind), config, World(rank, 2), 10**6, "cpu")


def model_of(kind: str) -> SpeechLLM:
    if kind != ALIGNED:
        return speech_llm(kind)
    model = speech_llm("llama")
    torch.manual_seed(5)
    model.align, model.align_weight = AlignHeads(16, 8, cfg.ContrastiveConfig(width=8, beta=0.0)), 0.5
    return model


def captioned(chosen: list[int]) -> dict[str, torch.Tensor]:
    """What stage 1's loss asks of samples: their emotion, and a caption of it."""
    texts = torch.randn(6, 8, generator=torch.Generator().manual_seed(6))
    return {"emotion": torch.tensor(chosen) % 3, "caption": torch.tensor(chosen), "text": texts[chosen]}


def expected_of(kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the step in one process."""
    chosen = [i for share in SHARES for batch in share for i in batch]
    tokens = sum(len(SAMPLES[i][1]) for i in chosen)
    alone, expected = one_by_one(speech_llm("llama" if kind == ALIGNED else kind), chosen)
    expected = {name: grad / tokens for name, grad in expected.items()}
    if kind != ALIGNED:
        return alone / tokens, expected
    model, total = model_of(kind), torch.zeros(())
    assert model.align is not None
    for parts in zip(*SHARES, strict=True):  # a micro-batch of all ranks
        both = [i for part in parts for i in part]
        batch, said = micro_batch("off", both), captioned(both)
        x, y = model.align.embed(model.speech(batch["speech"], batch["lengths"]), said["text"]).rows
        scale, ids = model.align.scale()[0][0], (said["emotion"], said["caption"], torch.zeros(len(both)))
        total = total + 0.5 * reference("supcon", x, y, scale, torch.zeros(()), *ids) / 2  # the mean of two
    total.backward()
    beside = gradients(model)
    return alone / tokens + float(total.detach()), {n: grad + expected.get(n, 0) for n, grad in beside.items()}


def packed(rank: int, folder: str) -> dict[str, Any]:
    """By ZeRO stage and LLM: how far loss and gradients of each packing, and scores, are from those of one process."""
    from deepspeed.utils import safe_get_full_grad

    found: dict[str, Any] = {}
    tokens = sum(len(SAMPLES[i][1]) for share in SHARES for batch in share for i in batch)
    for stage in (1, 2, 3):
        for kind in [*KINDS, ALIGNED]:
            value, expected = expected_of(kind)
            engine = engine_of(kind, stage, rank, folder)
            model: Any = engine.module
            for packing in PACKINGS:
                total = torch.zeros(())
                for part in SHARES[rank]:
                    batch = micro_batch(packing, part)
                    assert int((batch["labels"] != IGNORE).sum()) == sum(len(SAMPLES[i][1]) for i in part)
                    batch |= captioned(part) if kind == ALIGNED else {}
                    loss, _ = engine.forward({**batch, "normalizer": tokens / 4})  # of four losses the mean is taken
                    total += loss.detach() / 4
                    engine.backward(loss)
                    if part is SHARES[rank][-1]:
                        grads = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
                    engine.step()
                grads = {name: torch.zeros_like(expected[name]) if g is None else g for name, g in grads.items()}
                torch.distributed.all_reduce(total)
                found[f"{stage} | {kind} | {packing}"] = [
                    abs(float(total) - value) / value,
                    furthest(grads, expected),
                ]
            if stage == 3 and kind != ALIGNED:
                checked = check_llm(model, PROMPTS, ANSWERS, "cpu", "prefix")
                ways: tuple[Way, ...] = (checked.scores_by, "whole")
                one, other = (Likelihoods(model, PROMPTS, ANSWERS, "cpu", way)(*clips(4)) for way in ways)
                found[f"{kind} | {checked.packing} | {checked.scores_by}"] = [float((one - other).abs().max())]
    return found


@pytest.mark.timeout(600)
def test_packed_rows_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    for part in run(packed, 2, str(tmp_path)):
        assert {f"{kind} | prefix | tree" for kind in KINDS} < set(part)
        assert len(part) == (3 * len(PACKINGS) + 1) * len(KINDS) + 3 * len(PACKINGS)
        for key, differences in part.items():
            assert max(differences) < EXACT, f"{key}: {differences}"
        print(f"largest difference: {max(max(each) for each in part.values()):.1e}")
