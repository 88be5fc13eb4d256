import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from mser_dist.corpora.manifest import parse_manifest
from mser_dist.corpora.parsers import CORPORA, parse_emodb, parse_savee
from mser_dist.corpora.recording import Recording, safe_id
from mser_dist.errors import UserError
from mser_dist.shards.emotions import COMMON, to_label


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def facts(clips: Iterable[Recording]) -> list[tuple[str | None, ...]]:
    return [(clip.label, clip.language, clip.speaker, clip.gender) for clip in clips]


@pytest.mark.parametrize(
    ("native", "common"),
    [("Joy", "happy"), ("gio", "happy"), (" Happiness ", "happy"), ("FEARFUL", "fear"), ("злость", "anger")]
    + [(word, None) for word in ("calm", "boredom", "enthusiasm", "contempt", "excited", "xxx")]
    + [(word, word) for word in COMMON],
)
def test_a_label_never_merges_what_is_not_common(native: str, common: str | None) -> None:
    label = to_label(native)
    assert label == common if common else label not in COMMON


def test_to_label_keeps_other_emotions_and_knows_unlabelled() -> None:
    assert (to_label("Bored"), to_label("calm"), to_label("angry"), to_label("xxx")) == (
        "boredom",
        "calm",
        "anger",
        None,
    )
    with pytest.raises(KeyError):
        to_label("angre")


@pytest.mark.parametrize(
    ("corpus", "name", "expected"),
    [
        ("emodb", "03a01Wa.wav", ("anger", "de", "03", "male")),
        ("emodb", "16b10Lb.wav", ("boredom", "de", "16", "female")),
        ("emodb", "08a02Fd.wav", ("happy", "de", "08", "female")),
        ("emodb", "11a05Ad.wav", ("fear", "de", "11", "male")),
        ("emodb", "12b03Td.wav", ("sad", "de", "12", "male")),
        ("emodb", "13a07Ea.wav", ("disgust", "de", "13", "female")),
        ("emodb", "15b09Na.wav", ("neutral", "de", "15", "male")),
        ("ravdess", "Actor_12/03-01-02-01-02-01-12.wav", ("calm", "en", "12", "female")),
        ("ravdess", "03-01-08-02-01-02-07.wav", ("surprise", "en", "07", "male")),
        ("cremad", "1001_DFA_FEA_XX.wav", ("fear", "en", "1001", None)),
        ("aesdd", "anger/a03 (03).wav", ("anger", "el", "3", None)),
        ("aesdd", "fear/f10 (5).wav", ("fear", "el", "5", None)),
        ("shemo", "male/M36S02.wav", ("sad", "fa", "M36", "male")),
        ("shemo", "female/F07F01.wav", ("fear", "fa", "F07", "female")),
        ("emovo", "f2/gio-f2-b2.wav", ("happy", "it", "f2", "female")),
        ("emovo", "m1/pau-m1-d1.wav", ("fear", "it", "m1", "male")),
        ("cafe", "Peur/Fort/12-P-2-5.wav", ("fear", "fr", "12", None)),
        ("cafe", "Tristesse/01-T-1-1.wav", ("sad", "fr", "01", None)),
        ("tess", "OAF_lid_ps.wav", ("surprise", "en", "OAF", "female")),
        ("tess", "YAF_dog_angry.wav", ("anger", "en", "YAF", "female")),
        ("savee", "DC/sa01.wav", ("sad", "en", "DC", "male")),
        ("savee", "JE_su03.wav", ("surprise", "en", "JE", "male")),
        ("savee", "KL/a15.wav", ("anger", "en", "KL", "male")),
    ],
)
def test_names_of_the_corpora(tmp_path: Path, corpus: str, name: str, expected: tuple[str | None, ...]) -> None:
    (clip,) = CORPORA[corpus](touch(tmp_path, name))
    assert facts([clip]) == [expected]
    assert (clip.corpus, clip.path, clip.source_id) == (corpus, tmp_path / name, clip.id)


@pytest.mark.parametrize(
    ("corpus", "left_out", "kept"),
    [
        ("ravdess", "03-02-03-01-01-01-01.wav", "03-01-03-01-01-01-01.wav"),
        ("cremad", "1076_MTI_SAD_XX.wav", "1076_MTI_NEU_XX.wav"),
        ("aesdd", "s05 (3).wav", "s05 (4).wav"),
    ],
)
def test_known_bad_recordings_are_left_out(tmp_path: Path, corpus: str, left_out: str, kept: str) -> None:
    clips = list(CORPORA[corpus](touch(tmp_path, left_out, kept)))
    assert [clip.path.name for clip in clips] == [kept]


def test_savee_names_repeat_between_speakers(tmp_path: Path) -> None:
    clips = list(parse_savee(touch(tmp_path, "DC/a01.wav", "JE/a01.wav", "KL_a01.wav")))
    assert sorted(clip.id for clip in clips) == ["savee_DC_a01", "savee_JE_a01", "savee_KL_a01"]


def test_emodb_knows_its_sentences(tmp_path: Path) -> None:
    (clip,) = parse_emodb(touch(tmp_path, "03a01Wa.wav"))
    assert (clip.id, clip.text, clip.emotion) == ("emodb_03a01Wa", "Der Lappen liegt auf dem Eisschrank.", "anger")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no .wav"),
        (["notes.txt"], "no .wav"),
        (["03a01Xa.wav"], "03a01Xa.wav: not a file name of emodb"),
        (["hello.wav"], "hello.wav: not a file name of emodb"),
        (["x/03a01Wa.wav", "y/03a01Wa.wav"], "is also at"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        list(parse_emodb(touch(tmp_path, *names)))
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(parse_emodb(tmp_path / "nowhere"))


def test_safe_id_is_a_key_and_tells_names_apart() -> None:
    assert safe_id("spk1/a_01") == "spk1_a_01"
    assert safe_id("größe") != safe_id("gräße")
    assert safe_id("x" * 200) != safe_id("x" * 201)
    assert all(len(safe_id(name)) <= 74 and safe_id(name).isascii() for name in ("x" * 200, "../ü", "a b"))


HEADER = "path,emotion,language,speaker"


def test_manifest_csv(tmp_path: Path) -> None:
    touch(tmp_path, "s1/a.wav", "s2/a.wav")
    file = tmp_path / "greek.csv"
    file.write_text(
        f'{HEADER},gender,text,split,source_id,note\ns1/a.wav,Anger,el,s1,F,"Καλημέρα, φίλε",dev,u1,x\n'
        "s2/a.wav,calm,el,s2,,,test,,y\n",
        encoding="utf-8-sig",
    )
    first, second = parse_manifest(file)
    assert first == Recording(
        path=tmp_path / "s1/a.wav",
        emotion="Anger",
        label="anger",
        language="el",
        speaker="s1",
        corpus="greek",
        id="s1_a",
        source_id="u1",
        gender="female",
        text="Καλημέρα, φίλε",
        split="val",
    )
    assert (second.id, second.label, second.source_id, second.gender, second.text) == (
        "s2_a",
        "calm",
        "s2_a",
        None,
        None,
    )


def test_manifest_jsonl_and_tsv_agree(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    rows = tmp_path / "m.jsonl"
    rows.write_text(
        json.dumps({"path": "a.wav", "emotion": "grumpy", "label": "grumpy", "language": "ru", "speaker": 7}) + "\n\n"
    )
    table = tmp_path / "m.tsv"
    table.write_text("speaker\tpath\temotion\tlabel\tlanguage\n7\ta.wav\tgrumpy\tgrumpy\tru\n")
    assert list(parse_manifest(rows)) == list(parse_manifest(table))
    assert next(iter(parse_manifest(rows))).label == "grumpy"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("m.csv", "path,emotion,language\na.wav,sad,de\n", "line 1: no column speaker"),
        ("m.csv", "", "line 1: no column path"),
        ("m.csv", f"{HEADER}\n", "lists no clip"),
        ("m.csv", f"{HEADER}\na.wav,sad,de,s1\nb.wav,sad,de,s1\n", "line 3: .*b.wav is missing"),
        ("m.csv", f"{HEADER}\na.wav,sadd,de,s1\n", "line 2: unknown emotion 'sadd'"),
        ("m.csv", f"{HEADER}\na.wav,,de,s1\n", "line 2: no emotion"),
        ("m.csv", f"{HEADER}\na.wav,sad,de,\n", "line 2: no speaker"),
        ("m.csv", f"{HEADER}\na.wav,sad,German,s1\n", "line 2: 'German' is no language code"),
        ("m.csv", f"{HEADER}\na.wav,sad,de,s1,more\n", "line 2: another number of fields"),
        ("m.csv", f"{HEADER}\na.wav,sad\n", "line 2: another number of fields"),
        ("m.csv", f"{HEADER},split\na.wav,sad,de,s1,tset\n", "line 2: 'tset' is no split"),
        ("m.csv", f"{HEADER}\na.wav,sad,de,s1\na.wav,sad,de,s1\n", "line 3: the id 'a' is also on line 2"),
        ("m.jsonl", "{}\n", "line 1: no path"),
        ("m.jsonl", "\n[1]\n", "line 2: not a JSON object"),
        ("m.jsonl", "{path: a.wav}\n", "line 1: not valid JSON"),
        ("m.jsonl", '{"path": "a.wav", "emotion": ["sad"], "language": "de", "speaker": "s"}\n', "emotion is .'sad'."),
        ("m.xlsx", "", "not a .csv"),
    ],
)
def test_bad_manifests_name_file_and_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    touch(tmp_path, "a.wav")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        list(parse_manifest(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_manifest_that_is_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(parse_manifest(tmp_path / "m.csv"))
    (tmp_path / "m.csv").write_bytes(HEADER.encode() + b"\na.wav,w\xfctend,de,s1\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(parse_manifest(tmp_path / "m.csv"))
