"""A submitted job on this machine: two ranks that are signalled, save, and go on."""

import json
import time
from pathlib import Path

import psutil
import pytest

from mser_dist.jobs import launch

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["data.sets=shards", "train.global_batch=8", "tracking.enabled=false"]


@pytest.mark.timeout(240)
def test_a_training_signalled_at_one_rank_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real ranks: USR2 to rank 1 alone; the summary is that of the run that went on."""
    from mser_dist.synth.speech import SynthConfig
    from mser_dist.synth.write import write_set

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = SynthConfig(
        languages=("en",), unseen_languages=(), train_sentences=4, val_sentences=1, test_sentences=1,
        train_takes=1, val_takes=1, test_takes=1, val_voices=2, test_voices=2,
    )  # fmt: skip
    write_set(tmp_path / "shards", small)
    encoder = "encoder.arch={d_model: 32, encoder_layers: 1, encoder_attention_heads: 2, encoder_ffn_dim: 64}"
    more = [encoder, "qformer.width=32", "qformer.heads=2", "data.val_split=null", "data.workers=1", "out=run"]
    more += ["train.steps=60", "train.log_every=1", "data.labels=[anger, happy, neutral, sad]"]
    job = launch.submit("demo_stage1", [*WORDS, *more], tasks_per_node=2, cluster="local", time=60)
    log = tmp_path / "run" / "log.jsonl"
    while not job.done() and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    ranks = psutil.Process(job._job._process.pid).children()
    next(rank for rank in ranks if rank.environ()["SUBMITIT_LOCAL_GLOBALID"] == "1").send_signal(12)
    summary = job.result()
    assert summary["steps"] == 60 and summary["world_size"] == 2
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "continuing from step" in job.stdout()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 61))
