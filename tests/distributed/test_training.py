"""Both stages from the command line on two real ranks under ZeRO-3: resume, loading, evaluation, bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # mlflow brings it
import pytest
import torch
from safetensors.torch import load_file

from mser_dist.cli import main as cli
from mser_dist.models.heard import ledger_of
from mser_dist.prediction.model import load_model
from mser_dist.shards.shard_set import ShardSet
from mser_dist.state.engine_state import weights
from tests.distributed.test_waveform_gradients import WAVEFORM, partitioned
from tests.tiny_runs import LLM, lines, mser, stage1, stage2, start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def trained(finished_stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a small synthetic set and a stage 1 in ``runs/whole``."""
    folder = tmp_path_factory.mktemp("training") / "work"
    shutil.copytree(finished_stage1, folder)
    return folder


@pytest.mark.drill("bitwise-resume")
def test_a_resumed_run_continues_bit_for_bit(trained: Path) -> None:
    """Six steps, against three steps that went on for three more from their checkpoint, dropout on."""
    whole, resumed = trained / "runs/whole", trained / "runs/resumed"
    # What a job that died after its checkpoint leaves: the run folder of step 3, and a half-written checkpoint.
    (resumed / "checkpoints").mkdir(parents=True)
    config = (whole / "config.yaml").read_text().replace("out: runs/whole", "out: runs/resumed")
    (resumed / "config.yaml").write_text(config)
    subprocess.run(["cp", "-r", whole / "checkpoints/step-000003", resumed / "checkpoints/step-000003"], check=True)
    (resumed / "checkpoints/step-000006.partial").mkdir()
    mser(*stage1("runs/resumed", "train.val_every=3"), "--nproc", "2", cwd=trained)
    before = {row["step"]: row["train/loss"] for row in lines(whole) if "train/loss" in row}
    after = {row["step"]: row["train/loss"] for row in lines(resumed) if "train/loss" in row}
    assert sorted(after) == [4, 5, 6] and after == {step: before[step] for step in after}
    for part in ("speech", "heads"):
        one, two = (load_file(run / f"export/{part}.safetensors") for run in (whole, resumed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_best_validation_is_saved_also_where_no_save_is_due(trained: Path) -> None:
    """Saves every two steps, validations every three: the first of these is the best so far."""
    run = trained / "runs/whole"
    states = {path.name: json.loads((path / "state.json").read_text()) for path in (run / "checkpoints").iterdir()}
    assert sorted(states) == ["step-000002", "step-000003", "step-000004", "step-000006"]
    scores = {int(row["step"]): row["val/ua"] for row in lines(run) if "val/ua" in row}
    assert states["step-000003"]["validation"]["ua"] == scores[3] == states["step-000004"]["best_ua"]
    # The last one is saved before it is validated: what that says stands beside the checkpoints.
    assert states["step-000006"]["validated"] == 3 and states["step-000006"]["best_ua"] == scores[3]
    noted = json.loads((run / "validations.json").read_text())
    assert {int(step): found["ua"] for step, found in noted.items()} == scores
    # The card has the temperature that was fitted to the step that is exported.
    card = json.loads((run / "export/card.json").read_text())
    assert card["temperature"] == noted[str(card["step"])].get("temperature")


def test_what_a_step_costs_is_logged_and_traced(trained: Path) -> None:
    run = trained / "runs/whole"
    rows = [row for row in lines(run) if "train/loss" in row]
    for row in rows:
        found = {name.removeprefix("train/"): value for name, value in row.items()}
        assert 0 < found["padding"] < 1 and 0 < found["peak_memory_gib"] < 64 and found["audio_seconds_per_second"] > 0
        assert 0 < found["mfu"] < found["hfu"] == pytest.approx(found["tflops"] / 0.001)
        # Of a rank's two micro-batches one is computed twice: gradient caching, which no clip needs.
        assert found["mfu"] < 0.9 * found["hfu"]
        parts = {name: value for name, value in found.items() if name.startswith("time_")}
        assert parts.keys() == {"time_data", "time_forward", "time_backward", "time_step", "time_rest"}
        assert sum(parts.values()) == pytest.approx(8 / found["clips_per_second"], rel=1e-3)
    [trace] = (run / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    named = [event["name"] for event in events if str(event.get("name")).startswith("mser ") and event.get("ph") == "X"]
    assert trace.name == "steps_2-3.json" and named.count("mser step") == 2 and named.count("mser backward") == 4


def in_process(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cwd: Path
) -> tuple[int, str]:
    """The exit code and standard error of a command that ends before it would start anything."""
    monkeypatch.chdir(cwd)
    return cli.main(words), capsys.readouterr().err


def test_a_finished_run_is_not_trained_again_and_another_config_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "runs/whole/log.jsonl").read_bytes()
    same = stage1("runs/whole", "train.save_every=1", "data.workers=0")  # nothing that changes the result
    assert in_process(same, monkeypatch, capsys, trained) == (0, "")
    assert (trained / "runs/whole/log.jsonl").read_bytes() == before
    code, error = in_process(stage1("runs/whole", "train.lr=0.5"), monkeypatch, capsys, trained)
    assert code == 2 and "train.lr" in error and len(error.splitlines()) == 1


def test_every_way_to_batch_trains_and_a_damaged_clip_within_the_budget_is_replaced(trained: Path) -> None:
    """Balanced, augmented contrastive batches over a damaged set, then packs of tokens in stage 2."""
    subprocess.run(["cp", "-r", trained / "shards", trained / "damaged"], check=True)
    shards = ShardSet.open(trained / "damaged", split="train")
    with (trained / "damaged/train-000000.tar").open("r+b") as file:
        file.seek(shards.refs([5])[0].audio_at + 50)
        file.write(b"damage")
    words = ["data.sets=damaged", "data.balance=label,language", "data.augment={speed: 0.1, time_masks: 1}"]
    words += ["train.steps=8", "data.val_split=null", "--nproc", "2"]
    error = mser(*stage1("runs/balanced", *words), cwd=trained, code=2)
    assert f"sample {shards.key(5)}: what the shard holds is not what its index says" in error
    assert "Traceback" not in error and not (trained / "runs/balanced/export").exists()
    mser(
        *stage1("runs/balanced", *words, "train.steps=8", "data.val_split=null", "data.max_bad=1"),
        "--nproc",
        "2",
        cwd=trained,
    )
    assert lines(trained / "runs/balanced")[-1]["train/bad_clips"] == 1
    two = ["data.batching=tokens", "data.tokens=600", "train.micro_batch=1", "train.global_batch=4"]
    output = mser(*stage2("runs/packs", *two), "--nproc", "2", cwd=trained)
    assert "4 packs a step (2 ranks × 1 × 2)" in output
    assert [row["step"] for row in lines(trained / "runs/packs") if "train/loss" in row] == [1, 2, 3]


def test_stage_2_trains_the_whole_llm_and_both_are_evaluated(trained: Path) -> None:
    mser(*stage2("runs/two", LLM, "train.micro_batch=2"), "--nproc", "2", cwd=trained)
    summary = json.loads((trained / "runs/two/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["zero_stage"] == 3 and summary["attention"]["kernel"] == "sdpa"
    words = ["eval", "demo_eval", "data.sets=shards", "stage1=runs/whole", "stage2=runs/two", "batch=5"]
    words += ["protocol.instructions=2", "protocol.decode=constrained,free"]
    table = mser(*words, "out=runs/eval1", cwd=trained)
    assert "el" in table and "unseen languages" in table
    output = mser(*words, "out=runs/eval2", "zero3=true", "--nproc", "2", cwd=trained)
    [sizes] = re.findall(r"llm: (\S+) parameters, (\S+) of them on this rank", output)
    whole, here = (int(size.replace(",", "")) for size in sizes)
    assert 0 < here <= 0.55 * whole, "ZeRO-3 has shared the LLM out"

    one, two = (pandas.read_parquet(trained / name / "predictions.parquet") for name in ("runs/eval1", "runs/eval2"))
    assert len(one) == 2 * 18, "every clip of 3 languages × 6 emotions once, by each stage"
    assert one[["model", "key", "predicted"]].equals(two[["model", "key", "predicted"]])
    scores, others = (table.filter(like="score_") for table in (one, two))
    assert np.allclose(scores, others, rtol=0, atol=1e-5)
    best = one.filter(like="score_").idxmax(axis=1).str.removeprefix("score_")
    assert best.tolist() == one["predicted"].tolist() and not one["speaker"].isna().any()
    assert one["generated"].equals(two["generated"]) and one["generated"].notna().sum() == 18
    rows, shared = (
        json.loads((trained / name / "report.json").read_text())["zero_shot"] for name in ("runs/eval1", "runs/eval2")
    )
    for row, other in zip(rows, shared, strict=True):
        assert row["protocols"] == other["protocols"] and row.get("invalid_rate") == other.get("invalid_rate")
        kinds = {"sum", "mean", "prior", "constrained", "free"} if row["stage"] == 2 else set()
        assert kinds | {"native", "prompt 1", "prompt 2"} <= row["protocols"].keys()
        assert ("constrained_agreement" in row) == (row["stage"] == 2) and row["prompt_spread"]["prompts"] >= 2
    assert {(row["language"], row["seen_language"]) for row in rows} == {("en", True), ("de", True), ("el", False)}
    what_was_heard_is_known(trained, rows)


def what_was_heard_is_known(trained: Path, rows: list[dict[str, Any]]) -> None:
    """By the exports alone, stage 2's without its stage 1: the ledgers are of the clips that were trained on."""
    assert {(row["language"], row["zero_shot"]) for row in rows} == {("en", False), ("de", False), ("el", True)}
    assert not any(row["leaks"] or row["unknown"] for row in rows), "the test's voices are others"
    shutil.copytree(trained / "runs/two/export", trained / "moved/export")
    known = ledger_of(trained / "moved/export")
    parts = {(part.stage, part.use): part for part in known.parts}
    assert [*parts] == [(2, "training"), (2, "validation"), (1, "training"), (1, "validation")] and known.encoder == ""
    heard = ShardSet.open(trained / "shards", split="train", sound=True)
    for stage in (1, 2):
        assert parts[stage, "training"].languages == ["de", "en"]
        assert np.array_equal(parts[stage, "training"].clips, np.unique(heard.content_keys()))
    said = (trained / "runs/two/export/README.md").read_text()
    assert "- stage 2 (two): " in said and "- stage 1 (whole): " in said

    words = ["eval", "demo_eval", "stage1=null", "stage2=moved", "data.split=train", "require=zero_shot"]
    error = mser(*words, "data.sets=shards", "out=runs/refused", cwd=trained, code=2)
    assert "require=zero_shot: for stage 2, de of" in error and "stage 1 was trained on its language" in error
    assert f"stage 2 heard {len(heard) // 2} of its {len(heard) // 2} clips" in error
    assert not (trained / "runs/refused").exists() and len(error.splitlines()) == 1


def same_from_a_checkpoint(trained: Path) -> None:
    """`mser export` of a run's last step is the export at its end, bit for bit; merged adapters answer as they did."""
    mser("export", "runs/half", "models/half", "--shard-gb", "0.00001", cwd=trained)
    one, two = (export_tensors(trained / export) for export in ("runs/half/export", "models/half"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert len([*(trained / "models/half/llm").glob("model-*-of-*.safetensors")]) > 2
    said = mser("export", "runs/lora", "models/merged", "--best", "--merge", cwd=trained)
    assert "which answers as trained" in said
    folders = [trained / "runs/two/export/llm", trained / "models/merged/llm"]
    base, whole = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], whole[name])}
    assert base.keys() == whole.keys() and changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with chdir(trained):  # the adapters' base is named as the run's config names it, from where that was started
        both = [load_model(name) for name in ("runs/lora", "models/merged")]
    noise = np.random.default_rng(0).normal(size=16000).astype(np.float32) * 0.1
    lora, merged = (model.predict(noise, sampling_rate=16000).probabilities for model in both)
    assert lora == pytest.approx(merged, abs=1e-4)
    error = mser("export", "runs/whole", "models/whole", "--step", "5", cwd=trained, code=2)
    assert "keeps no step 5: kept are 2, 3, 4, 6" in error
    error = mser("export", "runs/whole", "models/whole", "--merge", cwd=trained, code=2)
    assert "--merge is of adapters, and this run has none" in error and not (trained / "models/whole").exists()


def adapters_of_the_best_step(trained: Path, folder: str) -> None:
    """A run with adapters whose first step is said to have been its best exports these, at the end of its third."""
    words = [folder, "llm.arch={}", "llm.lora={rank: 2}", "train.lr=0.02", "train.schedule=constant"]
    words += ["train.save_every=1", "train.keep=9"]
    mser(*stage2("runs/lora", *words, "train.steps=2"), "--nproc", "2", cwd=trained)
    run = trained / "runs/lora"
    notes = json.loads((run / "validations.json").read_text())
    (run / "validations.json").write_text(json.dumps({**notes, "1": {**notes["2"], "ua": 1.5}}))
    mser(*stage2("runs/lora", *words, "train.steps=3"), "--nproc", "2", cwd=trained)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["exported_step"], summary["best_ua"]) == (3, 1, 1.5)
    assert json.loads((run / "export/card.json").read_text())["step"] == 1
    found = load_file(run / "export/llm/adapter_model.safetensors")
    assert found
    for step, same in ((1, True), (3, False)):
        saved = weights(run / f"checkpoints/step-{step:06d}")
        kept = {name.replace(".default", "").removeprefix("llm."): weight for name, weight in saved}
        assert all(torch.equal(weight, kept[name]) == same for name, weight in found.items())


def export_tensors(export: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, whatever files they are in."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(export.rglob("*.safetensors")):
        folder = file.relative_to(export).parent
        found |= {f"{folder}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def test_a_pretrained_llm_is_partitioned_as_it_loads(trained: Path) -> None:
    """From a local folder in Hugging Face format, whole and with LoRA, on two ranks; then loaded for evaluation."""
    if not (trained / "runs/two/export/llm").exists():
        mser(*stage2("runs/two", LLM, "train.micro_batch=2"), "--nproc", "2", cwd=trained)
    folder = "llm.pretrained=runs/two/export/llm"
    mser(*stage2("runs/three", folder, "llm.arch={}"), "--nproc", "2", cwd=trained)
    # As the cluster presets do: parts that are partitioned at loading beside parts that are not, in bf16.
    half = ["engine.dtype=bfloat16", "llm.gradient_checkpointing=true", "train.val_every=2"]
    mser(*stage2("runs/half", folder, "llm.arch={}", *half), "--nproc", "2", cwd=trained)
    before = load_file(trained / "runs/two/export/llm/model.safetensors")
    after = load_file(trained / "runs/three/export/llm/model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].shape == weight.shape and not torch.equal(after[name], weight), f"{name} was not trained"
        assert (after[name] - weight).abs().max() < 0.05, f"{name} did not start from the pretrained weights"
    adapters_of_the_best_step(trained, folder)
    same_from_a_checkpoint(trained)
    words = ["eval", "demo_eval", "data.sets=shards", "stage1=null", "stage2=runs/lora", "out=runs/eval3"]
    assert "on this rank (ZeRO-3)" in mser(*words, "zero3=true", "--nproc", "2", cwd=trained)


@pytest.mark.drill("bitwise-resume")
def test_stage_2_resumes_bit_for_bit_too(trained: Path) -> None:
    """Four steps of the whole LLM, stage 1's loss beside it, against two that went on for two more, with dropout."""
    words = ["train.steps=4", "train.save_every=2", "train.keep=5", "align=0.1"]
    mser(*stage2("runs/straight", LLM, *words), "--nproc", "2", cwd=trained)
    whole, resumed = trained / "runs/straight", trained / "runs/again"
    (resumed / "checkpoints").mkdir(parents=True)
    config = (whole / "config.yaml").read_text().replace("out: runs/straight", "out: runs/again")
    (resumed / "config.yaml").write_text(config)
    subprocess.run(["cp", "-r", whole / "checkpoints/step-000002", resumed / "checkpoints"], check=True)
    mser(*stage2("runs/again", LLM, *words), "--nproc", "2", cwd=trained)
    found = [row for row in lines(resumed) if "train/loss" in row]
    assert [row["step"] for row in found] == [3, 4]
    for row in found:
        parts = row["train/answer_loss"] + 0.1 * row["train/align_loss"]
        assert row["train/loss"] == pytest.approx(parts, rel=1e-5) and row["train/align_loss"] > 0
    for part in ("speech", "heads", "llm/model"):
        one, two = (load_file(folder / f"export/{part}.safetensors") for folder in (whole, resumed))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_waveform_encoder_from_the_command_line(trained: Path) -> None:
    encoder = f"encoder.arch={json.dumps({'model_type': 'wav2vec2', **WAVEFORM})}"
    words = [encoder, f"engine.deepspeed={partitioned(trained)}", "train.steps=4"]
    words += ["data.augment.time_masks=1", "--nproc", "2"]
    process = start(*stage1("runs/wave", *words), cwd=trained)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    warnings = [line.removeprefix("mser: warning: ") for line in said.splitlines() if "has no effect" in line]
    assert warnings == [  # once, of two ranks
        "data.augment.time_masks=1 has no effect: the encoder hears the waveform",
        "train.epochs=4.0 has no effect: train.steps says how long the training is",
    ]
    card = json.loads((trained / "runs/wave/export/card.json").read_text())
    assert card["speech"]["features"] == {"n_mels": None, "normalize": True, "pad_seconds": None}
    words = ["eval", "demo_eval", "data.sets=shards", "data.workers=1", "stage1=runs/wave", "stage2=null"]
    assert "unseen languages" in mser(*words, "out=runs/wave_eval", cwd=trained)


def test_bfloat16_trains_both_stages(trained: Path) -> None:
    """The dtypes of the GPU presets, on a CPU: DeepSpeed casts the model, and the inputs have to follow."""
    words = ["engine.dtype=bfloat16", "--nproc", "2"]
    mser(*stage1("runs/bf16_one", *words), cwd=trained)
    mser(*stage2("runs/bf16_two", LLM, "stage1=runs/bf16_one", *words), cwd=trained)
    weights = load_file(trained / "runs/bf16_two/export/llm/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    checkpoint = sorted((trained / "runs/bf16_two/checkpoints").glob("step-*"))[-1]
    for rank in (0, 1):  # what was stepped holds more than bfloat16 does
        state = load_file(checkpoint / f"rank-{rank:05d}.safetensors")
        masters = [tensor for name, tensor in state.items() if name.startswith("master/llm")]
        assert {tensor.dtype for tensor in masters} == {torch.float32}
        assert any((tensor != tensor.bfloat16()).any() for tensor in masters)
    runs = ["stage1=runs/bf16_one", "stage2=runs/bf16_two"]
    mser("eval", "demo_eval", "data.sets=shards", "out=runs/bf16_eval", "dtype=bfloat16", *runs, cwd=trained)


def test_mistakes_end_with_one_line_and_code_2(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some on two ranks, of which one speaks; the others, which take the same way, in this process."""
    two = {
        "did you mean train.": stage1("runs/bad", "train.global_batsch=8"),
        "does not divide": stage1("runs/bad", "train.global_batch=9"),
        "did you mean happy": stage1("runs/bad", "data.labels=[anger, hapy]"),
    }
    for expected, words in two.items():
        error = mser(*words, "--nproc", "2", cwd=trained, code=2)
        assert expected in error and "Traceback" not in error, error
        assert len([line for line in error.splitlines() if line.startswith("mser: error")]) == 1, error
    one = {
        "no such run folder": stage2("runs/bad", LLM, "stage1=runs/nowhere"),
        "run of stage 2": stage2("runs/bad", LLM, "stage1=runs/two"),
        "flash_attention_2": stage1("runs/bad", "engine.attention=flash_attention_2"),
        "contrastive.loss is 'clip'": stage1("runs/bad", "contrastive.loss=clip"),
        "folder of a training run": ["eval", "demo_eval", "stage1=runs/whole", "stage2=null", "data.sets=shards"],
        "contradicts": stage1("runs/bad", "engine.deepspeed=zero3_bf16"),
    }
    for expected, words in one.items():
        out = ["out=runs/whole"] if words[0] == "eval" else []
        code, error = in_process([*words, *out], monkeypatch, capsys, trained)
        assert code == 2 and expected in error, error
        assert error.startswith("mser: error") and len(error.splitlines()) == 1, error
    assert not (trained / "runs/bad/config.yaml").exists(), "nothing is left that looks like a run"


def test_torchrun_starts_the_same_command_and_zero2_trains_as_zero3(trained: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mser_dist",
    ]
    words = stage1("runs/zero2", "engine.deepspeed=zero2", "train.steps=2")
    done = subprocess.run([*command, *words], cwd=trained, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((trained / "runs/zero2/summary.json").read_text())
    assert summary["world_size"] == 2 and summary["zero_stage"] == 2
    assert (trained / "runs/zero2/export/speech.safetensors").is_file()
    three, two = (lines(trained / name)[0]["train/loss"] for name in ("runs/whole", "runs/zero2"))
    assert two == pytest.approx(three, rel=1e-5), "the first loss does not depend on how the state is sharded"
