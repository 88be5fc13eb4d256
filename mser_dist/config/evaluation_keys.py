"""What can be set in an evaluation: :class:`Evaluation` for ``mser eval``, :class:`Baseline` for ``mser baseline``."""

from dataclasses import dataclass
from typing import Literal

from mser_dist.config.data_keys import DataConfig
from mser_dist.config.fields import Bool, List, PositiveInt, Section, opt
from mser_dist.config.keys import Dtype, Kernel, Stage1, TrackingConfig
from mser_dist.config.model_keys import CacheConfig
from mser_dist.config.validate import check_values
from mser_dist.errors import UserError

Requirement = Literal["zero_shot", "unseen_corpus", "unseen_speakers"]


@dataclass(kw_only=True)
class ProtocolConfig(Section):
    """How stage 2 is asked for the label of a clip, and which score decides."""

    score: Literal["sum", "mean", "prior"] = opt(
        "sum",
        "of a label's tokens, its end included: sum of the log-likelihoods | mean | prior: sum less that of no speech",
    )
    instructions: PositiveInt | list[str] = opt(
        1, "so many of those that the run knows, or a list of texts with {} for the options; scores are their mean"
    )
    decode: List[Literal["constrained", "free"]] = opt(
        [], "also decode greedily: constrained (to the labels, at no cost) | free (in the LLM's own words, much slower)"
    )

    def check(self) -> None:
        """Raise `UserError` for instructions that are none, or one that comes twice."""
        if isinstance(self.instructions, int):
            return
        if not self.instructions:
            raise UserError("protocol.instructions names no instruction: give at least one, or a number")
        for text in self.instructions:
            if text.count("{}") != 1 or "\n" in text:
                raise UserError(
                    f"protocol.instructions: {text!r} is to be one line with one {{}}, where the options go"
                )
            if self.instructions.count(text) > 1:
                raise UserError(f"protocol.instructions names {text!r} twice")


@dataclass(kw_only=True)
class Evaluation(Section):
    """Zero-shot evaluation of finished runs, per corpus and language."""

    out: str = opt("runs/eval", "folder for the table, the predictions and the plots")
    stage1: str | None = opt(None, "run folder of a stage 1 (cosine to label prompts); null: skip")
    stage2: str | None = opt(None, "run folder of a stage 2 (log-likelihood of every label); null: skip")
    data: DataConfig = opt(DataConfig, "what to evaluate on")
    encoder: CacheConfig = opt(CacheConfig, "where the features of a frozen encoder are kept")
    native_labels: Bool = opt(
        False, "a clip is given one of the labels that clips of its corpus and language have, not of all `data.labels`"
    )
    require: Requirement | None = opt(
        None,
        "what every row has to be by the runs' ledgers, else nothing is scored: zero_shot, of a corpus or of speakers "
        "never trained on",
    )
    protocol: ProtocolConfig = opt(ProtocolConfig, "how stage 2 is asked, and which score decides")
    batch: PositiveInt = opt(32, "clips per forward pass")
    zero3: Bool = opt(False, "share the LLM's weights out over the ranks, for one that no GPU holds alone")
    dtype: Dtype = opt("float32", "number format that the models compute in")
    attention: Kernel = opt("auto", "attention kernel; auto: the fastest that runs here")
    tracking: TrackingConfig = opt(TrackingConfig, "MLflow")

    def check(self, runs: bool = True) -> None:
        """Raise `UserError` on wrong values, and unless a run is named where `runs` are evaluated."""
        check_values(self)
        self.data.check()
        self.protocol.check()
        self.tracking.check()
        if runs and not (self.stage1 or self.stage2):
            raise UserError("stage1 and stage2 are both unset: name the run folder of a finished run")


# A name stands for all that begin with it.
BASELINES = ("majority", "logistic_regression", "svm", "egemaps_logistic_regression", "egemaps_svm")


@dataclass(kw_only=True)
class Baseline(Section):
    """Classifiers fitted to the training clips of a stage 1, as its frozen encoder hears them, and evaluated."""

    out: str = opt("runs/baseline", "folder for the table, the predictions and the plots")
    only: List[str] = opt([], "systems: of BASELINES, or what their names begin with; empty: all that can be")
    stage1: Stage1 = opt(Stage1, "clips to fit to, encoder, seed")
    on: Evaluation = opt(Evaluation, "clips to evaluate on")

    def check(self) -> None:
        self.stage1.check()
        self.on.check(runs=False)
        encoder = self.stage1.encoder
        if not encoder.freeze:
            raise UserError(
                "encoder.freeze=false: a baseline is fitted to what a frozen encoder hears, before any training: set "
                "encoder.freeze=true"
            )
        if self.stage1.init_from:
            raise UserError(
                f"init_from={self.stage1.init_from}: a baseline hears the encoder that the config itself names: set "
                "init_from=null"
            )
        for name in self.only:
            if not any(is_called(system, name) for system in BASELINES):
                raise UserError(f"--only {name}: use some of {', '.join(BASELINES)}, or egemaps")


def is_called(system: str, name: str) -> bool:
    """Whether a name, of `Baseline.only`, stands for a system."""
    return f"{system}_".startswith(f"{name}_")
