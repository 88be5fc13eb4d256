"""What a person chose of a config: the keys that he named, in a file or in words, and the command that says so.

Everything else is a default, and stands in the run's config.yaml. MLflow gets what was chosen as params: its plots are
of runs that all have a key, and its tables have a column for each.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

# Keys, or what they begin with, that touch nothing of what is learned or scored.
WITHOUT_RESULT = (
    *("out", "stage", "tracking.", "data.workers", "data.cache_", "encoder.cache", "train.log_every", "train.save_"),
    *("train.keep", "train.background_save", "train.profile_steps", "train.trust_", "engine.timeout_minutes"),
    *("engine.peer_seconds", "engine.peak_tflops"),
)
_STAGES = ("stage1", "stage2")  # the runs that are built on or evaluated: they begin as `stage` does


@dataclass(frozen=True)
class Said:
    """How a config was asked for: the file or preset, the words behind it, and the keys that either names."""

    name: str
    words: tuple[str, ...]
    given: frozenset[str]


def note(config: Any, name: str, words: Sequence[str], tree: Mapping[str, Any], of_run: bool) -> None:
    """Keep with a config how it was asked for. of_run: in a run's config.yaml nobody has chosen what stands there."""
    given = {word.partition("=")[0] for word in words} | (set() if of_run else {key for key, _ in _leaves(tree)})
    config.said = Said(name, tuple(words), frozenset(given))


def chosen(config: Any) -> dict[str, str]:
    """The keys that were named, and those that are not as by default, with values as MLflow's plots can draw them.

    Numbers are bare, lists are joined by commas; what is null or empty has none, as a word for it would break an axis.
    Keys that touch nothing of what is learned or scored are left out.
    """
    if not hasattr(config, "tracking"):  # of a baseline: two configs
        parts = {name: getattr(config, name) for name in ("stage1", "on")}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in chosen(part).items()}
    said: Said | None = getattr(config, "said", None)
    return chosen_of(type(config), asdict(config), said.given if said else ())


def chosen_of(kind: Any, tree: Mapping[str, Any], given: Sequence[str] | frozenset[str] = ()) -> dict[str, str]:
    """`chosen` of a config of a class as it was saved, of which the `given` keys were named."""
    defaults = dict(_leaves(asdict(kind())))
    named = tuple(f"{key}." for key in given)
    return {
        key: text
        for key, value in _leaves(tree)
        if (key in given or f"{key}.".startswith(named) or value != defaults.get(key))
        and (key in _STAGES or not key.startswith(WITHOUT_RESULT))
        and (text := short(value))
    }


def short(value: Any) -> str:
    """A value in few letters: "" of what is null or empty."""
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, (list, tuple)):
        return ",".join(map(short, value))
    return str(value)


def command(config: Any, verb: str, ranks: int = 1) -> str:
    """The command that asks for the same again, as a person would type it; for a config made in Python, that of its
    folder."""
    more = ["--nproc", str(ranks)] if ranks > 1 else []
    said: Said | None = getattr(config, "said", None)
    if said is None:
        return shlex.join(["mser", verb, f"{config.out}/config.yaml", "out=…", *more])
    return shlex.join(["mser", verb, said.name, *_own(said.words), f"out={config.out}", *more])


def baseline_command(config: Any) -> str:
    """`command` for baselines, of two configs."""
    parts: list[Said | None] = [getattr(part, "said", None) for part in (config.stage1, config.on)]
    if None in parts:
        return ""
    own, on = (part for part in parts if part)
    only = ["--only", ",".join(config.only)] if config.only else []
    words = [*_own(own.words), *(f"on.{word}" for word in _own(on.words))]
    return shlex.join(["mser", "baseline", own.name, "--on", on.name, *words, f"out={config.out}", *only])


def _own(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith(("out=", "tracking.parent="))]


def _leaves(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a mapping that is empty is a value."""
    tree = asdict(tree) if is_dataclass(tree) and not isinstance(tree, type) else tree
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
