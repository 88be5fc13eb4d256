"""The README.md of an export: what people, and a model hub, read of a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mser_dist import __version__
from mser_dist.config.file import read_yaml
from mser_dist.errors import UserError
from mser_dist.evaluation import unseen
from mser_dist.models.declared import declared
from mser_dist.shards.ledger import Ledger
from mser_dist.tables import count

_TASK = "audio-classification"


def render(
    card: Mapping[str, Any],
    name: str,
    validation: Mapping[str, float],
    runs: Path | None = None,
    ledger: Ledger | None = None,
) -> str:
    """The card as Markdown with a hub's metadata.

    Args:
        card: of the export (`card.json`).
        name: of the model.
        validation: its metrics there, by name; empty where it was not validated.
        runs: the run folder; reports of evaluations beside it that name the run are told.
        ledger: of the run; None where it has kept none.
    """
    evaluations = _evaluations(runs, card["stage"]) if runs else []
    results = [
        _result(name, "validation", "validation", value, metric)
        for metric, value in validation.items()
        if metric != "temperature"  # which is no result
    ]
    for row in evaluations:
        where = f"{row['corpus']} ({row['language']})"
        results.append(_result(name, f"{row['corpus']}_{row['language']}", where, row["ua"], "ua"))
    data = ModelCardData(
        language=[language for language in card.get("languages", []) if language],
        library_name="mser_dist",
        pipeline_tag=_TASK,
        tags=["speech-emotion-recognition", "zero-shot", f"stage-{card['stage']}"],
        base_model=_bases(card),
        model_name=name,
        eval_results=results or None,
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_text(card, name, validation, evaluations, ledger)}"
    return str(ModelCard(text))


def _text(
    card: Mapping[str, Any],
    name: str,
    validation: Mapping[str, float],
    evaluations: list[dict[str, Any]],
    ledger: Ledger | None,
) -> str:
    speech = card["speech"]
    features, layers = speech["features"], speech.get("layers", {})
    fed = f"log-mel of {features['n_mels']} bands" if features["n_mels"] else "the waveform"
    padded = f", padded to {features['pad_seconds']:g} s" if features["pad_seconds"] else ""
    how = {
        1: "Speech and sentences that describe emotions lie in one space: the label whose captions are nearest is the "
        "answer.",
        2: "A language model hears a clip as a few tokens, and the label that is its likeliest answer is the answer.",
    }[card["stage"]]
    parts = [
        f"# {name}",
        f"Speech emotion recognition, stage {card['stage']} of mser_dist {__version__}. {how} Any words can be labels.",
        "## How to use",
        "```python\nimport mser_dist\n\n"
        f'model = mser_dist.load_model("{name}")  # this folder\n'
        'print(model.predict("x.wav").probabilities)\n'
        'print(model.predict("x.wav", labels=["calm", "furious"]).label)\n```',
        "## Data",
        _lines(
            {
                "Labels": ", ".join(card["labels"]),
                "Languages heard in training": ", ".join(card.get("languages", [])),
                "Corpora": ", ".join(card.get("corpora", [])),
                "Clips": card.get("clips"),
                "Licences": "those of the corpora and of the models named here, which this card does not know",
            }
        ),
        _ledger(ledger),
        "## Sound",
        _lines(
            {
                "Fed": f"16 kHz, one channel, {fed}{padded}",
                "Encoder": f"{speech['encoder']['model_type']}, {'frozen' if speech.get('frozen') else 'trained'}, "
                f"layers {layers.get('numbers')} of {layers.get('depth')}, {layers.get('stride')} frames averaged",
                "Features normalised by": speech.get("normalize", "none"),
                "Longest clip": f"{card['max_seconds']:g} s" if card.get("max_seconds") else None,
            }
        ),
    ]
    if prompt := card.get("prompt"):
        parts += ["## Prompt", "```json\n" + json.dumps(prompt, indent=1, ensure_ascii=False) + "\n```"]
    parts += ["## Metrics", "UA is the mean of the labels' recalls, WA the accuracy."]
    if validation:
        parts.append("Validation: " + ", ".join(f"{metric} {value:.3f}" for metric, value in validation.items()) + ".")
    if evaluations:
        head = "| model | corpus | language | heard in training | zero-shot | clips | UA | WA |\n" + "|---" * 8 + "|"
        rows = [
            f"| {row['model']} | {row['corpus']} | {row['language']} | {'yes' if row['seen_language'] else 'no'} | "
            f"{unseen.shown(row)} | "
            f"{row['n']} | {row['ua']:.3f} | {row['wa']:.3f} |"
            for row in evaluations
        ]
        parts.append("\n".join([head, *rows]))
    if not validation and not evaluations:
        parts.append("None were measured.")
    return "\n\n".join(parts) + "\n"


def _ledger(ledger: Ledger | None) -> str:
    """What was trained on, run by run."""
    if ledger is None:
        return "No ledger was kept: which clips and speakers it was trained on is unknown."
    lines = []
    for part in ledger.parts:
        heard = (
            f"{count(part.total, 'clip')} of {count(len(part.speakers), 'speaker')}" if part.known else "unknown clips"
        )
        lines.append(f"- {part.name}: {heard}; {', '.join(part.corpora)}; {' '.join(part.languages)}")
    found = declared(ledger.encoder)
    if ledger.encoder:
        lines.append(f"- the pretrained encoder {ledger.encoder}, as declared: {found.what if found else 'nothing'}")
    return (
        "Heard in this training, and in those that it builds on (`ledger.safetensors` has the hashes of their clips "
        "and speakers; by it `mser eval` says what is zero-shot):\n\n" + "\n".join(lines)
    )


def _lines(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {what}: {value}" for what, value in facts.items() if value not in (None, ""))


def _result(name: str, kind: str, dataset: str, value: float, metric: str) -> EvalResult:
    return EvalResult(
        task_type=_TASK,
        dataset_type=kind,
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(float(value), 4),
        metric_name=metric.upper(),
    )


def _bases(card: Mapping[str, Any]) -> list[str] | None:
    """The models of a hub that it was built on, where their names are a hub's."""
    names = [card.get("llm"), card.get("text")]
    found = [name for name in names if isinstance(name, str) and name.count("/") == 1 and name[0] not in "./~"]
    return found or None


def _evaluations(run: Path, stage: int) -> list[dict[str, Any]]:
    """The rows of this stage in the reports of evaluations beside a run that name it."""
    rows: list[dict[str, Any]] = []
    for file in sorted(run.resolve().parent.glob("*/report.json")):
        try:
            named = read_yaml(file.with_name("config.yaml")).get(f"stage{stage}")
            report = json.loads(file.read_text(encoding="utf-8"))
            if named and Path(named).resolve() == run.resolve():
                rows += [row for row in report["zero_shot"] if row["stage"] == stage]
        except (OSError, ValueError, KeyError, TypeError, UserError):
            continue  # no evaluation, or one that is under way
    return rows
