"""Whisper weights in CTranslate2's binary format, as faster-whisper's folders hold them, under transformers' names.

The file (python/ctranslate2/specs/model_spec.py of CTranslate2, `_serialize`), all little-endian, strings with their
length and a zero at the end::

    version, name and revision of the model, number of variables
    variable: name, number of dimensions, dimensions, type, bytes, data
    number of aliases
    alias: name, name of the variable that it stands for
"""

import json
import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import WhisperConfig

from mser_dist.errors import UserError

_VERSION = 6  # of the format: CURRENT_BINARY_VERSION
_MODEL = ("WhisperSpec", 3)  # and its revision, which rises whenever the variables of a model change
_TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)

# CTranslate2's scopes in a layer, and outside of them: transformers' modules, of which several lie in one matrix.
_LAYER = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_OUTSIDE = {
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "layer_norm": ("layer_norm",),
}
_LEAVES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


@dataclass(frozen=True)
class Variable:
    """What the file says of a variable, and where in it the data begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """A file of the format; its tensors are read when they are asked for.

    Args:
        files: the file, or its pieces in their order.

    Raises `UserError` for a file that is cut or damaged, of another version or model, or with quantized weights.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.where = str(files[0])
        self.variables: dict[str, Variable] = {}
        try:
            self._data = _whole(files)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise self._damaged(str(error)) from error
        self._at = 0
        self._read()

    def _read(self) -> None:
        version = self._number("I")
        if version != _VERSION:
            raise UserError(
                f"{self.where} is no file of CTranslate2's format {_VERSION} (it begins with {version}): "
                "convert the model with a current CTranslate2, or name the model it was converted from"
            )
        name, revision = self._string(), self._number("I")
        if (name, revision) != _MODEL:
            raise UserError(
                f"{self.where} holds a model {name[:40]!r} of revision {revision}, not {_MODEL[0]} of revision "
                f"{_MODEL[1]}: name a Whisper that a current CTranslate2 has converted"
            )
        for _ in range(self._number("I")):
            name = self._string()
            self._note(name, self._variable(name))
        for _ in range(self._number("I")):
            alias, name = self._string(), self._string()
            if name not in self.variables:
                raise self._damaged(f"{alias} stands for {name}, which is not there")
            self._note(alias, self.variables[name])
        if self._at != len(self._data):
            raise self._damaged(f"{len(self._data) - self._at} bytes follow its end")

    def _variable(self, name: str) -> Variable:
        shape = tuple(self._number("I") for _ in range(self._number("B")))
        kind, size = self._number("B"), self._number("I")
        if kind >= len(_TYPES) or math.prod(shape) * _TYPES[kind].itemsize != size or not size:
            raise self._damaged(f"{name} of shape {list(shape)} and type {kind} has {size} bytes")
        if shape and not _TYPES[kind].is_floating_point:
            raise UserError(
                f"{self.where}: {name} is {str(_TYPES[kind]).removeprefix('torch.')}, and quantized weights are not "
                "read: take a conversion in float16 (ct2-transformers-converter --quantization float16)"
            )
        return Variable(_TYPES[kind], shape, self._skip(size))

    def _note(self, name: str, variable: Variable) -> None:
        if name in self.variables:
            raise self._damaged(f"{name} is there twice")
        self.variables[name] = variable

    def _skip(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        begin, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise self._damaged(f"it ends after {len(self._data)} bytes, before its last tensor or name does")
        return begin

    def _number(self, kind: str) -> int:
        return int(struct.unpack_from(f"<{kind}", self._data, self._skip(struct.calcsize(f"<{kind}")))[0])

    def _string(self) -> str:
        size = self._number("H")
        begin = self._skip(size)
        text = bytes(self._data[begin : begin + size])
        try:
            if text[-1:] != b"\0":
                raise ValueError
            return text[:-1].decode("utf-8")
        except ValueError:
            raise self._damaged(f"at byte {begin} there should be a name") from None

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.where} is damaged ({what}): copy it again")

    def tensor(self, name: str) -> Tensor:
        """A copy of a variable. The data lie at any byte, so that they are copied before they get their type."""
        found = self.variables[name]
        size = math.prod(found.shape) * found.dtype.itemsize
        data = torch.frombuffer(self._data, dtype=torch.uint8, count=size, offset=found.offset).clone()
        return data.view(found.dtype).reshape(found.shape)

    def config(self, settings: Path) -> WhisperConfig:
        """The model's config: sizes from the shapes, ids of tokens from the folder's `settings`, its config.json."""
        width, mels, _ = self._shape("encoder/conv1/weight", 3)
        vocabulary, _ = self._shape("decoder/embeddings/weight", 2)
        sizes = {}
        for side, positions in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
            sizes[positions], _ = self._shape(f"{side}/position_encodings/encodings", 2)
            sizes[f"{side}_ffn_dim"], _ = self._shape(f"{side}/layer_0/ffn/linear_0/weight", 2)
            layers = {name.split("/")[1] for name in self.variables if name.startswith(f"{side}/layer_")}
            sizes[f"{side}_layers"] = sum(re.fullmatch(r"layer_\d+", layer) is not None for layer in layers)
            heads = f"{side}/num_heads"
            # Every Whisper has heads of 64. The other settings in the file are those of every Whisper too.
            stated = heads in self.variables and not self.variables[heads].shape
            sizes[f"{side}_attention_heads"] = int(self.tensor(heads)) if stated else max(1, width // 64)
        ids = {}
        if languages := json.loads(settings.read_text(encoding="utf-8")).get("lang_ids"):
            start = min(languages) - 1  # <|endoftext|>, <|startoftranscript|> and the languages follow one another
            ids = {f"{name}_token_id": start - 1 for name in ("pad", "bos", "eos")} | {"decoder_start_token_id": start}
        return WhisperConfig(
            d_model=width,
            num_mel_bins=mels,
            vocab_size=vocabulary,
            architectures=["WhisperForConditionalGeneration"],
            **sizes,
            **ids,
        )

    def _shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        found = self.variables.get(name)
        if found is None or len(found.shape) != dimensions:
            what = "is missing" if found is None else f"has the shape {list(found.shape)}"
            raise self._damaged(f"{name} {what}")
        return found.shape

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor once, under the name that WhisperForConditionalGeneration has for it, else under its own."""
        state: dict[str, Tensor] = {}
        for variable, found in self.variables.items():
            if not found.shape:
                continue
            names = _names(variable)
            if state.keys() & set(names):
                names = [variable]
            parts = self.tensor(variable).chunk(len(names))
            state.update((name, part.clone()) for name, part in zip(names, parts, strict=False))
        # Whisper's keys have no bias; where one is not zero it stays, and has no place.
        return {name: t for name, t in state.items() if not name.endswith(".k_proj.bias") or t.any()}


def _whole(files: Sequence[Path]) -> bytearray | mmap.mmap:
    if len(files) == 1:
        with files[0].open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    joined = bytearray()
    for piece in files:
        joined += piece.read_bytes()
    return joined


def _names(variable: str) -> list[str]:
    """transformers' names for what lies in a variable; its own where there are none."""
    if variable == "decoder/projection/weight":
        return ["proj_out.weight"]
    found = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", variable)
    if found is None:
        return [variable]
    side, layer, scope, leaf = found.groups()
    modules = (_OUTSIDE if layer is None else _LAYER).get(scope)
    if modules is None or leaf not in _LEAVES:
        return [variable]
    prefix = f"model.{side}." + ("" if layer is None else f"layers.{layer}.")
    return [f"{prefix}{module}.{_LEAVES[leaf]}" for module in modules]
