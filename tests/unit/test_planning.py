"""The plan of a training: links and names as people write them, time by hand, figures by their sources, what fits."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mser_dist import config as cfg
from mser_dist.cli import main as cli
from mser_dist.config.file import load_training
from mser_dist.errors import UserError
from mser_dist.planning import fit, memory, published, shapes, step_time
from mser_dist.planning.cluster import GPUS, bytes_a_second, cluster_of
from mser_dist.planning.collectives import Traffic
from mser_dist.planning.given import Given
from mser_dist.planning.plan import Network, TrainingPlan, plan
from mser_dist.planning.rehearsal import Rehearsed
from mser_dist.training.peaks import peak_of

EIGHT = "whisper-large-v3_llama3-8b_stage2"


def test_links_are_read_as_people_write_them() -> None:
    assert bytes_a_second("400Gb") == bytes_a_second("400Gb/s") == bytes_a_second("50GB") == 50e9
    for wrong in ("400", "0Gb", "fast", "400 Gigabit"):
        with pytest.raises(UserError, match="400Gb"):
            bytes_a_second(wrong)


def test_clusters_are_named() -> None:
    found = cluster_of(4, 8, "NVIDIA H100", None)
    assert (found.world_size, found.gpu.name, found.across) == (32, "h100", 50e9)
    assert cluster_of(1, 4, "A100_80GB", "100Gb").across == 12.5e9
    with pytest.raises(UserError, match="did you mean h200"):
        cluster_of(1, 1, "h20o")
    with pytest.raises(UserError, match="known are h100"):
        cluster_of(1, 1, "abacus")
    with pytest.raises(UserError, match="1 or more"):
        cluster_of(0, 8, "h100")
    assert [found.sized(n).nodes for n in (1, 8, 16)] == [1, 1, 2]


def test_every_gpu_has_a_peak() -> None:
    for gpu in GPUS.values():
        assert peak_of(gpu.device, "float16"), gpu.name
        assert gpu.memory > 2**34 and gpu.within >= gpu.across / 4


def test_the_time_of_a_step_is_that_of_its_formula() -> None:
    """By hand: 1e15 operations at half of 1e15 a second for a wide, long micro-batch; bytes at half a link."""
    constants = step_time.Constants(0.5, 0.5, 1.0, 0.0, 0.01, 2.0, 0.25, 0.5, 0.5, 2.0, 0.001)
    work = step_time.StepWork(0.5e15, 0.25e15, 0.0, 1024, 3, 1024, 2, 10e9, 4e9, 5)
    machine = step_time.Machine(1e15, "h100", 10e9, 100e9, 3)
    found = step_time.seconds(work, machine, constants)
    assert found.compute == pytest.approx(2 * (1e15 / 0.25e15 + 0.03))
    assert found.communicate == pytest.approx(2.0 + 0.001 * 2 * 5)
    assert found.step == pytest.approx((found.compute**2 + found.communicate**2) ** 0.5)


def test_whole_sources_are_held_out_by_a_rule_that_sees_no_speed() -> None:
    found = published.figures()
    seen, unseen = published.split(found)
    assert len(seen) + len(unseen) == len(found) > 250
    assert not {f.source for f in seen} & {f.source for f in unseen}
    slower = [replace(f, seconds=10 * f.seconds) for f in found]
    assert [f.number for f in published.split(slower)[0]] == [f.number for f in seen]
    written = json.loads(step_time.FILE.read_text(encoding="utf-8"))
    assert set(written["fitted_on"]) == {f.source for f in seen} and set(written["held_out"]) == {
        f.source for f in unseen
    }
    with published.FILE.open(encoding="utf-8", newline="") as opened:
        assert all(row["source_repo"] and row["source_path"] for row in csv.DictReader(opened))


def test_the_shipped_constants_are_those_of_the_fit_and_their_errors_are_what_is_told() -> None:
    constants, interval = step_time.shipped()
    held = fit.held_out()
    assert fit.median_error() == held.median and fit.p90_error() == held.p90
    factors = 1 / (1 + held.errors)
    assert interval == pytest.approx((float(np.quantile(factors, 0.1)), float(np.quantile(factors, 0.9))))
    seen = published.split(published.figures())[0]
    assert step_time.as_json(fit.fit(seen)) == pytest.approx(step_time.as_json(constants), rel=0.02, abs=1e-6)


def test_known_shapes_have_the_published_sizes() -> None:
    """Parameters as their makers state them, in billions; and those of the encoder of Whisper-large-v3."""
    for name, billions in {
        "llama-3-8b": 8.03,
        "llama-3-70b": 70.55,
        "smollm2-135m": 0.1345,
        "llama-3.2-1b": 1.236,
    }.items():
        model = shapes.on_meta(load_training(EIGHT, []), name)
        llm = sum(p.numel() for n, p in model.named_parameters() if n.startswith("llm."))
        assert llm / 1e9 == pytest.approx(billions, rel=2e-3), name
        assert all(p.device.type == "meta" for p in model.parameters())
    encoder = model.speech.frozen
    assert encoder is not None
    assert sum(p.numel() for p in encoder.encoder.parameters()) == pytest.approx(637e6, rel=0.01)
    with pytest.raises(UserError, match="--llm-shape"):
        shapes.on_meta(load_training(EIGHT, ["llm.pretrained=some/other"]))


def test_what_is_kept_for_the_backward_pass() -> None:
    """Twice the clips keep twice as much; a layer more a layer's more."""
    config = load_training("demo_stage2", [])

    def kept(clips: int, layers: int = 2) -> memory.Activations:
        assert isinstance(config, cfg.Stage2)
        arch = {**config.llm.arch, "num_hidden_layers": layers}
        other = load_training("demo_stage2", [f"llm.arch={json.dumps(arch)}"])
        return memory.activations(other, clips, 100, 34, 1, None, None)

    one, two, deeper = kept(8), kept(16), kept(8, 4)
    assert two.aligner == pytest.approx(2 * one.aligner, rel=0.02)
    assert deeper.llm == pytest.approx(2 * one.llm, rel=0.1)
    assert deeper.aligner == one.aligner and deeper.logits == one.logits
    tokens = 34 + 8 * (4 + 5 + 3)
    assert one.inputs == 2 * tokens * 128 * 4
    assert one.of_llm(checkpointing=True) < one.llm


def network(config: cfg.Stage1 | cfg.Stage2, clips: int = 8) -> Network:
    """Of a config, with what was not rehearsed made up."""
    model = shapes.on_meta(config)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    said = [Traffic("all-gather", 16, 10, 2 * 16 * sum(-(-n // 16) for n in trained))]
    kept = memory.Activations(1e6, 4e6, 1e6, 2, 1e5, 1e5)
    return Network(model, trained, [], 1000, clips, kept, Rehearsed(16, 0, 0, 0, 1, said, said))


def planned(*words: str, nodes: int = 2, gpu: str = "h100", clips: int | None = None) -> TrainingPlan:
    config = load_training("demo_stage2", ["train.global_batch=128", *words])
    return plan(config, cluster_of(nodes, 8, gpu), Given.of(config, clips=clips), network(config))


def test_a_plan_by_hand() -> None:
    found = planned("train.steps=100")
    trained = sum(network(load_training("demo_stage2", [])).trained)
    assert found.micro_batch == 8 and found.accumulation == 1 and found.clips == 128
    assert found.memory["optimizer (masters, moments)"] == pytest.approx(12 * trained / 16, rel=1e-3)
    assert found.checkpoint == 12 * trained and found.export == 4 * (trained + 1000)
    assert found.fits and found.duration is not None and found.gpu_hours is not None
    assert found.gpu_hours == pytest.approx(found.duration * 16 / 3600)
    assert found.interval[0] < found.seconds.step < found.interval[1]
    twice = planned("train.steps=100", "train.micro_batch=4")
    assert twice.accumulation == 2 and twice.said[0].bytes == 2 * found.said[0].bytes
    assert twice.seconds.compute > found.seconds.compute, "smaller products"


def test_how_long_it_takes_needs_the_number_of_clips() -> None:
    assert planned().duration is None and any("--clips" in note for note in planned().notes)
    assert planned(clips=1280).steps == 30  # three epochs of ten steps


def test_what_a_gpu_cannot_do_is_told() -> None:
    with pytest.raises(UserError, match="bfloat16"):
        planned("engine.dtype=bfloat16", gpu="v100")
    with pytest.raises(UserError, match="does not divide"):
        planned("train.global_batch=100")
    assert any("no figures of a b200" in note for note in planned(gpu="b200").notes)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, told in {
        ("--gpu", "h1000"): "did you mean h100",
        ("--gpu", "h100", "--link", "quick"): "400Gb",
        ("--gpu", "h100", "--price", "-1"): "--price",
        ("--gpu", "h100", "--plot", str(tmp_path / "no" / "p.png")): "--plot",
        ("--gpu", "h100", "--clips", "0"): "--clips 0",
    }.items():
        assert cli.main(["plan", "demo_stage2", *words]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
