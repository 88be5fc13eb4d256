"""Statistics that take the difference between corpora out of features: whose they are, and where clips are few."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.config.validate import check_values
from mser_dist.encoded.encode import encode_once
from mser_dist.encoded.measure import bind, describe, statistics_of
from mser_dist.errors import UserError
from mser_dist.models import exported, publish
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.normalize import OVERALL, Statistics, corpora_of, shrunk, speakers_of
from mser_dist.models.speech import build_speech
from mser_dist.ranks.distributed import World
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples, pad_speech

SDPA = Attention("sdpa", "for the test")
ARCH = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
QFORMER = cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2)
LABELS = ["anger", "disgust", "fear", "happy", "neutral", "sad"]


def built(**changes: Any) -> Any:
    torch.manual_seed(0)
    return build_speech(cfg.EncoderConfig(arch=ARCH, freeze=True, **changes), QFORMER, SDPA)


@pytest.fixture(scope="module")
def clips(tiny_set: Path) -> Examples:
    shards = ShardSet.open(tiny_set, split="train", sound=True)
    return Examples(shards, LABELS, built().any_encoder.features)


@pytest.fixture(scope="module")
def features(clips: Examples) -> list[NDArray[np.float64]]:
    """(T, L, D) of each clip, by the encoder itself."""
    found = []
    for i in range(len(clips)):
        batch = pad_speech([clips.get(i, 0)])
        found += [x.double().numpy() for x in built().frozen(batch["speech"], batch["lengths"])]
    return found


def measured(clips: Examples, mode: str, parent: Statistics | None = None) -> Statistics:
    return statistics_of(clips, built().frozen, mode, World(), parent=parent)


@pytest.mark.parametrize("kept", [False, True], ids=["encoded-anew", "from-the-cache"])
def test_a_corpus_has_the_mean_and_spread_of_its_frames(
    clips: Examples, features: list[NDArray[np.float64]], kept: bool, tmp_path: Path
) -> None:
    if kept:
        encode_once(clips, built().frozen, cfg.CacheConfig(cache="disk", cache_dir=str(tmp_path)), World())
    found = measured(clips, "corpus")
    clips.encoded = None
    names = corpora_of(clips.shards)
    assert set(found.clips) == {OVERALL, *names} and len(set(names)) == 2
    own = {}
    for name in set(names):
        mine = [x for x, of in zip(features, names, strict=True) if of == name]
        mean = np.mean([x.mean(0) for x in mine], 0)
        own[name] = (mean, np.mean([np.square(x).mean(0) for x in mine], 0) - mean**2, len(mine))
    overall = [np.mean([part[i] for part in own.values()], 0) for i in (0, 1)]
    for name, (mean, var, n) in own.items():
        row = list(found.clips).index(name)
        assert found.clips[name] == n
        share = n / (n + 10)
        np.testing.assert_allclose(found.mean[row], share * mean + (1 - share) * overall[0], atol=1e-5)
        np.testing.assert_allclose(found.std[row] ** 2, share * var + (1 - share) * overall[1], rtol=1e-5, atol=0)


def test_overall_is_of_all_clips_whatever_their_corpus(clips: Examples, features: list[NDArray[np.float64]]) -> None:
    found = measured(clips, "overall")
    assert set(found.groups(clips.shards)) == {list(found.clips).index(OVERALL)}
    mean = np.mean([x.mean(0) for x in features], 0)
    spread = np.sqrt(np.mean([np.square(x).mean(0) for x in features], 0) - mean**2)
    row = list(found.clips).index(OVERALL)
    np.testing.assert_allclose(found.mean[row], mean, atol=1e-5)
    np.testing.assert_allclose(found.std[row], spread, rtol=1e-5)
    assert found.clips[OVERALL] == len(clips)


def test_a_normalised_corpus_is_near_zero_mean_and_unit_spread(
    clips: Examples, features: list[NDArray[np.float64]]
) -> None:
    found = measured(clips, "corpus")
    group = found.groups(clips.shards)
    x = [
        found.apply(torch.from_numpy(x).float()[None], torch.tensor([g]))[0].numpy()
        for x, g in zip(features, group, strict=True)
    ]
    for name in set(corpora_of(clips.shards)):
        mine = [part for part, of in zip(x, corpora_of(clips.shards), strict=True) if of == name]
        assert np.abs(np.mean([part.mean(0) for part in mine], 0)).mean() < 0.1
        # A corpus of 24 clips has 10 / 34 of the whole in its statistics, so that it is near and not there.
        assert np.mean([np.square(part).mean(0) for part in mine]) == pytest.approx(1, abs=0.15)


def made(counts: list[int], mode: str = "speaker", parent: Statistics | None = None) -> Statistics:
    """Groups a de/s0, a de/s1, b it of so many clips, with means 1, 2, 4 and variances of 1."""
    mean = np.array([1.0, 2.0, 4.0])[:, None, None]
    return shrunk(mode, ["a de/s0", "a de/s1", "b it"], np.array(counts), mean, mean**2 + 1, parent)


def test_few_clips_are_drawn_to_the_corpus_and_that_to_all() -> None:
    many = made([10**6, 10**6, 10**6])
    by_name = dict(zip(many.clips, many.mean[:, 0, 0].tolist(), strict=True))
    assert by_name == pytest.approx({OVERALL: 2.75, "a de": 1.5, "b it": 4, "a de/s0": 1, "a de/s1": 2}, abs=1e-4)
    ten = made([10, 10**6, 10**6])
    mean = dict(zip(ten.clips, ten.mean[:, 0, 0].tolist(), strict=True))
    assert mean["a de/s0"] == pytest.approx((1 + mean["a de"]) / 2, abs=1e-4), "as many clips as drawn to: halfway"
    one = made([1, 10**6, 1])
    mean = dict(zip(one.clips, one.mean[:, 0, 0].tolist(), strict=True))
    assert mean["a de/s0"] == pytest.approx((1 + 10 * mean["a de"]) / 11, abs=1e-4), "a speaker of one clip"
    assert mean["b it"] == pytest.approx((4 + 10 * mean[OVERALL]) / 11, abs=1e-4), "a corpus of one clip"
    assert torch.isfinite(one.std).all() and (one.std > 0).all()


def test_test_clips_of_an_unknown_corpus_are_drawn_to_training() -> None:
    trained = made([10**6, 10**6, 10**6], "corpus")
    mean = np.full((1, 1, 1), 100.0)
    adapted = shrunk("corpus", ["new pl"], np.array([10]), mean, mean**2 + 1, trained)
    assert adapted.clips == {OVERALL: 3 * 10**6, "new pl": 10}
    assert adapted.mean[:, 0, 0].tolist() == pytest.approx([2.75, (100 + 2.75) / 2], abs=1e-3)


def test_a_clip_is_of_its_speaker_else_of_its_corpus_else_of_all(clips: Examples) -> None:
    by_speaker = measured(clips, "speaker")
    names = list(by_speaker.clips)
    assert [names[g] for g in by_speaker.groups(clips.shards)] == speakers_of(clips.shards)
    kept = by_speaker.without_speakers()
    assert not any("/" in name for name in kept.clips) and "speakers" in describe(by_speaker)
    names = list(kept.clips)
    assert [names[g] for g in kept.groups(clips.shards)] == corpora_of(clips.shards)
    other = Statistics("corpus", {OVERALL: 1, "else xx": 1}, torch.zeros(2, 1, 16), torch.ones(2, 1, 16))
    assert set(other.groups(clips.shards)) == {0}


def test_a_model_keeps_its_statistics_in_the_export(clips: Examples, tmp_path: Path) -> None:
    speech = built(normalize="speaker")
    speech.statistics = measured(clips, "speaker")
    bind(clips, speech.statistics)
    batch = clips.grouped(pad_speech([clips.get(i, 0) for i in range(4)]))
    given = speech.prepared(batch, "cpu")
    plain = built().prepared(batch, "cpu")
    assert not torch.equal(given["speech"], plain["speech"])
    model = Aligner(speech, 4, cfg.ContrastiveConfig(width=8)).eval()
    card = {"stage": 1, "labels": LABELS, "text_width": 4, **exported.aligner_card(model)}
    publish.write(tmp_path / "export", model, model.state_dict(), card)
    again = exported.load_aligner(tmp_path / "export", SDPA).speech
    assert again.normalize == "speaker" and isinstance(again.frozen, FrozenEncoder)
    assert again.statistics is not None and "" in again.statistics.clips
    assert not any("/" in name for name in again.statistics.clips), "no speaker is named in an export"
    row, kept = list(again.statistics.clips), speech.statistics.without_speakers()
    assert row == list(kept.clips) and torch.equal(again.statistics.mean, kept.mean)
    clips.group = None
    (tmp_path / "export" / exported.STATISTICS).unlink()
    with pytest.raises(UserError, match=r"statistics.safetensors is missing: the export is damaged"):
        exported.load_aligner(tmp_path / "export", SDPA)


def test_only_a_frozen_encoders_features_are_normalised() -> None:
    config = cfg.Stage1(encoder=cfg.EncoderConfig(normalize="corpus"))
    config.data.sets = ["somewhere"]
    check_values(config)
    with pytest.raises(UserError, match=r"encoder.normalize=corpus is by statistics of a frozen encoder's features"):
        config.check()
