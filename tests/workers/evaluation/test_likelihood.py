"""Nats and token counts against a plain forward of each text, and the validation loss."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from app.domain.benchmarks import Scorer
from app.domain.digests import file_sha256
from app.domain.runplan import RowsPlan
from tests.workers.evaluation.cases import make_benchmark, make_tiny, words
from workers.data.tokens import load_tokens
from workers.evaluation.evaluate import evaluate
from workers.evaluation.items import prepare
from workers.evaluation.likelihood import validation_loss


def text_items(n: int) -> list[dict[str, Any]]:
    texts: list[dict[str, Any]] = [{"id": f"t{i}", "text": words(1 + i % 9, i)} for i in range(n)]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a dog"}]
    return [*texts, {"id": "chat", "messages": chat}]


def reference(model, ids, weights) -> tuple[float, int, int]:
    """Nats, targets predicted right, and targets, by a plain float64 pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(np.asarray(ids))[None].long()).logits[0].double()
    found = logits.log_softmax(-1)
    columns = np.flatnonzero(np.asarray(weights) > 0)
    nats = -sum(float(found[c - 1, ids[c]]) for c in columns)
    right = sum(int(found[c - 1].argmax()) == int(ids[c]) for c in columns)
    return nats, right, len(columns)


@pytest.mark.parametrize("budget", [1, 70, 4096])
def test_nats_and_counts_equal_those_of_a_plain_pass(tmp_path, budget) -> None:
    tiny = make_tiny()
    plan = make_benchmark(tmp_path / "b", Scorer.NLL, text_items(20))
    scores, tokens = evaluate(
        tiny.model, tiny.tokenizer, plan, np.arange(21), chat_template=None, token_budget=budget
    )
    assert tokens is not None
    items = prepare(plan, tiny.tokenizer, chat_template=None).texts
    for item, nats, count in zip(items, scores, tokens, strict=True):
        wanted, _, num = reference(tiny.model.eval(), item.ids, item.weights)
        assert nats == pytest.approx(wanted, rel=1e-5)
        assert count == num
    assert tokens[-1] == len("a dog") + 1  # the answer and what closes its turn


def test_a_broken_model_scores_infinite_nats(tmp_path) -> None:
    tiny = make_tiny()
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight.fill_(float("nan"))
    plan = make_benchmark(tmp_path / "b", Scorer.NLL, text_items(2))
    scores, _ = evaluate(
        tiny.model, tiny.tokenizer, plan, np.arange(3), chat_template=None, token_budget=99
    )
    assert np.isinf(scores).all()


@pytest.mark.parametrize("budget", [1, 100, 4096])
def test_the_validation_loss_is_the_mean_over_supervised_tokens(tmp_path, budget) -> None:
    tiny = make_tiny()
    path = tmp_path / "rows"
    rows = [
        {"prompt": words(1 + i % 4, i), "completion": words(1 + i % 3, 99 + i)} for i in range(15)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    store = load_tokens(
        RowsPlan(path=str(path), sha256=file_sha256(path)),
        tiny.tokenizer,
        chat_template=None,
        max_seq_length=64,
        cache_directory=tmp_path,
    )
    tiny.model.train()
    loss, accuracy = validation_loss(tiny.model, store, token_budget=budget)
    assert tiny.model.training
    parts = [reference(tiny.model.eval(), *store.row(i)) for i in range(len(store))]
    nats, right, count = (sum(column) for column in zip(*parts, strict=True))
    assert loss == pytest.approx(nats / count, rel=1e-6)
    assert accuracy == pytest.approx(right / count)
