"""The memory that loading a pretrained LLM takes under ZeRO-3: python tools/bench_load.py --json FILE [--mib 1024]

Two ranks over gloo load a Llama of `--mib` MiB in bfloat16 from safetensors files, as a training, LoRA and an
evaluation do (`models/partitioned.py`), and beside it as transformers itself does under ZeRO-3. Rows of {"rows":
[{name, peak_mib, ratio, seconds}]}:

- peak_mib: the most anonymous memory (what cannot be dropped and read again, as mapped pages of a file can) that a rank
  had while it loaded, less what it had before: of the rank where that is most
- ratio: peak_mib to the size of the model, of which a rank holds a half
- seconds: until both had loaded
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mser_dist import config as cfg
from mser_dist import deepspeed_module
from mser_dist.config import SIX_EMOTIONS
from mser_dist.files import write_json
from mser_dist.models import partitioned
from mser_dist.models.attention import Attention
from mser_dist.models.llm import build_llm
from mser_dist.models.small_llm import small_tokenizer
from mser_dist.quiet import hush
from mser_dist.ranks import distributed
from tools.bench_export import LLAMA, Peak

RANKS = 2
ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True},
}  # fmt: skip


def prepare(folder: Path, mib: float) -> float:
    """Write a Llama of about so many MiB in bfloat16, in several files; returns how many it is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = small_tokenizer(SIX_EMOTIONS)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    per_layer = 12.4 * LLAMA["hidden_size"] ** 2 * 2 / 2**20  # MiB
    layers = max(1, round((mib - 2 * 16) / per_layer))
    with torch.device("meta"):
        outline = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **special, "num_hidden_layers": layers}))
    state = {name: torch.full(fact.shape, 0.01, dtype=torch.bfloat16) for name, fact in outline.state_dict().items()}
    size = sum(tensor.nbytes for tensor in state.values())
    outline.to(torch.bfloat16).save_pretrained(folder, state_dict=state, max_shard_size="300MB")
    tokenizer.save_pretrained(folder)
    return size / 2**20


def load(folder: str, by_transformers: bool = False) -> tuple[Any, float, float]:
    """(the LLM, MiB at the peak, seconds) on this rank, in a gloo group that stands."""
    own = partitioned.load
    if by_transformers:
        partitioned.load = lambda *arguments, **options: None
    try:
        distributed.barrier()
        began = time.monotonic()
        with Peak().watched() as peak:
            sdpa = Attention("sdpa", "the benchmark")
            llm, _ = build_llm(cfg.LLMConfig(pretrained=folder), SIX_EMOTIONS, sdpa, ZERO3, torch.bfloat16)
            distributed.barrier()
        return llm, peak.mib, time.monotonic() - began
    finally:
        partitioned.load = own


def rank(number: int, port: int, folder: Path) -> None:
    """One of the processes: both ways, one after the other; rank 0 writes the rows."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    hush()
    distributed.init(distributed.discover(), timeout_minutes=5, device="cpu")
    deepspeed_module.module().zero  # noqa: B018  imported before memory is looked at
    rows = []
    for how in ("each rank its part", "transformers"):
        _, mib, seconds = load(str(folder / "llm"), how == "transformers")
        gc.collect()
        rows.append(
            {"name": how, "peak_mib": max(distributed.gather(mib)), "seconds": max(distributed.gather(seconds))}
        )
    if number == 0:
        write_json(folder / "rows.json", rows)
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed keeps the group, whose threads may outlive it


def main() -> None:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--mib", type=float, default=1024, help="of the model (default: %(default)s)")
    options = parser.parse_args()
    hush()
    with tempfile.TemporaryDirectory(prefix="bench_load-") as name:
        folder = Path(name)
        size = prepare(folder / "llm", options.mib)
        torch.multiprocessing.spawn(rank, (distributed.free_port(), folder), RANKS)
        rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    for row in rows:
        row["ratio"] = row["peak_mib"] / size
    print(f"{f'{size:.0f} MiB on {RANKS} ranks':<25}{'peak, MiB':>11}{'ratio':>7}{'seconds':>9}")
    for row in rows:
        print(f"{row['name']:<25}{row['peak_mib']:>11.1f}{row['ratio']:>7.2f}{row['seconds']:>9.1f}")
    if options.json:
        write_json(options.json, {"rows": rows, "model_mib": size})


if __name__ == "__main__":
    main()
