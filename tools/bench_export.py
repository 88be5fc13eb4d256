"""The memory that an export takes beside its training: python tools/bench_export.py --json FILE [--small]

Two ranks over gloo train one step of a stage 2 under ZeRO-3, all weights of a Llama of 1 GiB (fp32), and export it as
the end of a training does: once in files of at most `--shard-mib`, once as one file. Before it is published each export
is loaded and answers as the model that was trained. Rows of {"rows": [{name, shard_mib, peak_mib, ratio}]}:

- shard_mib: the largest file of weights that was written
- peak_mib: the most anonymous memory (what cannot be dropped and read again, as mapped pages of a file can) that a
  rank had while it exported, less what it had just before: of the rank where that is most. The forward pass of the
  trained model is in it, for which ZeRO-3 gathers weights as in training
- ratio: peak_mib / shard_mib
"""

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mser_dist import config as cfg
from mser_dist.config import SIX_EMOTIONS
from mser_dist.files import write_json
from mser_dist.models import exported, publish
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.small_llm import small_tokenizer
from mser_dist.models.speech import build_speech
from mser_dist.quiet import hush
from mser_dist.ranks import distributed, preempt
from mser_dist.stream.plan import START
from mser_dist.training.finish import export_model
from mser_dist.training.setup import load, look_ahead, started
from tools.bench_features import write_clips

RANKS = 2
WHOLE = 10**12  # bytes: one file
# 1.0 GiB, of which word embeddings and output layer are 32 MiB each: a quarter of a file, as in a Llama of 8 B.
LLAMA: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20,
    "num_attention_heads": 16, "max_position_embeddings": 2048,
}  # fmt: skip
WHISPER = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}  # base: 75 MiB
SMALL_LLAMA = {**LLAMA, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL_WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}


class Peak:
    """Anonymous memory of this process while a block runs, sampled every 2 ms."""

    def __init__(self) -> None:
        self.before = self.most = 0
        self._over = threading.Event()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous())

    @contextmanager
    def watched(self) -> Iterator["Peak"]:
        self.before = self.most = anonymous()
        thread = threading.Thread(target=self._watch)
        thread.start()
        yield self
        self._over.set()
        thread.join()

    @property
    def mib(self) -> float:
        return (self.most - self.before) / 2**20


def anonymous() -> int:
    """Bytes of this process in memory that no file stands behind."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def prepare(folder: Path, small: bool) -> None:
    """A set, the export of a stage 1 that has learned nothing, and a pretrained LLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    write_clips(folder / "set", 8)
    sdpa = Attention("sdpa", "the benchmark")
    speech = build_speech(cfg.EncoderConfig(arch=SMALL_WHISPER if small else WHISPER), cfg.QFormerConfig(), sdpa)
    aligner = Aligner(speech, 384, cfg.ContrastiveConfig())
    card = {"stage": 1, "labels": SIX_EMOTIONS, "text_width": 384, **exported.aligner_card(aligner)}
    (folder / "stage1").mkdir()
    publish.write(folder / "stage1/export", aligner, aligner.state_dict(), card)
    tokenizer = small_tokenizer(SIX_EMOTIONS)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    llm = LlamaForCausalLM(LlamaConfig(**{**(SMALL_LLAMA if small else LLAMA), **special}))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")


def rank(number: int, port: int, folder: Path, shards: list[int]) -> None:
    """A process of the training: one step, then the exports; rank 0 writes the rows."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MSER_FEATURES": str(folder / "features")}
    torch.set_num_threads(1)
    hush()
    config = cfg.Stage2(
        out=str(folder / "run"),
        stage1=str(folder / "stage1"),
        data=cfg.TrainingDataConfig(sets=[str(folder / "set")], labels=SIX_EMOTIONS, val_split=None, workers=0),
        llm=cfg.LLMConfig(pretrained=str(folder / "llm")),
        train=cfg.TrainConfig(global_batch=4, micro_batch=2, steps=1),
    )  # by ds_configs/cpu.json, which is ZeRO-3
    rows = []
    with preempt.listen() as flag:
        setup = look_ahead(config, distributed.discover())
        with started(setup):
            run = load(setup, flag)
            for data in run.batches(0, START, set()):
                run.stage.step(run.engine, data.batches, 0.0)
            run.ended = {"exported_step": run.total}
            for shard in shards:
                distributed.barrier()
                with Peak().watched() as peak:
                    export_model(run, {}, shard_bytes=shard)
                    distributed.barrier()
                most = max(distributed.gather(peak.mib))
                written = [file.stat().st_size for file in (folder / "run/export").rglob("*.safetensors")]
                largest = max(written) / 2**20
                name = f"files of {shard / 2**20:.0f} MiB" if shard < WHOLE else "one file"
                rows.append({"name": name, "shard_mib": largest, "peak_mib": most, "ratio": most / largest})
            if number == 0:
                write_json(folder / "rows.json", {"rows": rows, "model_mib": sum(written) / 2**20})
            distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed keeps the group, whose threads may outlive it


def main() -> None:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--shard-mib", type=float, default=128, help="of a file (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a small model, to try the tool")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_export-") as name:
        folder = Path(name)
        prepare(folder, options.small)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc gives each freed tensor back, and keeps none to reuse
        sizes = [round(options.shard_mib * 2**20), WHOLE]
        torch.multiprocessing.spawn(rank, (distributed.free_port(), folder, sizes), RANKS)
        result = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    print(f"{'':<20}{'largest file, MiB':>19}{'peak, MiB':>11}{'ratio':>7}")
    for row in result["rows"]:
        print(f"{row['name']:<20}{row['shard_mib']:>19.1f}{row['peak_mib']:>11.1f}{row['ratio']:>7.2f}")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
