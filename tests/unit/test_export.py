"""Exports written file by file, of Hugging Face's own format where the LLM is; their card; a hub that refuses."""

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mser_dist
from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import chat, exported, publish
from mser_dist.models.llm import build_llm
from mser_dist.models.push import push
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.weights import Weights, Writers, files_of, plan, write_part
from mser_dist.prediction.model import Model
from mser_dist.training import rescore
from mser_dist.training.model_card import render
from tests.unit import tiny_exports
from tests.unit.tiny_exports import LABELS, LLM, SDPA


class Counted:
    """Weights that are copied to where the writer wants them, which is in so many bytes of memory at a time."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.alive, self.most = state, 0, 0
        self._seen: set[int] = set()

    def weights(self) -> Weights:
        import weakref

        def gone(key: int, size: int) -> None:
            self._seen.remove(key)
            self.alive -= size

        def get(name: str, place: Tensor | None) -> Tensor:
            assert place is not None
            memory = place.untyped_storage()
            if memory.data_ptr() not in self._seen:
                self._seen.add(memory.data_ptr())
                self.alive += memory.nbytes()
                self.most = max(self.most, self.alive)
                weakref.finalize(memory, gone, memory.data_ptr(), memory.nbytes())
            return place.copy_(self.state[name])

        return Weights(Weights.of(self.state).facts, get)


def test_no_more_than_one_file_is_in_memory(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.full((10, 25), float(i)) for i in range(9)} | {"large": torch.zeros(1000)}
    counted = Counted(state)
    write_part(tmp_path, "model", counted.weights(), Writers(shard_bytes=3000))
    assert counted.most == 4000, "the tensor that alone is larger than a shard"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert [len(names) for _, names in plan(Weights.of(state).facts, "model", 3000)] == [3, 3, 3, 1]
    found: dict[str, Tensor] = {}
    for file in files_of(tmp_path, "model"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def model_of(lora: cfg.LoraConfig | None = None, pretrained: str | None = None) -> tuple[SpeechLLM, Any]:
    torch.manual_seed(0)
    llm, tokenizer = build_llm(
        cfg.LLMConfig(arch={} if pretrained else LLM, pretrained=pretrained, lora=lora), LABELS, SDPA
    )
    return SpeechLLM(tiny_exports.speech(), llm).eval(), tokenizer


def card_of(model: SpeechLLM, tokenizer: Any, llm: str | None = None) -> dict[str, Any]:
    card = {"stage": 2, "labels": LABELS, "languages": ["de"], "corpora": ["made-up"], "clips": 4, "max_seconds": 20.0}
    return {
        **card,
        **exported.speech_llm_card(model, llm),
        "prompt": asdict(chat.render(tokenizer, "instruction_first")),
    }


@torch.no_grad()
def test_an_export_in_many_files_is_the_same_model(tmp_path: Path) -> None:
    model, tokenizer = model_of()
    card = card_of(model, tokenizer)
    counted = Counted({name: tensor for name, tensor in model.state_dict().items() if "encoder.encoder" not in name})
    publish.write(tmp_path / "many", model, counted.weights(), card, tokenizer, writers=Writers(shard_bytes=20_000))
    publish.write(tmp_path / "one", model, model.state_dict(), card, tokenizer)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert counted.most <= max(20_000, largest)
    assert json.loads((tmp_path / "many/card.json").read_text())["format"] == 3
    assert json.loads((tmp_path / "one/card.json").read_text())["format"] == 2, "older versions can read it"
    for export in ("many", "one"):
        again, _ = exported.load_speech_llm(tmp_path / export, SDPA)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / export / "llm")
        ids = torch.tensor([[1, 5, 7]])
        assert torch.equal(plain(ids).logits, model.llm(ids).logits), "an ordinary Hugging Face folder"


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    """`mser export` gives a state dict, which has them twice; SmolLM2, small Llamas and Gemmas tie theirs."""
    torch.manual_seed(0)
    llm, tokenizer = build_llm(cfg.LLMConfig(arch={**LLM, "tie_word_embeddings": True}), LABELS, SDPA)
    model = SpeechLLM(tiny_exports.speech(), llm).eval()
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    publish.write(tmp_path / "export", model, model.state_dict(), card_of(model, tokenizer), tokenizer)
    with safe_open(tmp_path / "export/llm/model.safetensors", "pt") as opened:
        names = set(opened.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    again, _ = exported.load_speech_llm(tmp_path / "export", SDPA)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    assert torch.equal(again.llm.lm_head.weight, model.llm.lm_head.weight)


@torch.no_grad()
def test_experts_are_written_as_checkpoints_have_them(tmp_path: Path) -> None:
    """transformers keeps all experts of a layer in one tensor, and has each by itself in a checkpoint."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    _, tokenizer = model_of()
    shape = {**LLM, "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": len(tokenizer)}
    model = SpeechLLM(tiny_exports.speech(), MixtralForCausalLM(MixtralConfig(**shape))).eval()
    model.llm.save_pretrained(tmp_path / "theirs")
    counted = Counted({name: tensor for name, tensor in model.state_dict().items() if "encoder.encoder" not in name})
    card = card_of(model, tokenizer)
    publish.write(tmp_path / "ours", model, counted.weights(), card, tokenizer, writers=Writers(shard_bytes=30_000))
    found, expected = (
        {name: tensor for file in files_of(tmp_path / folder, "model") for name, tensor in load_file(file).items()}
        for folder in ("ours/llm", "theirs")
    )
    assert found.keys() == expected.keys() and any("experts.3.w1" in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert counted.most <= max(tensor.nbytes for tensor in model.state_dict().values()), "one tensor is converted"
    again, _ = exported.load_speech_llm(tmp_path / "ours", SDPA)
    ids = torch.tensor([[1, 5, 7]])
    torch.testing.assert_close(again.llm(ids).logits, model.llm(ids).logits)


def test_an_adapter_is_pefts_own(tmp_path: Path) -> None:
    from peft import PeftModel

    base, tokenizer = model_of()
    publish.write(tmp_path / "base", base, base.state_dict(), card_of(base, tokenizer), tokenizer)
    folder = str(tmp_path / "base/llm")
    model, _ = model_of(cfg.LoraConfig(rank=2), folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    publish.write(tmp_path / "lora", model, model.state_dict(), card_of(model, tokenizer, folder), tokenizer)
    with torch.no_grad():
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "lora/llm"))
        ids = torch.tensor([[1, 5, 7]])
        torch.testing.assert_close(again(ids).logits, model.llm(ids).logits)
        assert not torch.allclose(again(ids).logits, base.llm(ids).logits)
    assert mser_dist.load_model(tmp_path / "lora").stage == 2


def copied(model: torch.nn.Module) -> set[str]:
    """The parameters that do not lie in a mapped file of weights."""
    files = [line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if "safetensors" in line]
    spans = [[int(end, 16) for end in line.split(maxsplit=1)[0].split("-")] for line in files]
    return {
        name
        for name, parameter in model.named_parameters()
        if not any(begin <= parameter.data_ptr() < end for begin, end in spans)
    }


@pytest.mark.parametrize("normalize", ["none", "overall"])  # the encoder a part of the model, and frozen beside it
@pytest.mark.parametrize("stage", [tiny_exports.stage1, tiny_exports.stage2])
def test_a_check_takes_no_copy_of_the_weights(stage: Any, normalize: str, tmp_path: Path) -> None:
    export = stage(tmp_path, normalize) / "export"
    plain, mapped = (Model(export, "cpu", "float32", mapped=mapped) for mapped in (False, True))
    assert not copied(mapped.network) and not copied(mapped.speech.any_encoder)
    assert copied(plain.speech.any_encoder) == {name for name, _ in plain.speech.any_encoder.named_parameters()}
    wave = tiny_exports.wave(0.7)
    one, two = (model.embed(wave, sampling_rate=16_000) for model in (plain, mapped))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_nor_of_an_adapters_base_in_another_dtype(tmp_path: Path) -> None:
    """A base in bfloat16, as most are published, whose adapters were trained in float32."""
    base, tokenizer = model_of()
    base.llm.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "base")
    model, _ = model_of(cfg.LoraConfig(rank=2), folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    export = tmp_path / "export"
    publish.write(export, model, model.state_dict(), card_of(model, tokenizer, folder), tokenizer)
    plain, mapped = (Model(export, "cpu", "float32", mapped=mapped) for mapped in (False, True))
    assert {name for name in copied(mapped.network) if "lora" not in name} == set()
    found = rescore.heard_by(mapped.network, mapped.scorer(LABELS), "cpu")
    expected = rescore.heard_by(plain.network, plain.scorer(LABELS), "cpu")
    assert torch.equal(found.scores, expected.scores)
    rescore.check(export, expected, torch.float32)


def test_an_export_that_answers_otherwise_is_not_published(tmp_path: Path) -> None:
    model, tokenizer = model_of()
    found = mser_dist.load_model(tiny_exports.stage2(tmp_path / "there"))
    expected = rescore.heard_by(found.network, found.scorer(LABELS), "cpu")
    assert expected.scores.shape == (2, 3) and expected.tokens.shape == (2, 16)
    rescore.check(tmp_path / "there/export", expected, torch.float32)
    before = (tmp_path / "there/export/card.json").read_bytes()
    with torch.no_grad():
        model.speech.queries.neg_()
    with pytest.raises(UserError, match=r"export: the exported model answers otherwise .* it is not published"):
        publish.write(
            tmp_path / "there/export",
            model,
            model.state_dict(),
            card_of(model, tokenizer),
            tokenizer,
            check=lambda export: rescore.check(export, expected, torch.float32),
        )
    assert (tmp_path / "there/export/card.json").read_bytes() == before, "what was there is as it was"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["export"]


def test_the_model_card_is_one_that_a_hub_reads(tmp_path: Path) -> None:
    model, tokenizer = model_of()
    (tmp_path / "run").mkdir()
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/config.yaml").write_text(f"stage2: {tmp_path / 'run'}\n")
    row = {"model": "stage2", "stage": 2, "corpus": "made-up", "language": "pl", "seen_language": False}
    row |= {"n": 7, "ua": 0.5, "wa": 0.4}
    (tmp_path / "eval/report.json").write_text(json.dumps({"zero_shot": [row, {**row, "stage": 1}]}))
    text = render(card_of(model, tokenizer), "emotions", {"ua": 0.61}, tmp_path / "run")
    card: Any = ModelCard(text)
    assert card.data.language == ["de"] and card.data.model_name == "emotions"
    assert {result.metric_value for result in card.data.eval_results} == {0.61, 0.5}
    assert "| stage2 | made-up | pl | no | unknown | 7 | 0.500 | 0.400 |" in text and '"questions"' in text
    assert 'mser_dist.load_model("emotions")' in text and "anger, happy, sad" in text


# ---- a hub


class Refuses(http.server.BaseHTTPRequestHandler):
    """A hub that lets nobody in; `code` is its answer."""

    code = 401

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"error": "Invalid username or password."}'
        self.send_response(self.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *words: Any) -> None:
        """Not on the terminal."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import huggingface_hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_refuses_is_a_line(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    export = tiny_exports.stage1(tmp_path / "run") / "export"
    for code, remedy in ((401, "HF_TOKEN"), (403, "HF_TOKEN"), (500, "try again later")):
        monkeypatch.setattr(Refuses, "code", code)
        with pytest.raises(UserError, match=rf"a/b at {hub}: the hub refused .*{remedy}") as raised:
            push(export, "a/b")
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(UserError, match="is no name of a model on a hub"):
        push(export, "a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        push(export, "a/b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(export, "a/b")
    (export / "heads.safetensors").write_bytes(b"damage")
    with pytest.raises(UserError, match=r"heads.safetensors differs from the sum"):
        push(export, "a/b")
