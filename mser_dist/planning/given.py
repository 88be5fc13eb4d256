"""What a plan takes as given of clips and prompts: counted in the sets where they are here, else assumed, and said."""

from dataclasses import dataclass, field

from mser_dist import config as cfg
from mser_dist.errors import UserError

SECONDS = 5.0  # of a clip: acted and spontaneous corpora have means of 2 to 7
PROMPT = 34  # tokens of an instruction with its options and the chat's turns: the shipped ones by Llama 3's tokenizer


@dataclass(frozen=True)
class Given:
    """clips: of an epoch, None where nobody says. seconds: of a clip. prompt_tokens: of an instruction."""

    clips: int | None = None
    seconds: float = SECONDS
    prompt_tokens: int = PROMPT
    llm_shape: str | None = None
    stage1: str | None = None
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(
        config: cfg.Stage1 | cfg.Stage2,
        *,
        clips: int | None = None,
        seconds: float | None = None,
        prompt_tokens: int | None = None,
        llm_shape: str | None = None,
        stage1: str | None = None,
    ) -> "Given":
        """What a person says, else what the config's sets hold, else what is assumed."""
        notes = []
        for name, number in (("--clips", clips), ("--clip-seconds", seconds), ("--prompt-tokens", prompt_tokens)):
            if number is not None and number <= 0:
                raise UserError(f"{name} {number}: it is above 0")
        if clips is None or seconds is None:
            counted = _counted(config)
            if counted is not None:
                clips, seconds = clips or counted[0], seconds or counted[1]
                notes.append(f"{counted[0]:,} clips of {counted[1]:.1f} s in the mean, by the sets' indexes")
        if seconds is None:
            seconds = SECONDS
            notes.append(f"assumed: clips of {SECONDS:g} s (--clip-seconds)")
        if prompt_tokens is None:
            prompt_tokens = PROMPT
            if config.stage == 2:
                notes.append(
                    f"assumed: instructions of {PROMPT} tokens, 4 different ones a micro-batch (--prompt-tokens)"
                )
        if clips is None and config.train.steps is None:
            notes.append(
                "how many clips there are is not known, so neither is the whole duration: --clips N, or train.steps"
            )
        return Given(clips, seconds, prompt_tokens, llm_shape, stage1, notes)


def _counted(config: cfg.Stage1 | cfg.Stage2) -> tuple[int, float] | None:
    """Clips and their mean seconds, where the sets are here."""
    from mser_dist.stream.examples import open_training_clips

    if any("://" in name for name in config.data.sets):
        return None
    try:
        clips = open_training_clips(config.data)
    except UserError:  # not here, as on the machine that one plans on
        return None
    return len(clips), float(clips.duration.mean())
