"""``report.html``: an evaluation as one page that needs no other file, of what its folder holds (`mser report`)."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mser_dist import __version__
from mser_dist.errors import UserError
from mser_dist.evaluation import page_sections as sections
from mser_dist.evaluation import page_tables, unseen
from mser_dist.evaluation.evaluated import Answered, Behind, Evaluated, read
from mser_dist.evaluation.page_clips import BYTES, SECONDS, Pair, sounds, worst
from mser_dist.evaluation.page_map import keep_embeddings
from mser_dist.evaluation.report import ADAPTED, Answers, shown, zero_shot_table
from mser_dist.evaluation.systems import cell, shown_path
from mser_dist.evaluation.templates import render
from mser_dist.files import write_text
from mser_dist.runs.tracking import Tracker
from mser_dist.tables import Table

FILE = "report.html"
Facts = dict[str, str]


def write(
    folder: Path, baselines: Sequence[Path] = (), *, audio: bool = False, out: Path | None = None
) -> tuple[Path, list[str]]:
    """Write the page of an evaluation's or a baseline's folder to `out` (there), and return it, with lines on what is
    not in it.

    baselines: folders of other evaluations or baselines, whose rows on the same clips stand beside. audio: put the
    clips of the worst confusions into it, to be heard. `UserError` for a folder that is no evaluation that has ended.
    """
    evaluated = read(folder)
    out = out or folder / FILE
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file, e.g. {out / FILE}")
    others, compared, notes = _beside(evaluated, baselines)
    context = _context(evaluated, others, audio)
    notes = [*evaluated.notes, *notes, *context.pop("said")]
    again = ["mser", "report", shown_path(folder), *(word for one in baselines for word in ("--baseline", str(one)))]
    again += [*(["--audio"] if audio else []), *(["--out", str(out)] if out != folder / FILE else [])]
    context["commands"] = [*_commands(evaluated), ("this page", shlex.join(again))]
    page = render("report.html.j2", **context, compared=compared, notes=notes)
    try:
        write_text(out, page)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another file with --out") from error
    return out, notes


def publish(tracker: Tracker, answers: Mapping[str, Answers]) -> None:
    """Write the embeddings and the page of the evaluation whose run a tracker records, when its report is written."""
    keep_embeddings(answers, tracker.out)
    page, _ = write(tracker.out)
    tracker.artifact(page)


def _context(evaluated: Evaluated, others: Mapping[str, Sequence[sections.Row]], audio: bool) -> dict[str, Any]:
    """What the template is filled with; `said`: lines on what is not there."""
    report, said = evaluated.report, list[str]()
    mistakes = {
        model: pairs
        for model, given in evaluated.answers.items()
        if not model.endswith(ADAPTED) and (pairs := worst(given, evaluated.labels))
    }
    heard: dict[tuple[str, str, str], str] = {}
    if audio:
        heard, lines = sounds(evaluated, _all_in_turn(mistakes))
        said += lines
    table, reliability = page_tables.calibration(evaluated)
    return {
        "said": said,
        "title": shown_path(evaluated.folder),
        "called": "Baselines" if evaluated.kind == "baseline" else unseen.kind(evaluated.rows),
        "headline": [*_headline(evaluated)],
        "about": _about(evaluated),
        "trained": [*_trained(evaluated)],
        "table": _ua_first(zero_shot_table(evaluated.rows)),
        "models": [*map(shown, evaluated.models)],
        "warnings": report.get("warnings") or [],
        "definitions": report.get("definitions") or [],
        "ua": [*sections.ua_pictures(evaluated, others)],
        "matrices": [*sections.matrices(evaluated)],
        "maps": [*sections.maps(evaluated)],
        "layers": [*sections.layers(evaluated.behind)],
        "calibration": table,
        "reliability": reliability,
        "tables": [*page_tables.more_tables(evaluated)],
        "ledger": page_tables.ledger(evaluated),
        "heard": (report.get("ledger") or {}).get("notes") or [],
        "mistakes": {shown(model): pairs for model, pairs in mistakes.items()},
        "audio": audio,
        "sounds": heard,
        "bounds": f"the first {SECONDS:g} s of each, {BYTES / 1e6:g} MB in all",
        "versions": report.get("versions") or {"mser_dist": evaluated.version},
        "tracking": _tracking(evaluated),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "by": __version__,
    }


def _ua_first(table: Table) -> Table:
    """The table without the column of models, which name its sections, and with what a phone has no room for last."""
    order = [table.head.index(name) for name in ("corpus", "language", "UA", "95 %")]
    order += [at for at in range(1, len(table.head)) if at not in order]
    sections = [[[row[at] for at in order] for row in section] for section in table.sections]
    return Table([table.head[at] for at in order], sections, "".join(table.align[at] for at in order))


def _all_in_turn(mistakes: Mapping[str, Sequence[Pair]]) -> list[Any]:
    """The worst clip of every pair of every model, then the next ones: what is heard first where room is short."""
    pairs = [pair for own in mistakes.values() for pair in own]
    depth = max((len(pair.worst) for pair in pairs), default=0)
    return [pair.worst[at] for at in range(depth) for pair in pairs if at < len(pair.worst)]


def _headline(evaluated: Evaluated) -> Iterator[dict[str, Any]]:
    """The mean UA of each model that is not adapted, over languages that it has not heard where there are any."""
    every = [one for one in sections.means(evaluated) if not one["model"].endswith(ADAPTED)]
    for model in dict.fromkeys(one["model"] for one in every):
        one = min((one for one in every if one["model"] == model), key=lambda one: one["seen"])
        rows = [row for row in evaluated.rows if row["model"] == model and row["seen_language"] is one["seen"]]
        proven = rows and not one["seen"] and all(row.get("zero_shot") for row in rows)
        kind = "zero-shot, " if proven else ""
        over = ", ".join(dict.fromkeys(str(row["language"]) for row in rows))
        heard = "heard in training" if one["seen"] else "not heard in training"
        chance = sum(row["chance"] for row in rows) / len(rows) if rows else None
        what = f"{kind}mean over {one.get('n_rows', len(rows))} corpora and languages {heard}: {over}"
        yield {**one, "model": shown(model), "what": what, "chance": chance}


# ---- what was trained, and tested on what


def _about(evaluated: Evaluated) -> Facts:
    """What was asked, about which clips."""
    config, data = evaluated.config, evaluated.data
    first = next(iter(evaluated.answers.values()), None)
    native = "True" in (config.get("native_labels"), config.get("on.native_labels"))
    labels = ", ".join(evaluated.labels) or cell(config.get(f"{data}labels"))
    facts = {
        "Clips": f"split {cell(config.get(f'{data}split'))} of {cell(config.get(f'{data}sets'))}",
        "How many": _how_many(first) if first else "",
        "Labels to choose from": labels + (" (of a corpus's clips those alone that it has)" if native else ""),
        "Computed in": config.get("dtype", "") if evaluated.kind == "evaluation" else "",
        "When": _moment(evaluated.status.get("ended") or evaluated.status.get("started")),
    }
    return {name: value for name, value in facts.items() if value}


def _how_many(given: Answered) -> str:
    speakers = len({*zip(given.corpus.tolist(), given.speaker.tolist(), strict=True)} - {("", "")})
    named = f" of {speakers:,} speakers" if (given.speaker != "").all() else ", not all of a named speaker"
    languages = sorted({*given.language.tolist()} - {""})
    return f"{len(given.key):,} clips{named}, in {', '.join(languages) or 'languages that are not named'}"


def _moment(ms: Any) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC") if isinstance(ms, int | float) else ""


def _trained(evaluated: Evaluated) -> Iterator[tuple[str, Facts]]:
    """What each model was trained on, and how."""
    for one in evaluated.behind:
        yield f"Stage {one.stage}: {one.named}", _facts(one)
    if evaluated.kind == "baseline":
        config = {key.removeprefix("stage1."): value for key, value in evaluated.config.items() if "stage1." in key}
        yield (
            "Baselines",
            {
                "Fitted to": f"split {cell(config.get('data.split'))} of {cell(config.get('data.sets'))}",
                "Labels": cell(config.get("data.labels")),
                "Hear": _encoder_named(config),
                "Seed": config.get("seed", ""),
            },
        )


def _facts(one: Behind) -> Facts:
    card, config, summary = one.card, one.config, one.summary
    if not card and not config:
        return {"": "its folder is not there any more: what it was trained on is not known"}
    speech = card.get("speech", {})
    encoder = "that of its stage 1" if one.stage == 2 else _encoder_named(config)
    llm = config.get("llm.pretrained", "None")
    val = summary.get("validation") or {}
    steps = f"{summary.get('steps', '')} steps" if summary.get("steps") else ""
    exported = card.get("step")
    if exported is not None and exported != summary.get("steps"):
        steps += f", of which step {exported} was exported"
    facts = {
        "Languages": ", ".join(card.get("languages", [])),
        "Corpora": ", ".join(card.get("corpora", [])),
        "Labels": ", ".join(card.get("labels", [])) or cell(config.get("data.labels")),
        "Clips": f"{card['clips']:,}" if card.get("clips") else "",
        "Sets": f"split {cell(config.get('data.split'))} of {cell(config.get('data.sets'))}" if config else "",
        "Control": "its training labels were permuted: it can know nothing" if card.get("shuffled_labels") else "",
        "Encoder": encoder + (", frozen" if speech.get("frozen") else ", trained" if speech else ""),
        "Features normalised by": speech.get("normalize", "").replace("none", ""),
        "Language model": (llm if llm != "None" else "made on the spot") if one.stage == 2 else "",
        "Built on": cell(config.get("stage1")) if one.stage == 2 else cell(config.get("init_from")).replace("null", ""),
        "Trained for": steps,
        "Processes": str(summary.get("world_size", "")),
        "Seed": config.get("seed", ""),
        "Validation": ", ".join(f"{name} {value:.3f}" for name, value in val.items()),
        "Written by": f"mser_dist {card['version']}" if card.get("version") else "",
    }
    return {name: value for name, value in facts.items() if value}


def _encoder_named(config: Mapping[str, str]) -> str:
    named = config.get("encoder.pretrained", "None")
    return "an encoder made on the spot" if named == "None" else named


# ---- beside


def _beside(
    evaluated: Evaluated, folders: Sequence[Path]
) -> tuple[dict[str, Sequence[sections.Row]], list[tuple[str, str, Table, int | None]], list[str]]:
    """The rows of other folders on the same clips, by what they are called; a comparison of all; and notes."""
    others: dict[str, Sequence[sections.Row]] = {}
    notes: list[str] = []
    for folder in folders:
        other = read(folder)
        name = "" if other.kind == "baseline" and len(folders) == 1 else folder.resolve().name
        same = {
            place for place in sections.in_order(evaluated.rows) if _clips(other, place) == _clips(evaluated, place)
        }
        kept = [row for row in other.rows if (row["corpus"], row["language"]) in same]
        if len(kept) < len(other.rows):
            left = len({(row["corpus"], row["language"]) for row in other.rows} - same)
            notes.append(f"{folder}: {left} of its corpora and languages are left out, their clips being others")
        others[name] = kept
    if not folders or not evaluated.answers:
        return others, [], notes
    from mser_dist.evaluation import compare_report, gathered
    from mser_dist.evaluation.compare import compare

    systems, said = gathered.of_folders([evaluated.folder, *folders])
    found = compare(systems, notes=said)
    tables = [
        (one.title, one.metric, compare_report.table(found, one, 0), compare_report.best_of(one))
        for one in found.sections
    ]
    return others, tables, [*notes, *found.notes]


def _clips(evaluated: Evaluated, place: tuple[Any, Any]) -> Any:
    """What tells the clips of a place from others: their keys and labels, or where they are not known, their number."""
    corpus, language = place
    for given in evaluated.answers.values():
        mine = given.at(corpus or "", language or "")
        return sorted(zip(given.key[mine].tolist(), given.label[mine].tolist(), strict=True))
    return [row["n"] for row in evaluated.rows if (row["corpus"], row["language"]) == place][:1]


# ---- again


def _commands(evaluated: Evaluated) -> Iterator[tuple[str, str]]:
    """(what it does, the command) to come to these numbers again, in other folders."""
    again = {one.named: f"{one.named.rstrip('/')}-again" for one in evaluated.behind}
    for one in evaluated.behind:
        processes = one.summary.get("world_size", 1)
        more = [f"stage1={again[on]}"] if one.stage == 2 and (on := one.config.get("stage1", "")) in again else []
        more += ["--nproc", str(processes)] if processes > 1 else []
        config = f"{one.named.rstrip('/')}/config.yaml"
        yield f"train stage {one.stage} anew", shlex.join(["mser", "train", config, f"out={again[one.named]}", *more])
    named = shown_path(evaluated.folder)
    if evaluated.kind == "evaluation":
        runs = [
            f"stage{stage}={again[evaluated.config[key]]}"
            for stage in (1, 2)
            if evaluated.config.get(key := f"stage{stage}") in again
        ]
        yield "evaluate anew", shlex.join(["mser", "eval", f"{named}/config.yaml", *runs, f"out={named}-again"])
    else:
        only = cell(evaluated.config.get("only")).replace(" ", "")
        words = ["mser", "baseline", "stage1.yaml", "--on", "on.yaml", *(["--only", only] if only else [])]
        what = f"fit anew; the two files are the parts stage1: and on: of {named}/config.yaml"
        yield what, shlex.join([*words, f"out={named}-again"])


def _tracking(evaluated: Evaluated) -> list[tuple[str, str]]:
    """(what, its MLflow run) of all that has one."""
    runs = [(f"stage {one.stage}, {one.named}", one.status) for one in evaluated.behind]
    return [
        (what, f"run {status['run_id']} of {status.get('experiment', '')} at {status.get('tracking_uri', '')}")
        for what, status in [*runs, (shown_path(evaluated.folder), evaluated.status)]
        if status.get("run_id")
    ]
