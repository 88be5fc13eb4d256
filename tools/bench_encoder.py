"""How much a Whisper encoder gains when 3-second clips are not padded to 30 seconds: one table, one JSON row.

    python tools/bench_encoder.py [--seconds 3] [--rounds 7] [--json FILE]

Both ways run in turn in one process on the same clips and weights (random ones: the time does not depend on them).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mser_dist.models.whisper import SpeechEncoder


def seconds(work: Callable[[], torch.Tensor]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@torch.inference_mode()
def measure(length: float, rounds: int, batch: int) -> dict[str, float]:
    """Median CPU seconds of a forward pass over `batch` clips of `length` seconds, padded and not, and their ratio.

    One thread computes: several would wait for each other busily, and that wait would be measured.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Whisper-tiny's shape (arXiv 2212.04356, table 1)
    arch = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
    whisper = WhisperEncoder(WhisperConfig(**arch, attn_implementation="sdpa")).eval()
    ours = SpeechEncoder(whisper).eval()
    frames = round(length * 100)
    mel = torch.randn(batch, 80, frames)
    lengths = torch.full((batch,), frames)
    padded = torch.nn.functional.pad(mel, (0, 3000 - frames))
    times: dict[str, list[float]] = {"ours": [], "padded": []}
    for _ in range(rounds + 1):
        times["ours"].append(seconds(lambda: ours(mel, lengths)[0]))
        times["padded"].append(seconds(lambda: whisper(padded).last_hidden_state))
    ours_s, padded_s = (statistics.median(times[name][1:]) for name in ("ours", "padded"))  # the first warms up
    return {"seconds": length, "batch": batch, "ours_s": ours_s, "padded_s": padded_s, "ratio": padded_s / ours_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the clips (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, after one to warm up (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="clips a forward pass (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the row to this file")
    options = parser.parse_args()
    row = measure(options.seconds, options.rounds, options.batch)
    print(f"clips of {row['seconds']:g} s: {row['ours_s']:.3f} s CPU a forward pass", end="")
    print(f", padded to 30 s {row['padded_s']:.3f} s: ratio {row['ratio']:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"encoder": row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
