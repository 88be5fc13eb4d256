"""What a stage 2 begins with, and the frozen weights that its checkpoints do not hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import bases, exported, initial, publish
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.speech import build_speech
from mser_dist.models.speech_llm import SpeechLLM

SDPA, LABELS = Attention("sdpa", "test"), ["anger", "happy", "sad"]
ENCODER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
ARCH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LORA = cfg.LoraConfig(rank=2, alpha=4, targets=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of a stage 1, ``one``, a stage 2 with an LLM made on the spot, ``two``, and adapters of it, ``lora``."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    qformer = cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2)
    aligner = Aligner(build_speech(cfg.EncoderConfig(arch=ENCODER), qformer, SDPA), 4, cfg.ContrastiveConfig(width=8))
    card = {"stage": 1, "labels": LABELS, "text_width": 4, **exported.aligner_card(aligner)}
    publish.write(folder / "one/export", aligner, aligner.state_dict(), card)
    write(folder, "two", *made(config(folder, arch=ARCH)))
    write(folder, "lora", *made(adapting(folder)))
    return folder


def config(folder: Path, init_from: Path | None = None, **llm: Any) -> cfg.Stage2:
    found = cfg.Stage2(stage1=str(folder / "one"), llm=cfg.LLMConfig(**llm))
    found.init_from, found.data.labels = str(init_from) if init_from else None, LABELS
    return found


def adapting(folder: Path, init_from: Path | None = None, lora: cfg.LoraConfig | None = LORA) -> cfg.Stage2:
    return config(folder, init_from, pretrained=str(folder / "two/export/llm"), lora=lora)


def made(wanted: cfg.Stage2) -> tuple[SpeechLLM, Any, str | None]:
    return initial.build(wanted, initial.find(wanted), SDPA, {})


@torch.no_grad()
def write(folder: Path, name: str, model: SpeechLLM, tokenizer: Any, base: str | None) -> None:
    for parameter in model.parameters():  # as a training would have it
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    card = {"stage": 2, "labels": LABELS, **exported.speech_llm_card(model, base)}
    publish.write(folder / name / "export", model, model.state_dict(), card, tokenizer)


@torch.no_grad()
def answer(model: SpeechLLM) -> torch.Tensor:
    torch.manual_seed(1)
    speech, lengths, ids = torch.randn(2, 80, 40), torch.tensor([40, 31]), torch.tensor([[5, -200, -200, 7]] * 2)
    given = model.eval().speech.prepared({"speech": speech, "lengths": lengths}, "cpu")
    inputs = model.embed_prompt(ids, given["speech"], given["lengths"])
    return model.logits(inputs, ids)[0]


def test_a_whole_run_goes_on_as_it_ended(runs: Path) -> None:
    model, _, base = made(config(runs, runs / "two", arch=ARCH))
    wanted, _ = exported.load_speech_llm(runs / "two/export", SDPA)
    assert torch.equal(answer(model), answer(wanted)) and base is None
    assert all(parameter.requires_grad for parameter in model.llm.parameters())


def test_adapters_go_on_as_adapters_or_are_merged(runs: Path) -> None:
    wanted = answer(exported.load_speech_llm(runs / "lora/export", SDPA)[0])
    again, _, base = made(adapting(runs, runs / "lora"))
    assert torch.equal(answer(again), wanted) and base == str(runs / "two/export/llm")
    assert any(p.requires_grad for n, p in again.llm.named_parameters() if "lora_" in n)
    merged, _, _ = made(adapting(runs, runs / "lora", lora=None))
    torch.testing.assert_close(answer(merged), wanted, rtol=1e-5, atol=1e-6)
    assert not hasattr(merged.llm, "peft_config") and all(p.requires_grad for p in merged.llm.parameters())
    frozen = adapting(runs, runs / "lora", lora=None)
    frozen.llm.freeze = True
    assert not any(p.requires_grad for p in made(frozen)[0].llm.parameters())
    assert {path.name for path in initial.bases_of(frozen, initial.find(frozen))["llm."].files} == {
        "model.safetensors", "adapter_model.safetensors",
    }  # fmt: skip


def test_a_folder_of_adapters_brings_these_alone(runs: Path) -> None:
    folder = runs / "lora/export/llm"
    model, _, _ = made(adapting(runs, folder))
    there, _ = exported.load_speech_llm(runs / "lora/export", SDPA)
    for (name, one), (_, two) in zip(model.llm.named_parameters(), there.llm.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    one, two = (m.get_parameter("projector.0.weight") for m in (model, there))
    assert not torch.equal(one, two)


def test_a_whole_run_takes_new_adapters_whose_base_it_is(runs: Path) -> None:
    begin = config(runs, runs / "two", arch=ARCH)
    begin.llm.lora = LORA
    model, _, base = made(begin)
    assert base == str((runs / "two/export/llm").resolve()) and hasattr(model.llm, "peft_config")


def mistaken(runs: Path, tmp_path: Path) -> list[tuple[cfg.Stage2, str]]:
    other = Path(shutil.copytree(runs / "lora/export/llm", tmp_path / "adapter"))
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "ab/Other-7B"}))
    pickled = Path(shutil.copytree(runs / "lora/export/llm", tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    labels = config(runs, runs / "two", arch=ARCH)
    labels.data.labels = ["anger", "fear"]
    return [
        (adapting(runs, other), "adapters of ab/Other-7B, and llm.pretrained=.* another model"),
        (adapting(runs, pickled), "adapter_model.safetensors cannot be read"),
        (adapting(runs, other, lora=None), "folder of adapters: set llm.lora"),
        (adapting(runs, runs / "lora", replace(LORA, rank=3)), "llm.lora.rank=3, but init_from=.* brings 2: set"),
        (adapting(runs, runs / "lora", replace(LORA, targets=["q_proj"])), "v_proj.* of another model, or damaged"),
        (adapting(runs, runs / "two"), "was trained with llm.pretrained=None: set llm.pretrained=null"),
        (config(runs, runs / "lora", arch=ARCH), "llm.pretrained=None, but .*: set llm.pretrained=.*two/export/llm"),
        (config(runs, runs / "one", arch=ARCH), "this is a run of stage 1; name a run of stage 2"),
        (labels, "made on the spot, and has no words for fear: set data.labels"),
    ]


def test_what_does_not_fit_is_refused_in_one_line(runs: Path, tmp_path: Path) -> None:
    for wanted, says in mistaken(runs, tmp_path):
        with pytest.raises(UserError, match=says) as caught:
            made(wanted)
        assert "\n" not in str(caught.value)


def test_frozen_weights_are_left_out_where_they_are_loaded_anew_and_their_files_are_the_same(
    runs: Path, tmp_path: Path
) -> None:
    wanted = adapting(runs)
    model, _, _ = made(wanted)
    found = initial.bases_of(wanted, initial.find(wanted))
    names = bases.reloaded(model, found)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert names == frozen and any(name.startswith("llm.") for name in names)
    assert bases.reloaded(nn.ModuleDict({"speech": nn.Linear(2, 2)}), found) == set(), "it is trained"
    made_here = config(runs, arch=ARCH, freeze=True)
    kept = initial.bases_of(made_here, initial.find(made_here))
    assert "llm." not in kept, "no file has an LLM that was made on the spot: a checkpoint has to hold it"

    copied = Path(shutil.copytree(runs / "two/export/llm", tmp_path / "llm"))
    wanted.llm.pretrained = str(copied)
    before = bases.digests(initial.bases_of(wanted, initial.find(wanted)))
    assert list(before["llm."]["files"]) == ["model.safetensors"]
    bases.check_same(before, bases.digests(initial.bases_of(wanted, initial.find(wanted))), "mend it")
    data = bytearray((copied / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"frozen weights llm\.\* of .*sha256 of model.safetensors: .*: mend it"):
        bases.check_same(before, bases.digests(initial.bases_of(wanted, initial.find(wanted))), "mend it")
