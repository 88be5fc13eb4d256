"""What can be set in ``mser translate``: each step's backend, and which clips are kept."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mser_dist.config.fields import (
    Bool,
    Float,
    List,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    must,
    opt,
)
from mser_dist.config.validate import check_values
from mser_dist.errors import UserError

WHISPER = "pypi:whisper-base"


def _are_codes(languages: list[str]) -> bool:
    return all(re.fullmatch(r"[a-z]{2,3}", name) for name in languages) and len(set(languages)) == len(languages)


@dataclass(kw_only=True)
class TranscriptConfig(Section):
    source: Literal["text", "whisper", "either"] = opt(
        "either", "what a recording says: text (the shards') | whisper | either (text, by Whisper where there is none)"
    )
    whisper: str = opt(WHISPER, "Whisper of transformers: a folder, a hub id, or pypi:whisper-base")


@dataclass(kw_only=True)
class SentenceConfig(Section):
    backend: Literal["table", "model"] = opt("table", "the words in the other language: table (a list) | model")
    table: str | None = opt(None, "CSV, TSV, JSONL or JSON of parallel sentences; null: those of the package")
    model: str | None = opt(None, "NLLB, M2M-100 or SeamlessM4T of transformers: a folder or a hub id")
    beams: PositiveInt = opt(4, "model: beams of its search")
    max_tokens: PositiveInt = opt(128, "model: of a sentence at most")


@dataclass(kw_only=True)
class SpeechConfig(Section):
    backend: Literal["transplant", "espeak", "vits", "seamless", "command"] = opt(
        "transplant",
        "transplant (eSpeak with the recording's prosody) | espeak | vits (VITS, MMS-TTS) | seamless (SeamlessM4T-v2 "
        "speech to speech) | command (a program of yours)",
    )
    level: Literal["recording", "voice"] = opt(
        "recording",
        "transplant: pitch, loudness and tilt as the recording has them (recording), or as far from the new voice's "
        "own as the recording's are from its speaker's (voice)",
    )
    model: str | None = opt(
        None, "vits, seamless: a folder or a hub id; {} stands for the language, {iso3} for its ISO 639-3 code"
    )
    command: str | None = opt(None, "command: the program's command line; see mser_dist/translation/README.md")
    timeout: PositiveFloat = opt(120.0, "command: seconds for an answer, after which it is started anew")
    tries: PositiveInt = opt(2, "command: times a clip is asked for, where it dies or does not answer")


@dataclass(kw_only=True)
class SelectionConfig(Section):
    all: Bool = opt(False, "keep every clip that was made, with its scores")
    scorer: str | None = opt(None, "a run or export that is asked for the emotion of each clip; null: none")
    probe: List[str] = opt(
        [], "sets whose training split a logistic regression on a frozen Whisper is fitted to, to be asked instead"
    )
    adapt: Bool = opt(
        True,
        "scorer, probe: hear each label against its mean over a language's clips: machines sound otherwise",
    )
    agree: Bool = opt(True, "scorer, probe: drop a clip whose likeliest label is another")
    min_score: Share = opt(0.0, "scorer, probe: least probability of the clip's label")
    whisper: str | None = opt(WHISPER, "Whisper that writes down each clip, to compare with its text; null: none")
    max_cer: NonNegativeFloat | None = opt(0.5, "most errors by character of the text; null: any")
    min_seconds: NonNegativeFloat = opt(0.3, "shortest clip")
    max_seconds: PositiveFloat = opt(30.0, "longest clip")
    min_level: Annotated[Float, Field(ge=-120, le=0)] = opt(-60.0, "least RMS level, dB of full scale")
    max_clipped: Share = opt(0.005, "most samples at full scale, as a share")


@dataclass(kw_only=True)
class TranslateConfig(Section):
    """Recordings of a set, with their emotion, in other languages."""

    to: Annotated[List[str], must("must be ISO 639 codes, each once, e.g. fr,de", _are_codes)] = opt(
        [], "languages to make, as ISO 639 codes"
    )
    split: List[Literal["train", "val", "test"]] = opt(
        ["train", "val"], "splits whose clips are translated, each into its own; test only where it is named"
    )
    keep: dict[str, Any] = opt({}, "only clips with these values, as data.keep")
    drop: dict[str, Any] = opt({}, "no clips with these values, as data.drop")
    seed: NonNegativeInt = opt(0, "seed of the models that draw")
    device: str = opt("cpu", "where the models compute: cpu, cuda, cuda:1 …")
    shard_clips: PositiveInt = opt(512, "clips a shard at most")
    transcript: TranscriptConfig = opt(TranscriptConfig, "what a recording says")
    text: SentenceConfig = opt(SentenceConfig, "its words in the other language")
    speech: SpeechConfig = opt(SpeechConfig, "those words spoken")
    selection: SelectionConfig = opt(SelectionConfig, "which clips are kept")

    def check(self) -> None:
        """Raise `UserError` for wrong values, and for keys of another backend than the chosen one."""
        check_values(self)
        if not self.to:
            raise UserError("no language to translate into: name some, e.g. --to fr,de")
        if not self.split:
            raise UserError("split names no split: use some of train, val, test")
        _only(
            "text", self.text, {"table": ("table",), "model": ("model",), "beams": ("model",), "max_tokens": ("model",)}
        )
        _only(
            "speech",
            self.speech,
            {
                "level": ("transplant",),
                "model": ("vits", "seamless"),
                "command": ("command",),
                "timeout": ("command",),
                "tries": ("command",),
            },
        )
        for section, name, needs in (
            ("text", self.text.backend, {"model": "model"}),
            ("speech", self.speech.backend, {"vits": "model", "seamless": "model", "command": "command"}),
        ):
            if name in needs and not getattr(getattr(self, section), needs[name]):
                raise UserError(f"{section}.backend={name} needs {section}.{needs[name]}: name it")
        said = self.transcript != TranscriptConfig() or self.text != SentenceConfig()
        if self.speech.backend == "seamless" and said:
            raise UserError(
                "speech.backend=seamless goes from speech to speech in words of its own: leave transcript.* and "
                "text.* out"
            )
        chosen = self.selection
        if chosen.scorer and chosen.probe:
            raise UserError("selection.scorer and selection.probe are both set: keep one of them")
        if chosen.min_seconds >= chosen.max_seconds:
            raise UserError(
                f"selection.min_seconds={chosen.min_seconds:g} is not below selection.max_seconds="
                f"{chosen.max_seconds:g}: lower it"
            )
        default = SelectionConfig()
        for key in ("adapt", "agree", "min_score"):
            if not (chosen.scorer or chosen.probe) and getattr(chosen, key) != getattr(default, key):
                raise UserError(f"selection.{key} is of a scorer: name one by selection.scorer or selection.probe")
        if chosen.whisper is None and chosen.max_cer != default.max_cer and chosen.max_cer is not None:
            raise UserError("selection.max_cer needs a Whisper: set selection.whisper, or leave it out")
        if self.transcript.source == "text" and self.transcript.whisper != WHISPER:
            raise UserError("transcript.whisper has no effect with transcript.source=text: leave one of them out")


def _only(section: str, config: Any, of: dict[str, tuple[str, ...]]) -> None:
    """Raise `UserError` for a key that is set away from its default and is of other backends."""
    for key, backends in of.items():
        if config.backend not in backends and getattr(config, key) != getattr(type(config)(), key):
            raise UserError(
                f"{section}.{key} is of {section}.backend={' or '.join(backends)}, not of {config.backend}: leave it "
                "out, or choose that backend"
            )
