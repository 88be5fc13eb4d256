"""A training inside somebody else's process, as a notebook's is: what it leaves behind, and that another one works."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny_runs import ROOT, stage1, stage2

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def notebook() -> None:
    """What a person types, cell by cell; prints what it found as JSON on its last line."""
    import mser_dist
    from mser_dist.errors import Stopped

    _, name, *words = stage1("runs/whole", "train.steps=12", "train.val_every=0", "data.workers=2")
    config = mser_dist.load_config(name, words)
    found: dict[str, Any] = {"changed": []}

    def cell(title: str, function: Callable[[], Any]) -> Any:
        before = here()
        try:
            result = function()
        except Stopped as stop:
            result = str(stop)
        after = here()
        found["changed"] += [f"{title}: {key}" for key in before if before[key] != after[key]]
        return result

    threading.Thread(target=interrupt_when, args=(Path("runs/whole/log.jsonl"),), daemon=True).start()
    found["stopped"] = cell("a training that is interrupted", lambda: mser_dist.train(config))
    found["summary"] = cell("the same one, to its end", lambda: mser_dist.train(config))
    _, name, *words = stage2("runs/two", "train.steps=2", "engine.deepspeed=zero2")
    cell("a second training, of another kind", lambda: mser_dist.train(mser_dist.load_config(name, words)))
    words = ["stage1=runs/whole", "stage2=runs/two", "data.sets=shards", "out=runs/eval", "batch=8"]
    report = cell("an evaluation", lambda: mser_dist.evaluate(mser_dist.load_config("demo_eval", words)))
    found["rows"] = len(report["zero_shot"])

    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    _, name, *words = stage1("runs/own", "train.steps=1", "train.val_every=0")
    cell("a training in a group of the person's own", lambda: mser_dist.train(mser_dist.load_config(name, words)))
    print(json.dumps(found))


def here() -> dict[str, Any]:
    """What a training must not change."""
    dist = sys.modules.get("torch.distributed")
    return {
        "process group": bool(dist and dist.is_initialized()),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "threads": [thread.name for thread in threading.enumerate() if not thread.daemon],
        "processes": [child.pid for child in psutil.Process().children(recursive=True)],
        "what names an uncaught error": sys.excepthook,
        "working folder": os.getcwd(),  # noqa: PTH109
    }


def interrupt_when(log: Path) -> None:
    """Ctrl-C once a step is logged."""
    while not log.is_file() or "train/loss" not in log.read_text(encoding="utf-8"):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_training_leaves_the_process_as_it_was(tiny_set: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(tiny_set)
    command = [sys.executable, "-c", "from tests.distributed.test_session import notebook; notebook()"]
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    env = {**plain, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["changed"] == []
    assert found["stopped"].startswith("SIGINT: stopped at step"), "the interrupt came before the training's end"
    assert found["summary"]["steps"] == 12 and found["summary"]["world_size"] == 1
    assert f"continuing from step {found['stopped'].split()[4].rstrip(';')}" in done.stdout
    assert found["rows"] == 6
    others = [line for line in done.stderr.splitlines() if "mser: warning: " not in line]  # ours say what they should
    assert not any("arning" in line or "WARN" in line for line in others), done.stderr
