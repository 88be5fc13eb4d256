"""What a config words itself: instructions and label words, of a language or corpus where wanted; captions by label."""

import difflib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import prompts
from mser_dist.shards.emotions import LABELS

EVERY = ""  # stands for the languages and corpora that have no wording of their own


def questions_of(config: cfg.PromptConfig) -> dict[str, list[str]]:
    """The instructions of `llm.prompt.instructions` by language or corpus; `EVERY` is always there.

    Raises `UserError` for a file that cannot be read, and for an instruction without one {} where the options go.
    """
    given = config.instructions
    by_language = given if isinstance(given, dict) else {EVERY: given}
    found = {}
    for language, texts in by_language.items():
        key = f"llm.prompt.instructions{f'.{language}' if language else ''}"
        listed = _lines(key, texts) if isinstance(texts, str) else texts
        if not listed and isinstance(given, dict):
            raise UserError(f"{key} has no instruction: name one, or leave {language!r} out")
        for text in listed:
            if text.count("{}") != 1 or "\n" in text:
                raise UserError(f"{key}: {text!r} is to be one line with one {{}}, where the options go")
        found[language] = listed
    return found | {EVERY: found.get(EVERY) or list(prompts.INSTRUCTIONS)}


def words_of(config: cfg.PromptConfig, labels: Collection[str]) -> dict[str, dict[str, str]]:
    """The words of `llm.prompt.words` by language or corpus, and label; `EVERY` is always there, maybe empty.

    Raises `UserError` for a label that is none, and where two labels would have one word.
    """
    found: dict[str, dict[str, str]] = {EVERY: {}}
    for name, value in config.words.items():
        if isinstance(value, str):
            found[EVERY][name] = value
        else:
            found[name] = dict(value)
    for language, words in found.items():
        key = f"llm.prompt.words{f'.{language}' if language else ''}"
        for label in words:
            if label not in labels and label not in LABELS:
                near = difflib.get_close_matches(label, [*labels, *LABELS], 1)
                hint = f"did you mean {near[0]}?" if near else f"labels: {', '.join(labels)}"
                raise UserError(f"{key} has a word for {label!r}, which is no label: {hint}")
        said = [found[EVERY].get(label, label) if label not in words else words[label] for label in labels]
        if twice := [word for word in said if said.count(word) > 1 or not word.strip()]:
            raise UserError(f"{key}: the word {twice[0]!r} stands for several labels, or is empty: give each its own")
    return found


def captions_of(config: cfg.TextConfig, labels: Collection[str]) -> dict[str, list[str]]:
    """The captions of each label: those of the file `text.captions`, YAML or JSON, and the shipped ones of the rest.

    Raises `UserError` for a file that is no mapping of labels to lists of different captions.
    """
    own: Any = {}
    if config.captions is not None:
        path = Path(config.captions)
        try:
            own = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"text.captions={path}: {' '.join(str(error).split())[:200]}: name a YAML or JSON file"
            ) from error
        good = isinstance(own, dict) and all(
            isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
            for texts in own.values()
        )
        if not good:
            raise UserError(f"text.captions={path} is to map each label to a list of captions")
        if strange := [label for label in own if label not in labels and label not in LABELS]:
            raise UserError(f"text.captions={path} names {strange[0]!r}, which is no label: {', '.join(labels)}")
    found = {label: own.get(label) or prompts.captions(label) for label in labels}
    everything = [caption for texts in found.values() for caption in texts]
    if twice := [caption for caption in everything if everything.count(caption) > 1]:
        raise UserError(
            f"text.captions={config.captions}: {twice[0]!r} stands there twice: give each caption one label"
        )
    return found


def of_clip(known: Mapping[str, Any], corpus: str, language: str) -> str:
    """The key of a clip's wording among those that are known: its corpus's, its language's, or `EVERY`."""
    return next((name for name in (corpus, language) if name and name in known), EVERY)


def transcript_of(meta: bytes) -> str:
    """What is said in a clip, by its json; empty where nobody knows. Of a text without end the start.

    Without < and >, of which tokenizers make the ends of turns.
    """
    try:
        text = json.loads(meta).get("text") if meta else None
    except ValueError:
        return ""
    return " ".join(re.sub("[<>]", " ", text).split())[:LONGEST] if isinstance(text, str) else ""


LONGEST = 400  # characters of a transcript: twice what is said in 15 s, and no prompt is cut in its middle


def _lines(key: str, name: str) -> list[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={name}: {error}: name a text file with one instruction a line") from error
    listed = [line.strip() for line in lines if line.strip()]
    if not listed:
        raise UserError(f"{key}={name} is empty: write one instruction a line")
    return listed
