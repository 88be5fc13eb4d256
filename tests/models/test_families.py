"""Every decoder-only family that transformers builds from a small config: right, or refused by one line.

About a minute: each is held against its own plain forward by the check that runs before a training.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools/check_families.py"
# Those that people would look for: their absence from the walk would hide a change of transformers.
KNOWN = {
    "bloom", "cohere", "cohere2", "deepseek_v3", "exaone4", "falcon", "falcon_mamba", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss",
    "gptj", "granite", "granitemoe", "jamba", "lfm2", "llama", "mamba", "mamba2", "mistral", "mixtral",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "smollm3", "stablelm", "starcoder2", "xglm",
}  # fmt: skip


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_families", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_families"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(tool: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tool.walk(tool.families())
    return rows


def test_what_is_not_refused_is_right(rows: list[dict[str, Any]]) -> None:
    found = {row["name"]: row for row in rows}
    assert {name for name in KNOWN if name not in found or found[name]["refused"]} == set()
    right = [row for row in rows if row["refused"] is None]
    assert max(row["max_abs_diff"] for row in right) <= 1e-4
    for row in rows:
        assert (row["refused"] is None) != (row["max_abs_diff"] is None)
        assert row["refused"] is None or ("\n" not in row["refused"] and len(row["refused"]) < 400)


def test_the_manual_lists_them(tool: Any, rows: list[dict[str, Any]]) -> None:
    _, listed, _ = tool.in_manual(tool.MANUAL.read_text(encoding="utf-8"))
    assert listed == tool.lists(rows), "update it by: python tools/check_families.py --write"
