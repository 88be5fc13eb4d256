"""Pretrained weights, all of them: what is missing, unexpected or of another shape is an error that names the tensors.

transformers fills such places with random weights and prints a report; a number would then be wrong in silence.
"""

import fnmatch
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from mser_dist.errors import UserError
from mser_dist.files import LFS_POINTER
from mser_dist.models import ctranslate2, partitioned, sources
from mser_dist.ranks import distributed


def read_config(key: str, name: str, source: sources.Source) -> PreTrainedConfig:
    """The transformers config of a pretrained model. Raises `UserError` that names the config's `key`."""
    with explained(name, source.path):
        if source.gguf_file:
            return AutoConfig.from_pretrained(source.path, gguf_file=source.gguf_file)
        if source.ctranslate2:
            return ctranslate2.Checkpoint(source.ctranslate2).config(Path(source.path) / "config.json")
        return AutoConfig.from_pretrained(source.path)


def load(
    model_class: Any,
    key: str,
    name: str,
    source: sources.Source,
    *,
    allow_missing: Sequence[str] = (),
    unused: Sequence[str] = (),
    zero3: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """`model_class.from_pretrained` with every weight in its place, in fp32 if `options` name no dtype.

    Args:
        key: the section of the config that asks, e.g. "llm", for errors.
        name: what its `pretrained` says.
        allow_missing: patterns (`*` for anything) of tensors that are meant to be new; those that are, are printed.
        unused: patterns of tensors that nothing is computed with, such as a decoder: they may be there or not.
        zero3: the resolved DeepSpeed config of a ZeRO-3 run: each rank reads its part of the weights, where
            `partitioned.load` can; else transformers partitions each tensor as it loads.
        options: of `from_pretrained`.

    Raises `UserError` for tensors that are missing (tied ones are not), unexpected, of another shape or damaged. A
    checkpoint of a class with more parts than this one, e.g. with a head, may hold the weights of these.
    """
    options = {"dtype": torch.float32, "gguf_file": source.gguf_file, **options}
    # ZeRO-3's own loading tells neither of shapes nor of tensors without a place: a load without memory does.
    place = {"device_map": "meta"} if zero3 else {}
    path: str | None = source.path
    with explained(name, source.path), _quiet():
        if source.ctranslate2:
            path, options["state_dict"] = None, ctranslate2.Checkpoint(source.ctranslate2).state_dict()
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options, **place
        )
    new = sorted(name for name in info["missing_keys"] if not _matches(name, unused))
    shaped = {
        name: f"{name} is {list(there)} and not {list(here)}"
        for name, there, here in info["mismatched_keys"]
        if not _matches(name, unused)
    }
    meant = {name for name in [*new, *shaped] if _matches(name, allow_missing)}
    complaints = {
        "are missing": [n for n in new if n not in meant],
        "have another shape": [text for n, text in sorted(shaped.items()) if n not in meant],
        "have no place": sorted(n for n in _without_place(model.config, info) if not _matches(n, unused)),
        "cannot be converted": sorted(map(str, info.get("error_msgs") or [])),
    }
    if any(complaints.values()):
        remedy = ""
        if key != "text" and (complaints["are missing"] or complaints["have another shape"]):
            remedy = f", or name those that are meant to be new in {key}.allow_missing"
        raise UserError(
            f"{key}.pretrained={name}: {tell(complaints)}: the copy is cut, renamed or of another model: copy it again"
            f"{remedy}"
        )
    if meant and distributed.discover().is_main:
        print(f"{key}.pretrained={name}: new, as {key}.allow_missing says: {', '.join(sorted(meant))}", file=sys.stderr)
    if zero3:
        with explained(name, source.path), _quiet():
            attention = {key: options[key] for key in ("attn_implementation",) if key in options}
            folder = sources.folder_of(source)
            parts = None if meant else partitioned.load(model_class, model, folder, zero3, **attention)
            if parts is None:
                partition = HfDeepSpeedConfig(zero3)  # transformers looks for a living one
                parts = model_class.from_pretrained(path, ignore_mismatched_sizes=True, **options)
                del partition
        model = parts
    if path is None:
        model.config.name_or_path = name  # transformers has put down "None"
    return model


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def tell(complaints: dict[str, list[str]]) -> str:
    """Which tensors are wrong in which way ("are missing"): the first three of each."""
    parts = []
    for what, names in complaints.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            one = what.replace("are ", "is ").replace("have ", "has ")
            count = f"{len(names)} tensors {what}" if len(names) > 1 else f"1 tensor {one}"
            parts.append(f"{count} ({', '.join(names[:3])}{more})")
    return ", ".join(parts)


def check_tensors(there: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise `UserError` unless a file holds just the tensors that a model wants, each of its shape."""
    complaints = {
        "are missing": sorted(wanted.keys() - there.keys()),
        "have no place": sorted(there.keys() - wanted.keys()),
        "have another shape": [
            f"{name} is {list(there[name].shape)} and not {list(tensor.shape)}"
            for name, tensor in sorted(wanted.items())
            if name in there and there[name].shape != tensor.shape
        ],
    }
    if any(complaints.values()):
        raise UserError(f"{where}: {tell(complaints)}: it is of another model, or damaged: export or copy it again")


def _without_place(config: PreTrainedConfig, info: dict[str, Any]) -> set[str]:
    """The tensors that neither the model nor the class that it was saved from has: that may have heads besides."""
    unexpected = set(info["unexpected_keys"])
    for name in (config.architectures or []) if unexpected else []:
        declared = getattr(transformers, name, None)
        if declared is not None:
            with suppress(Exception), torch.device("meta"):  # a class that cannot be built explains nothing
                unexpected -= set(declared(config).state_dict())
    return unexpected


@contextmanager
def explained(name: str, path: str) -> Iterator[None]:
    """Turns whatever a library raises while it loads from `path` into a `UserError` of one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and the hub have one each for a bad file
        for file in sorted(Path(path).glob("*.safetensors")):
            with suppress(OSError):
                problem = damage(file)
                if problem:
                    raise UserError(f"{file} is damaged ({problem}): copy it again") from error
        raise sources.explain(name, error) from error


def damage(file: Path) -> str:
    """What is wrong with a safetensors file as a whole, empty where nothing is; its tensors are not read."""
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            return "it is a Git LFS pointer, not the file: run git lfs pull where it came from"
    try:
        with safe_open(file, "pt"):
            return ""
    except SafetensorError as error:
        return str(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what is missing, for ours is an error, and without a bar in a log file."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
