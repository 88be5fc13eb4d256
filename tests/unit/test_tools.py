"""The measuring scripts run and write what they say; what they measure is not asserted here."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bench_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "row.json"
    words = ["bench_encoder.py", "--seconds", "1", "--rounds", "1", "--batch", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    script("bench_encoder").main()
    row = json.loads(out.read_text())["encoder"]
    assert row["ratio"] == pytest.approx(row["padded_s"] / row["ours_s"]) and row["ours_s"] > 0
    assert f"ratio {row['ratio']:.1f}" in capsys.readouterr().out
