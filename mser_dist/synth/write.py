"""The synthetic set as shards: `synth` speaks, `shards` keeps."""

import os
from dataclasses import asdict
from pathlib import Path

from mser_dist.audio import encode, peak
from mser_dist.shards import index as shard_index
from mser_dist.shards.writer import DatasetWriter
from mser_dist.synth.speech import CORPUS, EMOTIONS, SAMPLE_RATE, SynthConfig, generate


def write_set(out: Path, config: SynthConfig, *, overwrite: bool = False) -> None:
    """Synthesise a set into the folder `out`, on all cores, with a progress bar. Raises `UserError` on a full disk."""
    made_by = {"command": "mser synth", **asdict(config)}
    with DatasetWriter(out, CORPUS, made_by, labels=set(EMOTIONS), overwrite=overwrite) as writer:
        for key, samples, record in generate(config, workers=len(os.sched_getaffinity(0)), progress=True):
            data = encode(samples, SAMPLE_RATE, "flac")
            writer.write(
                str(record["split"]), key, data, "flac", record, shard_index.sound(samples), peak(samples / 32768)
            )
