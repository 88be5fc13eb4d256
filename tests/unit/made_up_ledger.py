"""Sets and runs whose ledgers are known, for the tests of what a training heard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mser_dist import audio
from mser_dist.models import exported, publish
from mser_dist.shards.index import sound
from mser_dist.shards.ledger import FILE
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from tests.unit import tiny_exports
from tests.unit.made_up_set import meta, pcm

LABELS = ["happy", "sad"]


def write(out: Path, clips: Mapping[str, tuple[int, dict[str, Any]]], split: str = "train") -> Path:
    """A set of clips: key → (number of its sound, what its json says)."""
    with DatasetWriter(out, out.name, {}) as writer:
        for key, (i, facts) in clips.items():
            told = meta(i, **{"label": LABELS[i % 2], "speaker": f"s{i % 3}", "source_id": f"u{i}", **facts})
            writer.write(split, key, audio.encode(pcm(i), 16000, "flac"), "flac", told, sound(pcm(i)))
    return out


def opened(path: Path, **how: Any) -> ShardSet:
    return ShardSet.open(path, sound=True, **how)


def write_trained(out: Path) -> ShardSet:
    """Twelve clips of three speakers: German of one corpus, and French of another."""
    places = [{"language": "de", "corpus": "a"}, {"language": "fr", "corpus": "b"}]
    return opened(write(out, {f"k{i:02d}": (i, places[i // 6]) for i in range(12)}))


def republish(run: Path) -> None:
    """Export a run again, now that its folder has a ledger."""
    card = exported.read_card(run / "export")
    load = exported.load_aligner if card["stage"] == 1 else exported.load_speech_llm
    loaded: Any = load(run / "export", tiny_exports.SDPA)
    model, tokenizer = loaded if card["stage"] == 2 else (loaded, None)
    state = {name: tensor for name, tensor in model.state_dict().items() if "encoder.encoder" not in name}
    if model.speech.frozen is None:
        state = dict(model.state_dict())
    del card["files"]
    publish.write(run / "export", model, state, card, tokenizer, ledger=run / FILE)
