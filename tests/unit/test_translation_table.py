"""Parallel sentences: the packaged ones, a user's, and what is wrong with a user's."""

import json
from pathlib import Path

import numpy as np
import pytest

from mser_dist.corpora.named import NAMED
from mser_dist.errors import UserError
from mser_dist.translation.parts import NotMadeError, Source
from mser_dist.translation.table import Table


def said(text: str | None, language: str = "en") -> Source:
    return Source("a", np.zeros(1, np.float32), text, language, "anger", "c", None, None)


def test_every_sentence_that_the_parsers_know_is_there_in_nine_languages() -> None:
    table = Table()
    assert table.languages() == {"en", "de", "it", "fr", "es", "zh", "pl", "ko", "ru"}
    known = 0
    for corpus, code in [("ravdess", "01"), ("ravdess", "02")] + [("emodb", f"a0{n}") for n in (1, 2, 4, 5, 7)]:
        texts, language = NAMED[corpus].texts, NAMED[corpus].language
        assert texts is not None and isinstance(language, str)
        source = said(texts(code), language)
        made = {other: table.sentence(source, other) for other in table.languages()}
        assert made[language].text == source.text
        assert {other for other, one in made.items() if one.checked} == {language}
        assert len({one.text for one in made.values()}) == 9
        known += 1
    assert known == 7 and table.about["sentences"] == 2 + 12 + 10 + 14


@pytest.mark.parametrize("text", ["kids are talking by the door", " KIDS are  talking, by the door!\n"])
def test_case_punctuation_and_spacing_do_not_count(text: str) -> None:
    assert Table().sentence(said(text), "fr").text == "Les enfants parlent près de la porte."
    assert Table().sentence(said(text, "en-GB"), "fr").checked is False


def test_what_is_not_there_is_told_by_its_reason() -> None:
    table = Table()
    for source, language, reason in (
        (said(None), "de", "no transcript"),
        (said("…"), "de", "no transcript"),
        (said("Who knows?"), "de", "not in the table"),
        (said("It's eleven o'clock.", "de"), "fr", "not in the table"),
        (said("It's eleven o'clock."), "fa", "no sentence in fa"),
    ):
        with pytest.raises(NotMadeError, match=reason):
            table.sentence(source, language)


@pytest.mark.parametrize("name", ["own.csv", "own.tsv", "own.jsonl", "own.json"])
def test_a_users_own_table(name: str, tmp_path: Path) -> None:
    lines = [{"id": "1", "en": "Yes, sir.", "sv": "Ja."}, {"id": "2", "en": "No.", "sv": "", "checked": "en"}]
    own, mark = tmp_path / name, "," if name.endswith("csv") else "\t"
    if name.endswith("json"):
        own.write_text(json.dumps(lines), encoding="utf-8")
    elif name.endswith("jsonl"):
        own.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    else:
        cells = [["id", "en", "sv", "checked"], ["1", '"Yes, sir."', "Ja.", ""], ["2", "No.", "", "en"]]
        own.write_text("\n".join(mark.join(row) for row in cells), encoding="utf-8")
    table = Table(own)
    assert table.sentence(said("yes sir"), "sv").text == "Ja."
    assert table.sentence(said("yes sir"), "sv").checked is None
    assert table.sentence(said("no"), "en").checked is True
    with pytest.raises(NotMadeError, match="no sentence in sv"):
        table.sentence(said("no"), "sv")
    assert table.about["file"] == name


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.csv", "en,German\nYes,Ja\n", "line 2: 'German' is no language code"),
        ("a.csv", "en,de\nYes,Ja\nNo\n", "line 3: another number of fields"),
        ("a.csv", "en\nYes\n", "line 2: a sentence needs two languages"),
        ("a.csv", "en,de,checked\nYes,Ja,fr\n", "line 2: checked names 'fr'"),
        ("a.csv", "en,de\n", "no sentences"),
        ("a.json", '{"sentences": [\n{"en": "Yes" "de"}]}', "line 2: not valid JSON"),
        ("a.json", '[{"en": "Yes", "de": "Ja"}, {"en": 1, "de": "Ja"}]', "sentence 2: en is no text"),
        ("a.json", '[{"en": "Yes", "de": "Ja", "checked": true}]', "sentence 1: checked is True"),
        ("a.json", '{"rows": []}', "no sentences"),
        ("a.txt", "en,de\n", "not a .csv"),
    ],
)
def test_a_fault_is_named_with_its_line(name: str, text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=fault) as told:
        Table(tmp_path / name)
    assert "\n" not in str(told.value)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: No such file"):
        Table(tmp_path / "none.csv")
