"""Generated answers: the greedy continuation of each prompt on its own, whatever the batches."""

from typing import Any

import numpy as np
import pytest
import torch

from app.domain.benchmarks import Scorer
from tests.workers.evaluation.cases import Tiny, make_benchmark, make_tiny, words
from workers.evaluation.evaluate import evaluate
from workers.evaluation.forward import Reader, scoring
from workers.evaluation.generation import StopRule, generate, score_questions
from workers.evaluation.items import Prepared, QuestionItem, prepare
from workers.evaluation.scorers import token_f1

LIMIT = 9


def make_prepared(tiny: Tiny, n: int, *, stop_ids: frozenset[int] = frozenset({2})) -> Prepared:
    prompts = [tiny.tokenizer(words(1 + i % 7, i))["input_ids"] for i in range(n)]
    items = tuple(QuestionItem(p, (), 1 + (i * 5) % LIMIT) for i, p in enumerate(prompts))
    return Prepared(questions=items, stop_ids=stop_ids, one_line=False)


def alone(tiny: Tiny, item: QuestionItem, stop_ids: frozenset[int]) -> list[int]:
    """The oracle: transformers' own generation, one prompt at a time."""
    prompt = torch.tensor([item.prompt])
    out = tiny.model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=item.max_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=0,
    )
    ids: list[int] = out[0, prompt.shape[1] :].tolist()
    return ids[: next((k for k, token in enumerate(ids) if token in stop_ids), len(ids))]


@pytest.mark.parametrize("batch", [1, 3, 24])
def test_batched_generation_equals_prompts_on_their_own(batch) -> None:
    tiny = make_tiny()
    probe = make_prepared(tiny, 24)
    free = [alone(tiny, item, frozenset({2})) for item in probe.questions]
    common = max({t for row in free for t in row}, key=[t for row in free for t in row].count)
    stop_ids = frozenset(
        {2, common}
    )  # a token that really comes up, so that rows end at different columns
    prepared = make_prepared(tiny, 24, stop_ids=stop_ids)
    wanted = [alone(tiny, item, stop_ids) for item in prepared.questions]
    assert any(len(w) < item.max_tokens for w, item in zip(wanted, prepared.questions, strict=True))
    assert any(
        len(w) == item.max_tokens for w, item in zip(wanted, prepared.questions, strict=True)
    )
    found: list[list[int]] = []
    with scoring(tiny.model):
        reader = Reader(tiny.model)
        stop = StopRule(prepared, tiny.tokenizer, reader)
        for start in range(0, 24, batch):
            found += generate(reader, prepared.questions[start : start + batch], stop)
    assert found == wanted


def test_answers_do_not_depend_on_the_token_budget() -> None:
    tiny = make_tiny()
    prepared = make_prepared(tiny, 24)
    texts = [
        tiny.tokenizer.decode(alone(tiny, item, frozenset({2}))) for item in prepared.questions
    ]
    accepted = Prepared(
        questions=tuple(
            QuestionItem(item.prompt, (text if i % 2 else "no",), item.max_tokens)
            for i, (item, text) in enumerate(zip(prepared.questions, texts, strict=True))
        ),
        stop_ids=prepared.stop_ids,
        one_line=False,
    )
    with scoring(tiny.model):
        reader = Reader(tiny.model)
        results = [
            score_questions(reader, accepted, range(24), tiny.tokenizer, budget)
            for budget in (1, 90, 10_000)
        ]
    assert results[0].mean() == 0.5
    for result in results[1:]:
        assert np.array_equal(result, results[0])


def test_an_answer_with_words_in_common_is_worth_a_share() -> None:
    tiny = make_tiny()
    prepared = make_prepared(tiny, 8)
    texts = [
        tiny.tokenizer.decode(alone(tiny, item, frozenset({2}))).strip()
        for item in prepared.questions
    ]
    asked = Prepared(
        questions=tuple(
            QuestionItem(item.prompt, (f"{text} zebra",), item.max_tokens)
            for item, text in zip(prepared.questions, texts, strict=True)
        ),
        stop_ids=prepared.stop_ids,
        one_line=False,
    )
    with scoring(tiny.model):
        reader = Reader(tiny.model)
        found = score_questions(
            reader, asked, range(8), tiny.tokenizer, 500, scorer=Scorer.TOKEN_F1
        )
    wanted = [token_f1(text, [f"{text} zebra"]) for text in texts]
    assert found == pytest.approx(wanted)
    assert ((found > 0) & (found < 1)).any()


class Scripted(torch.nn.Module):
    """Answers every prompt with the same text, token by token, whatever it reads."""

    def __init__(self, tiny: Tiny, prompt_tokens: int, text: str) -> None:
        super().__init__()
        self.config = tiny.model.config
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script = tiny.tokenizer(text)["input_ids"]
        self.prompt_tokens = prompt_tokens
        self.read = 0

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        rows, width = input_ids.shape
        self.read += width
        logits = torch.zeros(rows, width, self.config.vocab_size)
        logits[:, -1, self.script[self.read - self.prompt_tokens]] = 1.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("red</s>", ["Red"], 1.0),
        ("\n red\nblue</s>", ["red"], 1.0),  # the first line with visible text
        ("red<|end|>blue", ["red"], 1.0),  # what closes the turn in the chat template
        ("red or blue</s>", ["red"], 0.0),
        ("redredredred", ["red"], 0.0),  # goes on past the longest answer
        (
            "red\nblue</s>",
            ["red\nblue"],
            1.0,
        ),  # an accepted answer of two lines turns line breaks into text
        ("blue</s>", ["red", "blue"], 1.0),
        ("</s>", ["red"], 0.0),
    ],
)
def test_what_counts_as_the_answer(tmp_path, text, answers, score) -> None:
    tiny = make_tiny()
    item = {"id": "a", "question": "q", "answer": answers[0], "answers": answers}
    plan = make_benchmark(tmp_path / "b", Scorer.EXACT_MATCH, [item])
    prompt = prepare(plan, tiny.tokenizer, chat_template=None).questions[0].prompt
    model = Scripted(tiny, len(prompt), text + "red" * 9)
    scores, tokens = evaluate(
        model, tiny.tokenizer, plan, np.asarray([0]), chat_template=None, token_budget=100
    )
    assert scores.tolist() == [score]
    assert tokens is None


def test_the_length_of_an_answer_follows_from_the_accepted_ones(tmp_path) -> None:
    tiny = make_tiny()
    items: list[dict[str, Any]] = [
        {"id": "a", "question": "q", "answer": "ab", "answers": ["ab", "abcd"]},
        {"id": "b", "question": "q", "answer": "ab", "max_tokens": 3},
    ]
    plan = make_benchmark(tmp_path / "b", Scorer.EXACT_MATCH, items)
    first, second = prepare(plan, tiny.tokenizer, chat_template=None).questions
    assert (first.max_tokens, second.max_tokens) == (8, 3)
