"""The measuring scripts run and write what they say; what they measure is not asserted here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mser_dist.audio import encode
from mser_dist.cli import main as cli
from tests.tiny_runs import ENCODER, QFORMER
from tests.unit.made_up_set import write_set
from tools import bench_encoder, bench_export, bench_plan, bench_stage2
from tools.bench_packing import BATCHINGS, DURATIONS, RANKS

TOOLS = Path(__file__).parents[2] / "tools"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *words: object, timeout: float = 200) -> "subprocess.CompletedProcess[str]":
    """Run a tool in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    command = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def test_bench_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "row.json"
    words = ["bench_encoder.py", "--seconds", "1", "--rounds", "1", "--batch", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    script("bench_encoder").main()
    row = json.loads(out.read_text())["encoder"]
    assert row["ratio"] == pytest.approx(row["padded_s"] / row["ours_s"]) and row["ours_s"] > 0
    assert f"ratio {row['ratio']:.1f}" in capsys.readouterr().out


def test_bench_encoder_computes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    threads: set[int] = set()

    def seconds(work: object) -> float:
        threads.add(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(bench_encoder, "seconds", seconds)
    assert bench_encoder.measure(1.0, rounds=1, batch=1)["ratio"] == 1
    assert threads == {1} and torch.get_num_threads() == before


def test_bench_plan_measures_the_peak_of_the_process_alone() -> None:
    ballast = np.ones(1 << 27)  # 1 GiB here, which a process started from here has not
    result = bench_plan._measured(partial(dict, seconds=0.0))
    assert ballast[0] == 1 and 0 < result["gib"] < 1


def test_bench_stream_adds_nothing_to_the_memory_that_it_measures() -> None:
    code = "import sys, tools.bench_stream; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=TOOLS.parent, check=True, timeout=200)


def test_pad_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "row.json"
    words = ["pad_difference.py", str(write_set(tmp_path / "set")), "--clips", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    script("pad_difference").main()
    row = json.loads(out.read_text())
    assert 0 < row["own_frames"] < 1 and 0 < row["qformer_tokens"] < 1


def bench_stream(
    tool: ModuleType, words: list[str], out: Path, patch: pytest.MonkeyPatch
) -> dict[tuple[str, str], Any]:
    """The rows by (path, codec)."""
    patch.setattr(sys, "argv", ["bench_stream.py", *words, "--json", str(out)])
    tool.main()
    return {(row["path"], row["codec"]): row for row in json.loads(out.read_text())["loader"]}


def test_bench_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--peers", "webdataset+30s,plain-files"]
    rows = bench_stream(script("bench_stream"), words, tmp_path / "rows.json", monkeypatch)
    assert set(rows) == {(path, c) for path in ("ours", "webdataset+30s", "plain-files") for c in ("wav", "flac")}
    for (_, codec), row in rows.items():
        assert row["ratio"] == pytest.approx(row["cpu_s_per_1000"] / rows["ours", codec]["cpu_s_per_1000"])
        assert row["samples_per_s"] > 0 and row["max_difference"] < 1e-4
    lines = capsys.readouterr().out.splitlines()
    assert [*rows] == [tuple(line.split()[:2]) for line in lines[3 : 3 + len(rows)]]  # the table
    result = json.loads((tmp_path / "rows.json").read_text())
    packing = {(row["durations"], row["batching"], row["ranks"]): row for row in result["packing"]}
    assert len(packing) == len(DURATIONS) * len(BATCHINGS) * len(RANKS)
    for kind, batching, ranks in packing:
        row = packing[kind, batching, ranks]
        assert min(row["padded_over_real"], row["slowest_over_mean"], row["slowest_over_mean_in_all"]) >= 1
        assert 0.9 < row["largest_over_budget"] <= 1 or batching != "tokens"
    assert result["resume"]["ratio"] > 0 and result["encoder"]["ratio"] > 0
    assert result["plan"]["seconds"] > 0 and result["plan"]["gib"] > 0 and len(result["plan"]["worker_mib"]) == 2


def test_bench_stream_keeps_peers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cannot be installed, the other's log-mels are not equal to ours: rows that say so, without numbers."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = tmp_path / "speech"
    folder.mkdir()
    tone = np.sin(np.arange(32_000) * 0.1) * np.hanning(32_000) * 8000
    (folder / "a.wav").write_bytes(encode(tone.astype(np.int16), 16_000, "wav"))
    words = ["--audio", str(folder), "--clips", "3", "--rounds", "1", "--envs", str(tmp_path / "envs")]
    tool = script("bench_stream")
    monkeypatch.setattr(tool, "TOLERANCE", 0.0)
    monkeypatch.setattr(tool, "PARTS", {})
    words += ["--peers", "plain-files,lhotse-shar"]
    rows = bench_stream(tool, words, tmp_path / "rows.json", monkeypatch)
    assert "differ" in rows["plain-files", "flac"]["error"]
    assert "cannot be installed" in rows["lhotse-shar", "wav"]["error"]
    assert rows["ours", "wav"]["ratio"] == 1


def test_bench_checkpoint(tmp_path: Path) -> None:
    words = ["--width", "64", "--depth", "2", "--rounds", "1", "--folder", tmp_path, "--json", tmp_path / "rows.json"]
    done = run_tool("bench_checkpoint", *words)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["ours", "torch.save", "deepspeed"]
    assert all(row["stall_s_per_gib"] > 0 and row["durable_s_per_gib"] >= row["stall_s_per_gib"] for row in rows)


def test_bench_features(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an encoder from scratch; the first training alone in a process of its own, for each takes its seconds."""
    from tools import bench_features

    train, asked = bench_features.Bench.train, []

    def first(self: Any, shards: Path, steps: int, cache: str, features: Path) -> Any:
        asked.append((steps, cache))
        if len(asked) == 1:
            ran.append(train(self, shards, steps, "disk", features))
        features.mkdir(exist_ok=True)
        return ran[0]._replace(steps=ran[0].steps * steps)

    ran: list[Any] = []
    monkeypatch.setattr(bench_features.Bench, "train", first)
    words = ["--set", str(tiny_set), "--clips", "8", "--batch", "4", "--epochs", "3", "--rounds", "1"]
    words += ["encoder.pretrained=null", ENCODER, "encoder.layers=last", *QFORMER]
    words += ["data.workers=0", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["bench_features.py", *words])
    bench_features.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert asked == [(2, "off"), (6, "disk"), (4, "disk"), (8, "disk")]
    assert list(rows) == ["off", "cached-epoch", "whole-run", "second-start", "memory"]
    assert [rows[name]["ratio"] for name in ("off", "cached-epoch", "whole-run", "memory")] == [1, 1, 1, 1]
    assert rows["off"]["clips_per_s"] > 0 and rows["second-start"]["seconds"] > 0 and rows["memory"]["mib_4x"] > 100


def test_bench_contrastive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without open_clip, which would be installed; the first measurement in a process of its own, the others here."""
    from tools import bench_contrastive, contrastive_worker

    works = {"loss": contrastive_worker.one_of_many, "caching": contrastive_worker.caching}
    ask = bench_contrastive.Bench.ask
    asked: list[dict[str, Any]] = []

    def here(self: Any, task: dict[str, Any], **env: str) -> dict[str, Any]:
        asked.append(task)
        return ask(self, task, **env) if len(asked) == 1 else works[task["what"]](task)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bench_contrastive.Bench, "ask", here)
    monkeypatch.setattr(bench_contrastive, "OPEN_CLIP", replace(bench_contrastive.OPEN_CLIP, requires=()))
    monkeypatch.setattr(bench_contrastive, "losses", lambda quick: [("supcon", "full matrix", 64, 16, 1)])
    monkeypatch.setattr(sys, "argv", ["bench_contrastive.py", "--quick", "--json", str(tmp_path / "rows.json")])
    try:
        bench_contrastive.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads((tmp_path / "rows.json").read_text())
    [row] = result["contrastive"]
    assert row["max_abs_grad_diff"] < 1e-6 and row["ours_s"] > 0
    assert row["time_ratio"] == pytest.approx(row["ours_s"] / row["clip_s"])
    assert result["caching"]["time_ratio"] > 0 and result["memory"][0]["predicted_mib"] > 0
    assert "full matrix" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_bench_stage2(tmp_path: Path) -> None:
    out = tmp_path / "stage2.json"
    words = ["--small", "--layers", 1, "--batch", 4, "--rounds", 1, "--steps", 1, "--rows", "hf-trainer,prefix"]
    done = run_tool("bench_stage2", *words, "--json", out, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["hf-trainer", "prefix"] and rows[0]["ratio"] == 1
    assert all(row["clips_per_s"] > 0 and row["peak_mib"] > 100 for row in rows)
    assert rows[1]["ratio"] == pytest.approx(rows[1]["clips_per_s"] / rows[0]["clips_per_s"])
    task = bench_stage2.Task("tree", layers=1, batch=4, steps=1, small=True, **bench_stage2.texts(True))  # type: ignore[arg-type]
    assert len(bench_stage2.scoring(task, "tree").cpu) == len(bench_stage2.scoring(task, "whole").cpu) == 2


@pytest.mark.timeout(600)
def test_bench_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "export.json"
    words = ["--small", "--shard-mib", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_export.py", *words])
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # which the tool sets: other tests are to be without it
    bench_export.main()
    many, one = json.loads(out.read_text())["rows"]
    assert (many["name"], one["name"]) == ("files of 1 MiB", "one file")
    assert 0.5 < many["shard_mib"] <= 1.01 < one["shard_mib"] < 3
    assert all(row["peak_mib"] >= 0 and row["ratio"] == row["peak_mib"] / row["shard_mib"] for row in (many, one))
    assert f"{many['ratio']:.2f}" in capsys.readouterr().out


def test_bench_load(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    done = run_tool("bench_load", "--mib", 60, "--json", out)
    assert done.returncode == 0, done.stderr
    own, other = json.loads(out.read_text())["rows"]
    assert (own["name"], other["name"]) == ("each rank its part", "transformers")
    assert 0 < own["ratio"] < other["ratio"] and f"{own['ratio']:.2f}" in done.stdout


def test_compare_losses(
    tiny_set: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "losses"
    shutil.copytree(tiny_set, out / "shards")
    shutil.copy(prepared, out / "mlflow.db")
    small = [ENCODER, *QFORMER, "train.global_batch=12", "train.steps=2", "data.val_split=null", "data.workers=0"]
    words = ["--losses", "sum", "--seeds", "3", "--nproc", "1", "--out", out, "--json", tmp_path / "ua.json", *small]
    tool = script("compare_losses")
    start = tool.mser

    def mser(nproc: int, words: list[Any]) -> None:
        """The training in a process of its own, the evaluation here: the second import of torch would show nothing."""
        if words[0] == "train":
            start(nproc, words)
        else:
            assert cli.main([str(word) for word in words]) == 0

    monkeypatch.setattr(tool, "mser", mser)
    for _ in range(2):  # the second time it finds everything done
        monkeypatch.setattr(sys, "argv", ["compare_losses.py", *map(str, words)])
        capsys.readouterr()
        tool.main()
    said = capsys.readouterr()
    assert "sum" in said.out and "stage 1" not in said.out + said.err
    [ua] = json.loads((tmp_path / "ua.json").read_text())["unseen_ua"]["sum"]
    assert 0 <= ua <= 1
    monkeypatch.setattr(sys, "argv", ["compare_losses.py", "--losses", "clip", "--out", str(out)])
    with pytest.raises(SystemExit, match=r"^compare_losses: .*contrastive\.loss"):
        tool.main()


def test_bench_scale(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run_tool("bench_scale", "--ranks", "2,5", "--shards", 20, "--no-plan", "--json", out)
    assert done.returncode == 0 and "at 1,024 ranks" in done.stdout, done.stderr
    rows = {(row["name"], row["ranks"]): row for row in json.loads(out.read_text())["rows"]}
    assert all(set(row) >= {"name", "ranks", "value"} and row["value"] > 0 for row in rows.values())
    assert rows.keys() >= {(n, r) for n in ("resume-seconds", "boundary-ms") for r in (2, 5)} | {("index-seconds", 4)}
    for ranks in (2, 5):
        assert rows["sockets", ranks]["value"] <= 16 and rows["sockets", ranks]["server"] >= 2 * ranks
        assert rows["resume-opens", ranks]["value"] <= 8 and rows["resume-opens", ranks]["mean"] >= 3


def test_bench_scale_asks_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    from mser_dist.planning import real

    monkeypatch.setattr(real, "bytes_error", lambda: 0.0)  # tests/distributed/test_planned_traffic.py has it
    errors = {row["name"]: row["value"] for row in script("bench_scale").planner()}
    assert errors.keys() == {"plan-median-error", "plan-p90-error", "plan-bytes-error"}
    assert 0 < errors["plan-median-error"] < errors["plan-p90-error"] < 0.5


def test_rehearse_64_ranks(tiny_set: Path, tmp_path: Path) -> None:
    words = [f"data.sets=[{tiny_set}]", f"out={tmp_path / 'run'}", "data.val_split=null"]
    small = ["data.languages=[]", "train.global_batch=128"]
    done = run_tool("rehearse", "demo_stage1", *words, *small, "--ranks", 64)
    assert done.returncode == 0, done.stderr
    for said in ("64 ranks, on", "start-up", "sockets        2; 1", "MiB", "between steps", "at 4096 ranks breaks: "):
        assert said in done.stdout, done.stdout
    refused = run_tool("rehearse", "demo_stage1", *words, "train.global_batch=100", "--ranks", 64)
    assert refused.returncode == 2 and "global_batch" in refused.stderr and refused.stderr.count("\n") == 1


def test_bench_compare(tmp_path: Path) -> None:
    out = tmp_path / "row.json"
    done = run_tool("bench_compare", "--runs", 2, "--clips", 36, "--rounds", 1, "--json", out)
    assert done.returncode == 0 and "2 evaluations of 36 clips" in done.stdout, done.stderr
    [row] = json.loads(out.read_text())["rows"]
    assert row["name"] == "compare" and row["seconds"] > 0 and row["cpu_seconds"] > 0


def test_bench_bootstrap(tmp_path: Path) -> None:
    done = run_tool("bench_bootstrap", "--clips", 2000, "--rows", 2, "--speakers", 8, "--json", tmp_path / "rows.json")
    assert done.returncode == 0 and "2 rows of 2000 clips by 8 speakers" in done.stdout, done.stderr
    [row] = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["name"] == "bootstrap" and row["seconds"] > 0 and row["ratio"] > 0
    assert row["max_abs_diff"] == 0, "the same draws"


def test_bench_ledger(tmp_path: Path) -> None:
    done = run_tool("bench_ledger", "--clips", 2000, "--tested", 500, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert [*rows] == ["made", "saved", "loaded", "judged"] and rows["saved"]["bytes"] > 2000 * 8
    assert all(row["seconds"] > 0 for row in rows.values())


def test_bench_eval(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["--small", "--rows", "labels,bootstrap,compare", "--clips", 6, "--against", 5, "--batch", 4]
    done = run_tool("bench_eval", *words, "--json", out)
    assert done.returncode == 0, done.stderr
    labels, bootstrap, compare = json.loads(out.read_text())["rows"]
    assert bootstrap["name"] == "bootstrap" and bootstrap["seconds"] > 0
    assert (labels["name"], labels["labels"], labels["prompts"], labels["clips"]) == ("labels", 6, 4, 6)
    assert labels["max_abs_diff"] <= 1e-4 and labels["ratio"] > 0 and labels["seconds"] > 0
    assert compare["name"] == "compare" and compare["seconds"] > 0 and compare["ratio"] is None
    assert "choose from" in run_tool("bench_eval", "--rows", "none").stderr


DRILLS = {
    "bitwise-resume", "kill9", "two-generations", "corrupt-checkpoint", "signal-one-rank", "slurm-preempt-requeue",
    "slurm-node-death", "submitit-timeout-requeue", "peer-killed", "peer-frozen", "nonfinite-one-rank", "disk-full",
    "tracker-killed", "elastic-2-1-2", "time-limit", "broken-end", "encode-killed",
}  # fmt: skip


def test_fault_drill_knows_every_drill(tmp_path: Path) -> None:
    done = run_tool("fault_drill", "--list")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split("\t")[0] for line in done.stdout.splitlines() if "\ttests/" in line} == DRILLS
    (tmp_path / "test_none.py").touch()
    assert run_tool("fault_drill", "--list", "--only", "no-such-drill", "--tests", tmp_path).returncode == 2


def test_fault_drill_reports_what_failed_and_what_could_not_run(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "@pytest.mark.drill('good')\ndef test_good(record_property): record_property('seen', 3)\n"
        "@pytest.mark.drill('bad')\ndef test_bad(): assert 1 == 2, 'why'\n"
        "@pytest.mark.drill('absent')\ndef test_absent(): pytest.skip('no such thing here')\n"
        "def test_no_drill(): assert False\n"
    )
    out = tmp_path / "drills.json"
    done = run_tool("fault_drill", "--json", out, "--tests", tmp_path)
    assert done.returncode == 1
    drills = {drill.pop("name"): drill for drill in json.loads(out.read_text())["drills"]}
    assert drills.keys() == {"good", "bad", "absent"}
    assert [drills[name]["passed"] for name in ("good", "bad", "absent")] == [True, False, False]
    assert drills["good"]["detail"] == "seen: 3"
    assert "test_bad" in drills["bad"]["detail"] and "no such thing here" in drills["absent"]["detail"]


def test_gpu_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The tool itself, with a check that says something on a CPU too; its checks are tested in tests/gpu."""
    tool = script("gpu_check")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, words)])
        return tool.main(), capsys.readouterr().out

    code, listed = run("--list", "--device", "cpu")
    assert code == 0 and "attention sdpa" in listed and "(skipped here: of GPUs" in listed
    out = tmp_path / "gpu.json"
    code, said = run("--device", "cpu", "--only", "sdpa", "flash_attention_2", "--json", out)
    report = json.loads(out.read_text())
    first, second = report["rows"]
    assert code == 0 and (first["name"], first["status"]) == ("attention sdpa", "ok"), first
    assert first["value"]["from_float32"] < 0.1
    assert (second["name"], second["status"]) == ("attention flash_attention_2", "skipped")
    assert report["device"]["gpus"] == 0 and {"torch", "transformers", "deepspeed"} <= report["versions"].keys()
    assert "1 × cpu: 1 ok, 0 failed, 1 skipped |" in said and "| attention sdpa | ok: sdpa at worst" in said
    code, said = run("--only", "sdpa")
    assert code == 1 and "(no GPU" in said, "where none ran, none is right"
    with pytest.raises(SystemExit, match="there is no check 'sdpo'"):
        run("--only", "sdpo")
