"""The corpora whose labels stand in files of their own: MELD, IEMOCAP, RESD, Dusha, MSP-Podcast.

Their layouts are taken from documentation and published readers, and were never tried on the corpora themselves. A
recording that a list names and that is not there is met by whoever reads it (`mser pack --skip-bad`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mser_dist.corpora.lines import rows
from mser_dist.corpora.naming import find_files, label_of
from mser_dist.corpora.recording import Recording, safe_id
from mser_dist.errors import UserError

_AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus")


def parse_meld(src: Path) -> Iterator[Recording]:
    """MELD, English, 13706 clips of Friends: its three lists, and dia0_utt0.wav, … in folders named after the splits,
    which stay as they are published; a role is heard in all of them. Two clips without sound are left out.
    """
    layout = "{train,dev,test}_sent_emo.csv, and dia0_utt0.wav … below folders with train, dev or test in their names"
    there: dict[tuple[str, str], Path] = {}
    for path in find_files(src, "meld", _AUDIO):
        for part in ("train", "dev", "test"):
            if any(part in folder.lower() for folder in path.relative_to(src).parts[:-1]):
                there.setdefault((part, path.stem), path)
                break
    for part, split in (("train", "train"), ("dev", "val"), ("test", "test")):
        (table,) = _lists(src, f"{part}_sent_emo.csv", "meld", layout)[:1]
        for _, row in _filled(table, ("Dialogue_ID", "Utterance_ID", "Speaker", "Emotion")):
            name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            if (part, name) in (("train", "dia125_utt3"), ("dev", "dia110_utt7")):
                continue
            yield _clip(
                corpus="meld",
                path=there.get((part, name), table.parent / part / f"{name}.wav"),
                emotion=row["Emotion"],
                label=label_of(row["Emotion"], table, "meld", layout),
                language="en",
                speaker=row["Speaker"],
                name=f"{part}_{name}",
                text=row.get("Utterance"),
                split=split,
            )


_IEMOCAP_WORDS = {"ang": "anger", "hap": "happiness", "neu": "neutral", "fea": "fear", "sur": "surprise"}
_IEMOCAP_WORDS |= {"sad": "sadness", "exc": "excitement", "fru": "frustration", "dis": "disgust"}
_IEMOCAP_VOTE = re.compile(r"C-E\d+:\t([^\t]*)\t.*")
_IEMOCAP_TURN = re.compile(r"\[[\d.]+ - [\d.]+\]\t(Ses\d\d[FM]_\w+_([FM])\d+)\t(\w+)\t.*")


def parse_iemocap(src: Path) -> Iterator[Recording]:
    """IEMOCAP, English, 10039 turns of 10 speakers. Excitement is a class of its own: the usual four classes take it
    for happiness (`--map excitement=happy`). Turns without agreement (xxx, oth) get no label.
    """
    layout = "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt, Session1/sentences/wav/Ses01F_impro01/*.wav"
    for table in _lists(src, "Session*/dialog/EmoEvaluation/Ses*.txt", "iemocap", layout):
        session = table.parents[2]
        spoken = _iemocap_texts(session / "dialog" / "transcriptions" / table.name)
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
        votes = _iemocap_votes(lines)
        for line in lines:
            if turn := _IEMOCAP_TURN.fullmatch(line):
                name, gender, code = turn.groups()
                word = _IEMOCAP_WORDS.get(code, code)
                yield _clip(
                    corpus="iemocap",
                    path=session / "sentences" / "wav" / table.stem / f"{name}.wav",
                    emotion=word,
                    label=label_of(word, table, "iemocap", layout),
                    language="en",
                    speaker=f"{name[:5]}{gender}",
                    name=name,
                    gender=_gender(gender),
                    text=spoken.get(name),
                    votes=votes.get(name),
                )


def _iemocap_votes(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    """By turn, of those who listened and not of the actors; who names several emotions gives each a share."""
    votes: dict[str, dict[str, float]] = {}
    name = ""
    for line in lines:
        if turn := _IEMOCAP_TURN.fullmatch(line):
            name = turn[1]
        elif name and (vote := _IEMOCAP_VOTE.fullmatch(line)):
            words = [word.strip().lower().removesuffix(" state") for word in vote[1].split(";") if word.strip()]
            own = votes.setdefault(name, {}) if words else {}
            for word in words:
                own[word] = own.get(word, 0) + 1 / len(words)
    return votes


def _iemocap_texts(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return {line[0].split()[0]: line[2].strip() for one in lines if (line := one.partition("]:"))[1]}


def parse_resd(src: Path) -> Iterator[Recording]:
    """RESD, Russian, 1396 clips, as the parquet files of its publisher (`train-….parquet`, `test-….parquet`), whose
    splits stay. It does not name its speakers: one voice of one dialogue, as its clips are named, stands for one.
    """
    import pyarrow.parquet as pq

    layout = "train-00000-of-00002.parquet, test-…, with the columns name, emotion and speech"
    for file in find_files(src, "resd", (".parquet",)):
        split = next((split for split in ("train", "test") if file.name.startswith(split)), None)
        try:
            columns = pq.read_schema(file).names
            audio = "speech" if "speech" in columns else "audio"
            if split is None or not {"name", "emotion", audio} <= set(columns):
                raise UserError(f"{file}: not a file of resd ({layout}); move it away")
            table = pq.read_table(file, columns=["name", "emotion"]).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's are both
            raise UserError(
                f"{file}: no parquet file that can be read ({str(error).splitlines()[0]}); fetch it anew"
            ) from None
        for row, clip in enumerate(table):
            word, name = clip["emotion"], clip["name"]
            parts = name.split("_")
            yield _clip(
                corpus="resd",
                path=file,
                inside=(audio, row),
                emotion=word,
                label=label_of(word, file, "resd", layout),
                language="ru",
                speaker=f"{parts[0]}_{parts[-2]}" if len(parts) > 2 else name,
                name=f"{split}_{name}",
                split=split,
            )


def parse_dusha(src: Path) -> Iterator[Recording]:
    """Dusha, Russian, more than 300,000 clips, with a line for each annotator of each clip: the emotion is what most
    of them heard, and none where no one emotion leads; that of a control task is the publisher's. Its split into train
    and test stays.
    """
    layout = "crowd_train/raw_crowd_train.tsv (crowd_test, podcast_train, podcast_test) beside wavs/"
    for table in _lists(src, "raw_*_t*.tsv", "dusha", layout):
        votes: dict[str, Counter[str]] = {}
        clips: dict[str, dict[str, str]] = {}
        for _, row in _filled(table, ("hash_id", "audio_path", "annotator_emo")):
            clips.setdefault(row["hash_id"], row)
            votes.setdefault(row["hash_id"], Counter())[row["annotator_emo"]] += 1
        for name, row in clips.items():
            (first, most), *others = votes[name].most_common()
            heard = "no agreement" if others and others[0][1] == most else first
            word = row.get("golden_emo") or heard
            yield _clip(
                corpus="dusha",
                path=table.parent / row["audio_path"],
                emotion=word,
                label=label_of(word, table, "dusha", layout),
                language="ru",
                speaker=row.get("source_id") or name,
                votes=dict(sorted(votes[name].items())),
                name=f"{table.stem.removeprefix('raw_')}_{name}",
                text=row.get("speaker_text"),
                split="test" if table.stem.endswith("_test") else "train",
            )


_MSP_WORDS = {"A": "anger", "H": "happiness", "S": "sadness", "N": "neutral", "U": "surprise", "F": "fear"}
_MSP_WORDS |= {"D": "disgust", "C": "contempt", "O": "other", "X": "no agreement"}
_MSP_SPLITS = {"train": "train", "development": "val", "validation": "val"}


def parse_msp_podcast(src: Path) -> Iterator[Recording]:
    """MSP-Podcast, English, as many clips as its list names (they differ from release to release), its own splits:
    every Test1, Test2 … is test. A clip whose speaker is not known counts as a speaker.
    """
    layout = (
        "Labels/labels_consensus.csv (FileName, EmoClass, SpkrID, Gender, Split_Set), Audios/MSP-PODCAST_0001_0008.wav"
    )
    (table,) = _lists(src, "labels_con[cs]ensus.csv", "msp-podcast", layout)[:1]
    there = {path.name: path for path in find_files(src, "msp-podcast")}
    for number, row in _filled(table, ("FileName", "EmoClass", "SpkrID", "Gender", "Split_Set")):
        name, part = row["FileName"], row["Split_Set"].lower()
        split = "test" if part.startswith("test") else _MSP_SPLITS.get(part)
        if row["EmoClass"] not in _MSP_WORDS or split is None:
            raise UserError(
                f"{table}, line {number}: {row['EmoClass']!r}, {row['Split_Set']!r}: not of msp-podcast ({layout})"
            )
        word = _MSP_WORDS[row["EmoClass"]]
        yield _clip(
            corpus="msp-podcast",
            path=there.get(name, table.parent.parent / "Audios" / name),
            emotion=word,
            label=label_of(word, table, "msp-podcast", layout),
            language="en",
            speaker=row["SpkrID"] if row["SpkrID"].lower() not in ("", "unknown") else name,
            name=Path(name).stem,
            gender=_gender(row["Gender"]),
            split=split,
        )


_CREMAD_WORDS = {"A": "anger", "D": "disgust", "F": "fear", "H": "happy", "N": "neutral", "S": "sad"}


def with_cremad_votes(src: Path, clips: Iterable[Recording]) -> Iterator[Recording]:
    """CREMA-D's clips with what listeners heard, where its `tabulatedVotes.csv` lies in the folder or below: its rows
    of those who heard the voice alone, whose numbers begin with 1.
    """
    votes: dict[str, dict[str, float]] = {}
    for table in [path for path in sorted(src.rglob("tabulatedVotes.csv")) if not path.name.startswith(".")][:1]:
        for line, row in _filled(table, ("fileName", *_CREMAD_WORDS)):
            if row.get("", "").startswith("1"):
                counts = [row[letter] for letter in _CREMAD_WORDS]
                if not all(count.isdecimal() for count in counts):
                    raise UserError(f"{table}, line {line}: {counts} are no numbers of votes; fetch it anew")
                given = dict(zip(_CREMAD_WORDS.values(), map(int, counts), strict=True))
                votes[row["fileName"]] = {word: count for word, count in given.items() if count}
    for clip in clips:
        yield replace(clip, votes=votes.get(clip.path.stem) or None)


def _lists(src: Path, pattern: str, corpus: str, layout: str) -> list[Path]:
    found = sorted(path for path in src.rglob(pattern) if not path.name.startswith("."))
    if not found:
        raise UserError(f"{src}: no {pattern} in it or below; give the folder of {corpus} ({layout})")
    return found


def _filled(table: Path, required: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, row in rows(table, tuple(required)):
        yield number, {name: (text or "").strip() for name, text in row.items()}


def _gender(word: str) -> str | None:
    return {"f": "female", "m": "male"}.get(word[:1].lower())


def _clip(corpus: str, name: str, text: str | None = None, **facts: Any) -> Recording:
    key = safe_id(f"{corpus}_{name}")
    return Recording(corpus=corpus, id=key, source_id=key, text=text or None, **facts)
