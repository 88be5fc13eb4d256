"""Folder trees as each publisher lays them out, through the parsers and `mser pack`."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from mser_dist.cli import main as cli
from mser_dist.corpora.pack import pack
from mser_dist.corpora.parsers import CORPORA
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet

MELD_HEAD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n"
DUSHA_HEAD = (
    "hash_id\taudio_path\tduration\tannotator_emo\tgolden_emo\tspeaker_text\tspeaker_emo\tsource_id\tannotator_id\n"
)
MSP_HEAD = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n"


def wave(seed: int) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(seed).uniform(-0.3, 0.3, 1600), 16000, format="WAV")
    return data.getvalue()


TREES: dict[str, dict[str, str]] = {  # corpus → file → its text; a recording where that is empty
    "aesdd": {"anger/a03 (3).wav": "", "fear/f10 (05).wav": ""},
    "ased": {"05Angry/a5-06-02-02-60.wav": "", "02Fearful/f2-04-02-02-65.wav": "", "S4-04-02-01-29.wav": ""},
    "cafe": {"Peur/Fort/12-P-2-5.wav": "", "Colère/01-C-1-1.wav": ""},
    "casia": {"liuchanhg/angry/201.wav": "", "ZhaoZuoxiang/angry/201.wav": ""},
    "cremad": {"AudioWAV/1001_DFA_ANG_XX.wav": "", "AudioWAV/1076_MTI_SAD_XX.wav": ""},
    "dusha": {
        "crowd_train/raw_crowd_train.tsv": DUSHA_HEAD
        + "".join(
            f"aa\twavs/aa.wav\t2.1\t{heard}\t\tпривет\tpositive\ts1\t{i}\n"
            for i, heard in enumerate(["angry", "sad", "angry"])
        )
        + "".join(f"bb\twavs/bb.wav\t2.1\t{heard}\t\t\tsad\ts2\t{i}\n" for i, heard in enumerate(["sad", "neutral"]))
        + "cc\twavs/cc.wav\t2.1\tsad\tpositive\t\t\ts2\t9\n",
        "crowd_train/wavs/aa.wav": "",
        "crowd_train/wavs/bb.wav": "",
        "crowd_train/wavs/cc.wav": "",
        "podcast_test/raw_podcast_test.tsv": DUSHA_HEAD + "dd\twavs/dd.wav\t2.1\tneutral\t\t\t\tp1\t1\n",
        "podcast_test/wavs/dd.wav": "",
    },
    "emodb": {"wav/03a01Wa.wav": "", "wav/16b10Lb.wav": ""},
    "emovdb": {"bea_Amused/amused_1-15_0001.wav": "", "sam/Disgusted/disgust_1-28_0001.wav": ""},
    "emovo": {"f2/gio-f2-b2.wav": "", "m1/pau-m1-d1.wav": ""},
    "esd": {"0001/Angry/0001_000351.wav": "", "0011/Surprise/test/0011_001401.wav": ""},
    "iemocap": {
        "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt": "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n"
        "[10.0 - 11.3]\tSes01F_impro01_M001\texc\t[2.5, 2.5, 2.5]\n"
        "[12.0 - 13.3]\tSes01F_impro01_M002\txxx\t[2.5, 2.5, 2.5]\n",
        "Session1/dialog/transcriptions/Ses01F_impro01.txt": "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.\n",
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav": "",
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M001.wav": "",
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M002.wav": "",
    },
    "jl": {"Raw JL corpus/JL(wav+txt)/male2_concerned_6b_1.wav": "", "JL/female1_angry_1a_2.wav": ""},
    "meld": {
        "train_sent_emo.csv": MELD_HEAD + '1,"Well, no.",Ross,joy,positive,0,0,8,21,"00:16:16,059","00:16:21,731"\n'
        "2,Silence,Joey,anger,negative,125,3,8,21,0,1\n",
        "dev_sent_emo.csv": MELD_HEAD + "1,Oh.,Phoebe,sadness,negative,0,0,4,7,0,1\n",
        "test_sent_emo.csv": MELD_HEAD + "1,What?,Mark,surprise,positive,0,0,4,7,0,1\n",
        "train_splits/dia0_utt0.wav": "",
        "dev_splits_complete/dia0_utt0.wav": "",
        "output_repeated_splits_test/dia0_utt0.wav": "",
    },
    "mesd": {"Anger_F_A_tarde.wav": "", "Happiness_C_B_buenos dias.wav": ""},
    "msp-podcast": {
        "Labels/labels_consensus.csv": MSP_HEAD + "MSP-PODCAST_0001_0008.wav,H,4.2,4.4,5.2,127,Male,Train\n"
        "MSP-PODCAST_0001_0019.wav,X,4,4,5,127,Male,Development\n"
        "MSP-PODCAST_0002_0033.wav,C,4,4,5,Unknown,Female,Test1\n",
        "Audios/MSP-PODCAST_0001_0008.wav": "",
        "Audios/MSP-PODCAST_0001_0019.wav": "",
        "Audios/MSP-PODCAST_0002_0033.wav": "",
    },
    "nemo": {"samples/TP0_anger_10.wav": "", "samples/SB0_surprised_3.wav": ""},
    "ravdess": {"Actor_12/03-01-02-01-02-01-12.wav": "", "Actor_07/03-01-08-02-01-02-07.wav": ""},
    "savee": {"DC/sa01.wav": "", "JE/sa01.wav": ""},
    "shemo": {"male/M36S02.wav": "", "female/F07F01.wav": ""},
    "subesco": {"F_02_MONIKA_S_4_ANGRY_1.wav": "", "M_11_OISHI_S_10_SURPRISE_5.wav": ""},
    "tess": {"TESS/OAF_lid_fear.wav": "", "TESS/YAF_dog_ps.wav": ""},
    "turev": {"Sound Source/Angry/1157_kz_acik.wav": "", "Sound Source/Calm/6783_sa_acik.wav": ""},
    "urdu": {"Neutral/SM20_F8_N012.wav": "", "Angry/SF3_F1_A01.wav": ""},
}
EXPECTED = {  # label, language, speaker, gender, split of each clip
    "aesdd": ["anger el 3 None None", "fear el 5 None None"],
    "ased": ["anger am 60 male None", "fear am 65 male None", "sad am 29 female None"],
    "cafe": ["anger fr 01 None None", "fear fr 12 None None"],
    "casia": ["anger zh ZhaoZuoxiang None None", "anger zh liuchanhg None None"],
    "cremad": ["anger en 1001 None None"],
    "dusha": ["None ru s2 None train", "anger ru s1 None train", "happy ru s2 None train", "neutral ru p1 None test"],
    "emodb": ["anger de 03 male None", "boredom de 16 female None"],
    "emovdb": ["amusement en bea female None", "disgust en sam male None"],
    "emovo": ["fear it m1 male None", "happy it f2 female None"],
    "esd": ["anger zh 0001 None None", "surprise en 0011 None None"],
    "iemocap": ["None en Ses01M male None", "excitement en Ses01M male None", "neutral en Ses01F female None"],
    "jl": ["anger en female1 female None", "concern en male2 male None"],
    "meld": ["happy en Ross None train", "sad en Phoebe None val", "surprise en Mark None test"],
    "mesd": ["anger es F female None", "happy es C None None"],
    "msp-podcast": [
        "None en 127 male val",
        "contempt en MSP-PODCAST_0002_0033.wav female test",
        "happy en 127 male train",
    ],
    "nemo": ["anger pl TP0 None None", "surprise pl SB0 None None"],
    "ravdess": ["calm en 12 female None", "surprise en 07 male None"],
    "resd": ["happy ru 32_h None train", "fear ru 7_f None test"],
    "savee": ["sad en DC male None", "sad en JE male None"],
    "shemo": ["fear fa F07 female None", "sad fa M36 male None"],
    "subesco": ["anger bn F_02_MONIKA female None", "surprise bn M_11_OISHI male None"],
    "tess": ["fear en OAF female None", "surprise en YAF female None"],
    "turev": ["anger tr 1157 None None", "calm tr 6783 None None"],
    "urdu": ["anger ur SF3 female None", "neutral ur SM20 male None"],
}


def lay_out(corpus: str, folder: Path) -> Path:
    if corpus == "resd":
        folder.mkdir()
        for part, name, emotion in (
            ("train", "32_happiness_enthusiasm_h_120", "happiness"),
            ("test", "7_fear_neutral_f_10", "fear"),
        ):
            speech = [{"bytes": wave(len(name)), "path": f"{name}.wav"}]
            table = pa.table({"name": [name], "path": [f"{name}.wav"], "emotion": [emotion], "speech": speech})
            pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")
    for number, (name, text) in enumerate(TREES.get(corpus, {}).items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() or wave(number))
    return folder


def test_every_corpus_is_laid_out_here() -> None:
    assert EXPECTED.keys() == CORPORA.keys() - {"manifest"} == TREES.keys() | {"resd"}


@pytest.mark.parametrize("corpus", EXPECTED)
def test_a_tree_as_published_is_packed(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lay_out(corpus, tmp_path / "source")
    clips = list(CORPORA[corpus].parse(folder))
    facts = [f"{clip.label} {clip.language} {clip.speaker} {clip.gender} {clip.split}" for clip in clips]
    assert sorted(facts) == sorted(EXPECTED[corpus])
    assert len({clip.id for clip in clips}) == len(clips)
    summary = pack(corpus, folder, tmp_path / "set", split="test", workers=1, progress=False)
    assert summary["clips"] == sum(clip.label is not None for clip in clips) == len(ShardSet.open(tmp_path / "set"))
    warned = f"{corpus}: {len(clips)} of the {CORPORA[corpus].clips} clips" in capsys.readouterr().err
    assert warned == (CORPORA[corpus].clips is not None)


@pytest.mark.parametrize("corpus", EXPECTED)
def test_a_folder_of_something_else_is_named(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_bytes(wave(0))
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1, or so it says")
    with pytest.raises(UserError) as caught:
        list(CORPORA[corpus].parse(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_help_shows_each_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["pack", "--help"])
    shown = capsys.readouterr().out.splitlines()
    for name, corpus in CORPORA.items():
        assert any(line.split()[:1] == [name] and corpus.layout in line for line in shown)
    assert max(map(len, shown)) <= 130


def test_a_row_group_of_a_parquet_file_is_found(tmp_path: Path) -> None:
    names = [f"{number}_joy_joy_j_1" for number in range(7)]
    speech = [{"bytes": wave(number), "path": None} for number in range(7)]
    table = pa.table({"name": names, "emotion": ["радость"] * 7, "speech": speech})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=3)
    pack("resd", tmp_path, tmp_path / "set", workers=1, progress=False, audio_format="wav")
    shards = ShardSet.open(tmp_path / "set")
    for i in range(7):
        sound, _ = soundfile.read(io.BytesIO(shards.read(i).audio), dtype="int16")
        own, _ = soundfile.read(io.BytesIO(wave(int(shards.key(i).split("_")[2]))), dtype="int16")
        assert np.abs(sound.astype(int) - own).max() <= 1


def test_a_word_can_be_mapped_in_any_corpus(tmp_path: Path) -> None:
    folder = lay_out("iemocap", tmp_path / "source")
    pack("iemocap", folder, tmp_path / "set", words={"Excitement": "happy"}, split="test", workers=1, progress=False)
    assert Counter(ShardSet.open(tmp_path / "set").column("label")) == {"happy": 1, "neutral": 1}
    with pytest.raises(UserError, match="--map exc=…: no clip has this emotion; there are excitement"):
        pack("iemocap", folder, tmp_path / "other", words={"exc": "happy"}, split="test", workers=1, progress=False)
