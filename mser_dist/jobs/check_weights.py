"""Whether pretrained weights will be there when a job starts: in a package, a folder, or the hub's cache."""

import json
import os
from contextlib import suppress
from math import prod
from pathlib import Path

from mser_dist.errors import UserError
from mser_dist.jobs.doctor_checks import Finding, first_cause
from mser_dist.models import bases, sources

_FETCH = "fetch it where there is a way out, into the HF_HOME that the nodes share: hf download"


def at_hand(name: str) -> Finding:
    """Whether what a config names as `pretrained` can be loaded without a network, or at least fetched."""
    source = sources.resolve(name)  # a package's sum is checked
    if name.startswith("pypi:"):
        return "ok", f"{name}: in an installed package", ""
    folder = cached(source.path)
    if folder is not None and not (lacks := _lacking(folder)):
        where = "in a folder" if Path(source.path).is_dir() else f"in the cache {folder}"
        return "ok", f"{name}: {where}, {_bytes(folder) / 2**30:.1f} GiB of weights", ""
    if Path(source.path).is_dir():
        return "fail", f"{name} lacks {lacks}", "copy the whole folder again"
    return _on_the_hub(name)


def cached(path: str) -> Path | None:
    """The folder of a model: its own, or that of a hub id in the cache; None where it was never fetched."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def parameters(name: str) -> int | None:
    """How many weights a `pretrained` has, by the heads of its safetensors; None where they are of another format."""
    with suppress(UserError, OSError, ValueError, KeyError):
        source = sources.resolve(name)
        folder = cached(source.path)
        if folder is not None and not source.gguf_file and not source.ctranslate2:
            files = sorted(folder.glob("*.safetensors"))
            return sum(map(_elements, files)) if files else None
    return None


def _elements(file: Path) -> int:
    """Of a safetensors file: eight bytes say how long the JSON is that follows, with each tensor's shape."""
    with file.open("rb") as head:
        shapes = json.loads(head.read(int.from_bytes(head.read(8), "little")))
    return sum(prod(tensor["shape"]) for key, tensor in shapes.items() if key != "__metadata__")


def _lacking(folder: Path) -> str:
    """What a model's folder has not; '' where it is whole."""
    source = sources.resolve(str(folder))
    if not source.ctranslate2 and not (folder / "config.json").is_file():
        return "config.json"
    for index in folder.glob("*.safetensors.index.json"):
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(name for name in wanted if not (folder / name).is_file()):
            return f"{missing[0]} of {len(wanted)} files of weights"
    return "" if bases.files_of(source) else "weights"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in bases.files_of(sources.resolve(str(folder))))


def _on_the_hub(name: str) -> Finding:
    """A model that is not, or not wholly, in the cache: whether the hub gives it to this user."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    if constants.HF_HUB_OFFLINE:
        return "fail", f"{name} is not wholly in {home}, and HF_HUB_OFFLINE is set", f"{_FETCH} {name}"
    try:
        HfApi().auth_check(name)
    except GatedRepoError:
        return "fail", f"{name}: the hub has not given you access", "ask for it on the model's page, and set HF_TOKEN"
    except RepositoryNotFoundError:
        return (
            "fail",
            f"{name}: neither a folder nor a model of the hub",
            "check the name; a private one wants HF_TOKEN",
        )
    except Exception as error:  # whatever the client or the network raises
        return "fail", f"{name} is not in {home}, and the hub does not answer: {first_cause(error)}", f"{_FETCH} {name}"
    return (
        "warn",
        f"{name} is not in {home} yet: the job fetches it, where its nodes have a way out",
        f"{_FETCH} {name}",
    )
