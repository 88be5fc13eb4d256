import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from mser_dist.corpora.manifest import parse_manifest
from mser_dist.corpora.parsers import CORPORA
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
    (clip,) = CORPORA[corpus].parse(touch(tmp_path, name))
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
    clips = list(CORPORA[corpus].parse(touch(tmp_path, left_out, kept)))
    assert [clip.path.name for clip in clips] == [kept]


def test_savee_names_repeat_between_speakers(tmp_path: Path) -> None:
    clips = list(CORPORA["savee"].parse(touch(tmp_path, "DC/a01.wav", "JE/a01.wav", "KL_a01.wav")))
    assert sorted(clip.id for clip in clips) == ["savee_DC_a01", "savee_JE_a01", "savee_KL_a01"]


def test_emodb_knows_its_sentences(tmp_path: Path) -> None:
    (clip,) = CORPORA["emodb"].parse(touch(tmp_path, "03a01Wa.wav"))
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
        list(CORPORA["emodb"].parse(touch(tmp_path, *names)))
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(CORPORA["emodb"].parse(tmp_path / "nowhere"))


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
        ("m.jsonl", "[" * 100_000 + "\n", "line 1: not valid JSON"),
        (
            "m.jsonl",
            '{"path": "a.wav", "emotion": ["sad"], "language": "de", "speaker": "s"}\n',
            r"emotion '\[\"sad\"\]'",
        ),
        ("m.jsonl", '{"path": "a.wav", "speaker": "s", "speaker": "t"}\n', "line 1: 'speaker' is there twice"),
        ("m.jsonl", '{"path": "a.wav", "speaker": "\\ud800"}\n', "line 1: 'speaker' holds half a character"),
        ("m.csv", f"{HEADER}, speaker\na.wav,sad,de,s1,s2\n", "line 1: the column speaker is there twice"),
        ("m.tsv", "path;note;emotion;language;speaker;note\n", "line 1: the column note is there twice"),
        ("m.csv", f'{HEADER}\n"a.wav,sad,de,s1\nb.wav,sad,de,s1\n', "line 2: not valid CSV"),
        ("m.csv", f"{HEADER}\n{'x' * 300},sad,de,s1\n", "line 2: .*x is missing .file name too long"),
        ("m.csv", f"{HEADER}\n{'x/' * 3000},sad,de,s1\n", "line 2: .* is missing"),
        ("m.csv", f"{HEADER}\n.,sad,de,s1\n", "line 2: .* is a folder, not a file"),
        ("m.csv", f"{HEADER}\na.wav/x,sad,de,s1\n", "line 2: .* is missing"),
        ("m.csv", f'{HEADER}\n"a\nb",sad,de,s1\n', "line 3: .* is missing"),
        ("m.csv", f"{HEADER}\na\0.wav,sad,de,s1\n", "line 2: a NUL byte"),
        ("m.jsonl", '{"path": "a\\u0000", "emotion": "sad", "language": "de", "speaker": "s"}\n', "holds a NUL byte"),
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
    with pytest.raises(UserError, match="is a folder"):
        list(parse_manifest(tmp_path))
    with pytest.raises(UserError, match=r"xxx.*x\.csv is missing"):
        list(parse_manifest(tmp_path / ("x" * 300 + ".csv")))


@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("latin-1", "line 2: not UTF-8 text"),
        ("utf-16", "UTF-16, not UTF-8 text"),
        ("utf-16-le", "line [12]: a NUL byte"),
        ("utf-32", "UTF-16, not UTF-8|a NUL byte"),
    ],
)
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_of_another_encoding(name: str, encoding: str, says: str, tmp_path: Path) -> None:
    text = f"{HEADER}\na.wav,wütend,de,s1\n" if name == "m.csv" else '\n{"path": "wütend.wav"}\n'
    (tmp_path / name).write_text(text, encoding=encoding)
    with pytest.raises(UserError, match=says) as caught:
        list(parse_manifest(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["m.csv", "m.tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_separator_is_found(name: str, separator: str, end: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    cells = (
        ["speaker", "text", " path ", "emotion", "language"],
        ["s1", '"eins, zwei; drei|\tvier"', "a.wav", "sad", "de"],
    )
    (tmp_path / name).write_bytes(end.join(separator.join(row) for row in cells).encode("utf-8-sig"))
    (clip,) = parse_manifest(tmp_path / name)
    assert (clip.speaker, clip.text, clip.label) == ("s1", "eins, zwei; drei|\tvier", "sad")


@pytest.mark.parametrize(
    ("value", "text"),
    [("3", "3"), ("3.5", "3.5"), ("true", "true"), ("[1, 2]", "[1,2]"), ('{"é": null}', '{"é":null}'), ('"x"', "x")],
)
def test_json_of_any_type_is_kept_as_text(value: str, text: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    line = (
        f'{{"path": "a.wav", "emotion": "sad", "language": "de", "speaker": {value}, "text": {value}, "corpus": null}}'
    )
    (tmp_path / "m.jsonl").write_text(line, encoding="utf-8")
    (clip,) = parse_manifest(tmp_path / "m.jsonl")
    assert (clip.speaker, clip.text, clip.corpus) == (text, text, "m")


RAVDESS = [f"03-01-05-01-02-01-{actor:02d}.wav" for actor in range(1, 5)]


def test_a_copy_of_all_recordings_is_taken_once_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Kaggle's RAVDESS, which has every file in two folders."""
    for folder in ("Actor_x", "copy/Actor_x"):
        for name in RAVDESS:
            touch(tmp_path, f"{folder}/{name}")
            (tmp_path / folder / name).write_bytes(name.encode())
    clips = list(CORPORA["ravdess"].parse(tmp_path))
    assert [clip.path.parent.parent for clip in clips] == [tmp_path] * 4
    (said,) = capsys.readouterr().err.splitlines()
    assert "more than once, byte for byte: 4; each is taken once" in said
    for name in RAVDESS[1:]:
        (tmp_path / "copy/Actor_x" / name).write_bytes(b"another take")
    with pytest.raises(UserError, match=rf"other content: 3 \(4 names .*{RAVDESS[1]} is also at .*copy") as caught:
        list(CORPORA["ravdess"].parse(tmp_path))
    assert "\n" not in str(caught.value)


def test_linked_folders_are_followed_and_no_circle_is(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/sa01.wav", "savee/JE/a01.wav")
    (tmp_path / "savee/DC").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "savee/JE/up").symlink_to(tmp_path / "savee")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "savee/KL").symlink_to(tmp_path / "nowhere")
    (tmp_path / "savee/KL_a02.wav").symlink_to(tmp_path / "elsewhere/sa01.wav")
    assert [clip.id for clip in CORPORA["savee"].parse(tmp_path / "savee")] == [
        "savee_DC_sa01",
        "savee_JE_a01",
        "savee_KL_a02",
    ]
