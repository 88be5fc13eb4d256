"""What `import mser_dist` offers: lazily, and a set of shards as a torch dataset."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import mser_dist
from mser_dist import audio
from mser_dist.config import Evaluation, Stage1
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.dataset import ClipDataset
from mser_dist.stream.features import Features
from tests.unit.made_up_set import LANGUAGES, meta, pcm

ROOT = Path(__file__).parents[2]


# ---- the names


def test_the_import_loads_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys; before = set(sys.modules); import mser_dist; print(*sorted(set(sys.modules) - before))\n"
        "assert {'train', 'evaluate', 'load_config', 'load_model', 'open_set'} <= set(dir(mser_dist))\n"
        "mser_dist.load_config; print(*sorted(set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    first, second = (set(line.split()) for line in done.stdout.splitlines())
    assert {name for name in first if not name.startswith("importlib")} <= {"mser_dist", "warnings"}
    assert not second & {"torch", "numpy", "deepspeed", "transformers", "mlflow", "soundfile"}, "a config needs none"


def test_every_name_is_there_and_an_unknown_one_is_told() -> None:
    from mser_dist.contrastive import contrastive_loss

    assert mser_dist.contrastive_loss is contrastive_loss
    assert all(callable(getattr(mser_dist, name)) for name in mser_dist.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="it offers contrastive_loss, evaluate"):
        mser_dist.trian  # type: ignore[attr-defined]  # noqa: B018


def test_a_config_by_words_by_a_mapping_and_with_a_mistake() -> None:
    by_words = mser_dist.load_config("demo_stage1", ["data.sets=a,b", "train.lr=3e-4", "out=runs/größer"])
    changes = {"data.sets": ["a", "b"], "train.lr": 3e-4, "out": Path("runs/größer")}
    assert mser_dist.load_config("demo_stage1", changes) == by_words
    assert isinstance(by_words, Stage1) and by_words.train.lr == 3e-4 and by_words.out == "runs/größer"
    evaluation = mser_dist.load_config("demo_eval", {"stage1": "r", "stage2": None, "data.sets": ["a"]})
    assert isinstance(evaluation, Evaluation) and evaluation.stage2 is None
    with pytest.raises(UserError, match=r"did you mean train\.lr"):
        mser_dist.load_config("demo_stage1", {"train.lrr": 1})
    with pytest.raises(UserError, match=r"write \['out=x'\]"):
        mser_dist.load_config("demo_stage1", "out=x")


def test_a_config_of_the_other_kind_is_refused_at_once() -> None:
    training = mser_dist.load_config("demo_stage1", {"data.sets": ["a"]})
    evaluation = mser_dist.load_config("demo_eval", {"stage1": "r", "data.sets": ["a"]})
    with pytest.raises(UserError, match=r"not Stage1: give it to mser_dist\.train"):
        mser_dist.evaluate(training)
    with pytest.raises(UserError, match=r"not Evaluation: give it to mser_dist\.evaluate"):
        mser_dist.train(evaluation)
    with pytest.raises(UserError, match="takes the config of a training, not dict"):
        mser_dist.train({"stage": 1})  # type: ignore[arg-type]


# ---- open_set


def test_a_clip_is_what_was_packed(finished: Path) -> None:
    clips = mser_dist.open_set(finished)
    assert len(clips) == 20 and clips.labels == ["happy"]
    for i in range(len(clips)):
        number = int(clips[i]["key"][1:])
        assert clips[i]["audio"].dtype == torch.float32
        np.testing.assert_array_equal(clips[i]["audio"].numpy(), pcm(number).astype(np.float32) / 32768)
        told = {
            name: clips[i][name] for name in ("emotion", "label", "language", "speaker", "corpus", "text", "gender")
        }
        assert told == {name: meta(number)[name] for name in told}
        assert clips[i]["target"] == (0 if number % 2 else -1)
        assert clips[i]["duration"] == pytest.approx(len(pcm(number)) / 16000)
        assert clips[i]["split"] == ("test" if number % 5 == 0 else "train")
    columns = clips.columns()
    assert {len(column) for column in columns.values()} == {20}
    assert columns["key"].tolist() == [clips[i]["key"] for i in range(20)]
    assert columns["target"].tolist() == [clips[i]["target"] for i in range(20)]


def test_filters_and_the_order_of_labels(finished: Path) -> None:
    assert len(mser_dist.open_set(finished, split="test")) == 4
    assert len(mser_dist.open_set([finished], languages=["de", "fr"])) == sum(
        LANGUAGES[i % 3] != "el" for i in range(20)
    )
    happy = mser_dist.open_set(finished, labels="happy", languages="el", drop={"speaker": ["s1"]})
    assert {clip["label"] for clip in happy} == {"happy"} and {clip["speaker"] for clip in happy} == {"s3"}
    short = mser_dist.open_set(finished, keep={"duration": [0, 0.101]})
    assert [clip["key"] for clip in short] == ["k00", "k01"]


def test_features_instead_of_sound(finished: Path) -> None:
    sound, mel = mser_dist.open_set(finished), mser_dist.open_set(finished, features="log-mel")
    assert "audio" not in mel[3]
    np.testing.assert_array_equal(mel[3]["features"].numpy(), audio.log_mel(sound[3]["audio"].numpy()))
    padded = mser_dist.open_set(finished, features=Features(n_mels=128, pad_seconds=1.0))
    assert padded[0]["features"].shape == (128, 100)


def test_numbers_as_a_list_takes_them(finished: Path) -> None:
    clips = mser_dist.open_set(finished)
    assert clips[-1]["key"] == clips[19]["key"] == clips[np.int64(19)]["key"]
    for outside in (20, -21):
        with pytest.raises(IndexError, match=f"clip {outside} of 20"):
            clips[outside]
    with pytest.raises(TypeError, match=r"not slice: .*Subset\(clips"):
        clips[:3]  # type: ignore[index]
    assert len(list(clips)) == 20, "and so a loop over it ends"


@pytest.mark.parametrize(("start", "features"), [("fork", None), ("spawn", "log-mel")])
def test_batches_by_workers_are_those_without(finished: Path, start: str, features: str | None) -> None:
    clips = mser_dist.open_set(finished, features=features)
    clips[0]  # a shard is open when the workers are made
    loader = DataLoader(
        clips, batch_size=6, num_workers=2, collate_fn=ClipDataset.collate, multiprocessing_context=start
    )
    name = "features" if features else "audio"
    keys: list[str] = []
    for batch in loader:
        assert batch[name].shape[-1] == max(batch["lengths"])
        for row, key in enumerate(batch["key"]):
            clip = clips[len(keys)]
            length = int(batch["lengths"][row])
            assert torch.equal(batch[name][row, ..., :length], clip[name]) and not batch[name][row, ..., length:].any()
            assert batch["target"][row] == clip["target"] and batch["text"][row] == "größer"
            keys.append(key)
    assert keys == clips.shards.keys


def test_it_can_be_pickled(finished: Path) -> None:
    clips = mser_dist.open_set(finished, features="log-mel")
    again = pickle.loads(pickle.dumps(clips))
    assert torch.equal(again[7]["features"], clips[7]["features"])


def test_damage_names_the_shard_and_the_clip(copy: Path) -> None:
    clips = mser_dist.open_set(copy)
    shard = Path(clips.shards.shards[int(clips.shards.shard[5])].name)
    ref = ShardSet.open(copy).refs([5])[0]
    content = bytearray(shard.read_bytes())
    content[ref.audio_at + ref.audio_size // 2] ^= 0xFF
    shard.write_bytes(content)
    clips = mser_dist.open_set(copy)
    with pytest.raises(UserError, match=f"{shard.name}: sample {clips.shards.key(5)}: .*damaged"):
        clips[5]
    assert clips[4]["audio"].isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "trian"}, "did you mean train"),
        ({"labels": ["hapy"]}, "no sample has label 'hapy': did you mean happy"),
        ({"languages": "dee"}, "did you mean de"),
        ({"keep": {"language": "de"}, "languages": "de"}, "languages and keep"),
        ({"features": "mfcc"}, "'mfcc' is not known"),
        ({"keep": {"speeker": "s1"}}, "did you mean speaker"),
    ],
)
def test_a_mistake_is_told(finished: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        mser_dist.open_set(finished, **options)  # type: ignore[arg-type]


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        mser_dist.open_set(tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs a folder of shards"):
        mser_dist.open_set([])
