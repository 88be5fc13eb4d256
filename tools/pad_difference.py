"""How far an encoder's features of a clip as it is are from those of the same clip padded with silence to 30 seconds.

    python tools/pad_difference.py SHARDS [--run RUN] [--clips 32] [--json FILE]

RUN: the folder of a finished stage 1 with a Whisper-type encoder (trained as its config says); without it, an encoder
of Whisper-tiny's shape with random weights. Cosine similarities; 1: no difference.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from mser_dist import config as cfg
from mser_dist.models import exported
from mser_dist.models.attention import Attention
from mser_dist.models.speech import build_speech
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features

TINY = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}


@torch.inference_mode()
def measure(shards: Path, run: str | None, count: int) -> dict[str, float]:
    """Mean cosines over the first `count` clips of the training split."""
    torch.manual_seed(0)
    attention = Attention("sdpa", "for the measurement")
    if run:
        model = exported.load_speech(exported.find(run, stage=1), attention)
    else:
        model = build_speech(cfg.EncoderConfig(arch=TINY), cfg.QFormerConfig(), attention)
    model.eval()
    encoder = model.any_encoder
    opened = ShardSet.open(shards, split="train")
    labels = [name for name in opened.coded["label"].names if name]
    waves = Examples(ShardSet.open(shards, split="train", labels=labels), labels, Features(n_mels=None))
    rows = []
    for i in range(min(count, len(waves))):
        wave = waves.get(i, 0).speech
        frames, tokens = [], []
        for pad_seconds in (None, 30.0):
            encoder.pad_seconds = pad_seconds
            mel = torch.from_numpy(encoder.features(wave))[None]
            lengths = torch.tensor([encoder.features.own(len(wave))])
            frames.append(encoder(mel, lengths)[0][0].flatten(1).mean(0))  # (D,) over the clip's own frames
            tokens.append(model(mel, lengths).flatten())  # (Q · width,)
        pairs = {"own_frames": tuple(frames), "qformer_tokens": tuple(tokens)}
        rows.append([cosine(*pair) for pair in pairs.values()])
    means = torch.tensor(rows).mean(0).tolist()
    return dict(zip(pairs, means, strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="a data set")
    parser.add_argument("--run", help="run folder of a stage 1 (default: random weights)")
    parser.add_argument("--clips", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    row = measure(options.shards, options.run, options.clips)
    print("cosine of unpadded and padded: ", ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
