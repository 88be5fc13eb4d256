"""Files of CTranslate2's format, written here by its rules: read back equal, refused by one line, and one real one."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from mser_dist import config as cfg
from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.models import exported, pretrained, publish, sources
from mser_dist.models.attention import choose
from mser_dist.models.ctranslate2 import Checkpoint
from mser_dist.models.encoders import build_encoder
from mser_dist.models.llm import build_llm
from mser_dist.models.speech import build_speech, speech_card
from mser_dist.models.text import TextTower
from mser_dist.stream.features import Features
from mser_dist.synth.espeak import Espeak

SDPA = choose("sdpa", torch.float32, "cpu")
TYPES = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]
REAL = "pypi:whisper-base"
needs_real = pytest.mark.skipif(REAL not in sources.at_hand(), reason=f"{REAL} is not installed")

Variables = list[tuple[str, Tensor]]


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def packed(
    variables: Variables, aliases: dict[str, str], version: int = 6, model: str = "WhisperSpec", revision: int = 3
) -> bytes:
    data = struct.pack("<I", version) + text(model) + struct.pack("<II", revision, len(variables))
    for name, tensor in variables:
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        data += text(name) + struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        data += struct.pack("<BI", TYPES.index(tensor.dtype), len(raw)) + raw
    return data + struct.pack("<I", len(aliases)) + b"".join(text(a) + text(b) for a, b in aliases.items())


def small_whisper(dtype: torch.dtype = torch.float32) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, num_mel_bins=8, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40, vocab_size=20, max_source_positions=50,
        max_target_positions=12, pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2,
        dtype="float32",
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # norms and biases begin as ones and zeros, all alike
        parameter.data = torch.randn(parameter.shape).to(dtype).float()
    return model


def converted(model: WhisperForConditionalGeneration, dtype: torch.dtype = torch.float32) -> tuple[Variables, Any]:
    """What CTranslate2's converter writes for a Whisper: its TransformersConverter and WhisperLoader."""
    found: dict[str, Tensor] = {}

    def linear(scope: str, *modules: Any) -> None:
        zeros = torch.zeros(len(modules[0].weight))
        found[f"{scope}/weight"] = torch.cat([m.weight for m in modules])
        found[f"{scope}/bias"] = torch.cat([zeros if m.bias is None else m.bias for m in modules])

    def norm(scope: str, module: Any) -> None:
        found[f"{scope}/layer_norm/gamma"], found[f"{scope}/layer_norm/beta"] = module.weight, module.bias

    for side, part in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        norm(side, part.layer_norm)
        found[f"{side}/position_encodings/encodings"] = part.embed_positions.weight
        for number, layer in enumerate(part.layers):
            scope = f"{side}/layer_{number}"
            norm(f"{scope}/self_attention", layer.self_attn_layer_norm)
            own = layer.self_attn
            linear(f"{scope}/self_attention/linear_0", own.q_proj, own.k_proj, own.v_proj)
            linear(f"{scope}/self_attention/linear_1", own.out_proj)
            if side == "decoder":
                norm(f"{scope}/attention", layer.encoder_attn_layer_norm)
                cross = layer.encoder_attn
                linear(f"{scope}/attention/linear_0", cross.q_proj)
                linear(f"{scope}/attention/linear_1", cross.k_proj, cross.v_proj)
                linear(f"{scope}/attention/linear_2", cross.out_proj)
            norm(f"{scope}/ffn", layer.final_layer_norm)
            linear(f"{scope}/ffn/linear_0", layer.fc1)
            linear(f"{scope}/ffn/linear_1", layer.fc2)
    linear("encoder/conv1", model.model.encoder.conv1)
    linear("encoder/conv2", model.model.encoder.conv2)
    found["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight
    settings = {f"{side}/num_heads": torch.tensor(n, dtype=torch.int16) for side, n in (("encoder", 2), ("decoder", 4))}
    tensors = {name: tensor.detach().to(dtype) for name, tensor in found.items()} | settings
    tensors["decoder/activation"] = torch.tensor(3, dtype=torch.int8)
    return sorted(tensors.items()), {"decoder/projection/weight": "decoder/embeddings/weight"}


def laid(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"lang_ids": [4, 3], "suppress_ids": []}))
    return folder


def load_encoder(folder: Path) -> Any:
    return build_encoder(cfg.EncoderConfig(pretrained=str(folder)), SDPA)


def load_whole(name: str) -> Any:
    source = sources.resolve(name)
    config = pretrained.read_config("encoder", name, source)
    return pretrained.load(WhisperForConditionalGeneration, "encoder", name, source, config=config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_whisper_is_read_back_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_whisper(dtype)
    folder = laid(tmp_path / "model", packed(*converted(model, dtype)))
    back = load_whole(str(folder))
    wanted = model.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted[name]), name
    differs = {k for k, v in model.config.to_dict().items() if back.config.to_dict()[k] != v}
    assert differs <= {"architectures", "_name_or_path"}, differs
    assert back.config.name_or_path == str(folder)
    mel, words = torch.randn(1, 8, 100), torch.tensor([[2, 3, 5]])
    assert torch.equal(back(mel, decoder_input_ids=words).logits, model(mel, decoder_input_ids=words).logits)


def test_equal_tensors_that_stand_for_each_other(tmp_path: Path) -> None:
    model = small_whisper()
    layers = model.model.encoder.layers
    layers[1].fc1.bias.data = layers[0].fc1.bias.data.clone()
    variables, aliases = converted(model)
    later, first = (f"encoder/layer_{n}/ffn/linear_0/bias" for n in (1, 0))
    kept = [(name, tensor) for name, tensor in variables if name != later]
    encoder = load_encoder(laid(tmp_path / "model", packed(kept, {**aliases, later: first})))
    found = [layer.fc1.bias for layer in encoder.whisper.layers]
    assert torch.equal(found[0], found[1]) and found[0].data_ptr() != found[1].data_ptr()
    for wrong, says in (
        ({later: "nobody"}, f"{later} stands for nobody, which is not there"),
        ({later: first, first: later}, f"{first} is there twice"),
    ):
        with pytest.raises(UserError, match=says):
            load_encoder(laid(tmp_path / "model", packed(kept, {**aliases, **wrong})))


def test_tensors_that_are_not_all_there_are_named(tmp_path: Path) -> None:
    variables, aliases = converted(small_whisper())
    fc1 = "encoder/layer_1/ffn/linear_0/weight"

    def change(name: str, tensor: Tensor | None) -> Variables:
        kept = [(n, t) for n, t in variables if n != name]
        return kept if tensor is None else [*kept, (name, tensor)]

    for says, changed in {
        r"1 tensor is missing \(encoder\.layers\.1\.fc1\.weight\)": change(fc1, None),
        r"shape \(.*fc1\.weight is \[3, 3\] and not \[48, 32\]": change(fc1, torch.zeros(3, 3)),
        r"no place \(encoder/extra/weight\)": change("encoder/extra/weight", torch.zeros(2)),
        r"no place \(encoder/conv1/gamma\)": change("encoder/conv1/gamma", torch.zeros(32, 8, 3)),
        r"no place \(.*layers\.01\.fc2\.bias\)": change("encoder/layer_01/ffn/linear_1/bias", torch.zeros(32)),
        r"have another shape": change("encoder/layer_0/self_attention/linear_0/weight", torch.zeros(97, 32)),
        r"no place \(.*k_proj\.bias": change("encoder/layer_0/self_attention/linear_0/bias", torch.ones(96)),
        r"is damaged \(encoder/conv1/weight is missing\)": change("encoder/conv1/weight", None),
        r"damaged \(encoder/conv1/weight has the shape \[4\]\)": change("encoder/conv1/weight", torch.zeros(4)),
    }.items():
        with pytest.raises(UserError, match=says) as caught:
            load_encoder(laid(tmp_path / "model", packed(changed, aliases)))
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_such_file_is_one_line(tmp_path: Path) -> None:
    variables, aliases = converted(small_whisper())
    whole = packed(variables, aliases)
    quantized = [(n, t.to(torch.int8) if n.endswith("linear_0/weight") else t) for n, t in variables]
    doubled = packed([*variables, variables[-1]], aliases)
    cases: list[tuple[bytes, str]] = [
        (b"", r"model\.bin is damaged"),
        (whole + b"\0", "damaged .1 bytes follow its end"),
        (doubled, r"damaged \(encoder/position_encodings/encodings is there twice"),
        (packed(variables, aliases, version=5), r"format 6 \(it begins with 5\)"),
        (packed(variables, aliases, version=7), r"format 6 \(it begins with 7\)"),
        (b"<html>not found</html>" * 20, "is no file of CTranslate2's format 6"),
        (packed(variables, aliases, model="Wav2Vec2Spec"), "a model 'Wav2Vec2Spec' of revision 3, not WhisperSpec"),
        (packed(variables, aliases, revision=2), "of revision 2, not WhisperSpec of revision 3"),
        (packed(quantized, aliases), r"linear_0/weight is int8, and quantized weights are not read: take a conversion"),
        (whole.replace(b"conv1/bias\0", b"conv1/bias!"), "there should be a name"),
        (whole.replace(text("encoder/conv1/bias") + b"\x01", text("encoder/conv1/bias") + b"\x00"), "damaged"),
    ]
    cuts = [2, 4, 5, 10, 20, 24, 30, len(whole) // 3, len(whole) // 2, len(whole) - 70, len(whole) - 1]
    cases += [(whole[:cut], r"damaged \(it ends after \d+ bytes") for cut in cuts]
    for data, says in cases:
        with pytest.raises(UserError, match=says) as caught:
            load_encoder(laid(tmp_path / "model", data))
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value), says
    folder = laid(tmp_path / "model", whole)
    for settings in ("{", '{"lang_ids": "all"}', "[]", None):
        (folder / "config.json").unlink()
        if settings is not None:
            (folder / "config.json").write_text(settings)
        with pytest.raises(UserError, match=r"cannot load.*config\.json") as caught:
            load_encoder(folder)
        assert "\n" not in str(caught.value)
        laid(folder, whole)


def test_a_random_byte_never_ends_in_a_traceback(tmp_path: Path) -> None:
    whole = packed(*converted(small_whisper()))
    draw = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        at = int(draw.integers(0, 400)) if draw.random() < 0.5 else int(draw.integers(0, len(data)))
        data[at] = int(draw.integers(0, 256))
        file = laid(tmp_path / "model", bytes(data)) / "model.bin"
        try:
            checkpoint = Checkpoint([file])
            checkpoint.config(file.with_name("config.json"))
            checkpoint.state_dict()
        except UserError as error:
            assert "\n" not in str(error)


def test_other_sections_say_what_fits_them(tmp_path: Path) -> None:
    name = str(laid(tmp_path / "model", packed(*converted(small_whisper()))))
    with pytest.raises(UserError, match=r"llm\.pretrained=.* whisper, an encoder-decoder"):
        build_llm(cfg.LLMConfig(pretrained=name), ["a"], SDPA)
    with pytest.raises(UserError, match="type whisper: name an encoder of text alone"):
        TextTower(name, "cpu")


def exports_without_its_source(pretrained_name: str, export: Path, remove: Callable[[], None]) -> None:
    torch.manual_seed(0)
    encoder = cfg.EncoderConfig(pretrained=pretrained_name, freeze=True)
    model = build_speech(encoder, cfg.QFormerConfig(queries=2, layers=1, width=32, heads=2), SDPA).eval()
    holder = torch.nn.ModuleDict({"speech": model})
    publish.write(
        export, holder, dict(holder.state_dict()), {"stage": 1, "labels": ["a"], "speech": speech_card(model)}
    )
    remove()
    back = exported.load_speech(export, SDPA).eval()
    mel = torch.randn(2, model.any_encoder.features.n_mels or 0, 60)
    lengths = torch.tensor([60, 41])
    back.freeze_encoder()
    tokens = []
    for one in (back, model):
        given = one.prepared({"speech": mel, "lengths": lengths}, "cpu")
        with torch.no_grad():
            tokens.append(one(given["speech"], given["lengths"]))
    assert torch.equal(*tokens)


def test_an_export_needs_the_folder_no_more(tmp_path: Path) -> None:
    folder = laid(tmp_path / "model", packed(*converted(small_whisper(torch.float16), torch.float16)))
    exports_without_its_source(str(folder), tmp_path / "export", lambda: shutil.rmtree(folder))


@needs_real
def test_an_export_needs_the_package_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports_without_its_source(REAL, tmp_path / "export", lambda: monkeypatch.setattr(sources, "_CARRIED", {}))


@needs_real
def test_the_real_one_writes_down_what_is_said() -> None:
    source = sources.resolve(REAL)
    file = Path(source.path) / "tokenizer.json"
    known = "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == known
    tokenizer = Tokenizer.from_file(str(file))
    model = load_whole(REAL)
    sizes = (model.config.d_model, model.config.encoder_layers, model.config.encoder_attention_heads)
    assert sizes == (512, 6, 8) and model.num_parameters() == 72_593_920
    # Every tensor once: what the file holds is what the model has, the bias of the keys apart.
    assert Checkpoint(source.ctranslate2).state_dict().keys() == model.state_dict().keys()

    said = "the quick brown fox jumps over the lazy dog and then it runs into the forest"
    samples, rate = Espeak().synthesize(said, "en", rate=150)
    wave = soxr.resample(samples.astype(np.float32) / 32768, rate, SAMPLE_RATE)
    mel = torch.from_numpy(Features(model.config.num_mel_bins, pad_seconds=30)(wave))[None]
    start = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    tokens = [tokenizer.token_to_id(token) or 0 for token in start]
    assert tokens[0] == model.config.decoder_start_token_id
    with torch.no_grad():
        heard = model.model.encoder(mel)
        new, cache = tokens, None
        while tokens[-1] != model.config.eos_token_id and len(tokens) < 40:
            out = model(encoder_outputs=heard, decoder_input_ids=torch.tensor([new]), past_key_values=cache)
            cache, new = out.past_key_values, [int(out.logits[0, -1].argmax())]
            tokens = tokens + new
    words = set(tokenizer.decode(tokens).lower().replace(",", " ").replace(".", " ").split())
    wanted = set(said.split())
    assert len(words & wanted) >= 0.7 * len(wanted), words
