"""How long `mser compare --experiment` takes over a sqlite store of many runs.

    python tools/bench_compare.py [--runs 200] [--clips 1000] [--json FILE]

Makes a store with as many evaluations, each of a training of its own, with params, metrics and predictions as real ones
have, and gives the time of the command from its start to its end, with tables and plot, the best of --rounds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from mser_dist import __version__
from mser_dist.config.file import flatten, load_evaluation, load_training, to_yaml
from mser_dist.files import write_json
from mser_dist.runs.sync import prepare_mlflow

LABELS = ["anger", "disgust", "fear", "happy", "neutral", "sad"]
LANGUAGES = ["el", "fa", "ru"]
SPEAKERS = 12  # of each language
ROOT = Path(__file__).parents[1]


def predictions(clips: int, right: float, seed: int) -> pyarrow.Table:
    """Of one model, as an evaluation writes them."""
    random = np.random.default_rng(seed)
    number = np.arange(clips)
    reference = number % len(LABELS)
    predicted = np.where(random.random(clips) < right, reference, random.integers(0, len(LABELS), clips))
    language = [LANGUAGES[i] for i in number % len(LANGUAGES)]
    columns: dict[str, Any] = {"model": ["stage1"] * clips, "key": [f"k{i:06d}" for i in number]}
    columns |= {"corpus": ["made-up"] * clips, "language": language}
    columns["speaker"] = [f"{name}{i // 6 % SPEAKERS}" for i, name in enumerate(language)]
    columns |= {name: [LABELS[i] for i in of] for name, of in (("label", reference), ("predicted", predicted))}
    scores = random.random((clips, len(LABELS))).astype(np.float32)
    return pyarrow.table(columns | {f"score_{label}": scores[:, i] for i, label in enumerate(LABELS)})


def write_run(client: Any, experiment: str, out: Path, config: Any, tags: dict[str, str], metrics: list[str]) -> str:
    """A finished run, as its folder and as MLflow has it; returns its id."""
    from mlflow.entities import Metric, Param, RunTag

    run = client.create_run(experiment, run_name=out.name)
    tags = {"mser.version": __version__, "mser.out": str(out.resolve()), **tags}
    params = [Param(key, value) for key, value in flatten(config).items()]
    values = [Metric(name, 0.5, 1, step) for name in metrics for step in range(5)]
    client.log_batch(run.info.run_id, metrics=values, params=params[:100], tags=[RunTag(*tag) for tag in tags.items()])
    client.log_batch(run.info.run_id, params=params[100:])
    client.set_terminated(run.info.run_id)
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(f"# mser_dist {__version__}\n{to_yaml(config)}", encoding="utf-8")
    links = {tag: value for tag, value in tags.items() if tag.endswith("_run_id")}
    write_json(out / "mlflow.json", {"run_id": run.info.run_id, "status": "FINISHED", "links": links})
    return str(run.info.run_id)


def make_store(folder: Path, runs: int, clips: int) -> str:
    """Runs in a folder and a store; returns the store's URI. Trainings differ in learning rate and seed."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    prepare_mlflow(uri)
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.create_experiment("bench", artifact_location=(folder / "mlartifacts").as_uri())
    for i in range(runs):
        lr, seed = 1e-4 * (1 + i // 4), i % 4
        config = load_training("demo_stage1", [f"train.lr={lr:.4g}", f"seed={seed}", f"out={folder / f'train{i}'}"])
        names = [f"train/number{j}" for j in range(30)] + ["val/ua", "val/wa", "val/macro_f1"]
        trained = write_run(client, experiment, Path(config.out), config, {"mser.stage": "1"}, names)
        validation = {"ua": 0.5, "wa": 0.5, "macro_f1": 0.5}
        write_json(Path(config.out) / "summary.json", {"stage": 1, "out": config.out, "validation": validation})
        out = folder / f"eval{i}"
        evaluation = load_evaluation("demo_eval", [f"out={out}", f"stage1={config.out}", "stage2=null"])
        tags = {"mser.stage": "eval", "mser.stage1_run_id": trained}
        names = [f"ua/stage1/made_up/{language}" for language in LANGUAGES] + ["ua/stage1/unseen"]
        write_run(client, experiment, out, evaluation, tags, names)
        parquet.write_table(predictions(clips, 0.4 + 0.3 * (i // 4) / runs, i), out / "predictions.parquet")
        rows = [{"model": "stage1", "corpus": "made-up", "language": one, "seen_language": False} for one in LANGUAGES]
        write_json(out / "report.json", {"zero_shot": rows})
    return uri


def measure(runs: int, clips: int, rounds: int) -> dict[str, Any]:
    """Seconds, and those of cores, of the command over a store of so many evaluations: the best of some rounds."""
    with tempfile.TemporaryDirectory(prefix="bench_compare-") as name:
        folder = Path(name)
        uri = make_store(folder, runs, clips)
        words = ["compare", "--experiment", "bench", "--uri", uri, "--out", str(folder / "out")]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        found = []
        for _ in range(rounds):
            began, before = time.perf_counter(), os.times()
            subprocess.run([sys.executable, "-m", "mser_dist", *words], check=True, env=env, stdout=subprocess.DEVNULL)
            after = os.times()
            used = after.children_user + after.children_system - before.children_user - before.children_system
            found.append((time.perf_counter() - began, used))
    seconds, used = min(found)
    return {"name": "compare", "seconds": seconds, "cpu_seconds": used, "runs": runs, "clips": clips}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="evaluations (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=1000, help="of each evaluation (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    options = parser.parse_args()
    row = measure(options.runs, options.clips, options.rounds)
    print(
        f"mser compare: {options.runs} evaluations of {options.clips} clips, {row['seconds']:.1f} s "
        f"({row['cpu_seconds']:.1f} s of a core)"
    )
    if options.json:
        write_json(options.json, {"rows": [row]})


if __name__ == "__main__":
    main()
