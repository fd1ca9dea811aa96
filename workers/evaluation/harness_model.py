"""A task's own metric, item by item: lm-evaluation-harness asks, a model of ours answers through its interface."""

# Shape letters: N scored tokens, V vocabulary.

import numbers
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from app.errors import BadRequest
from workers.evaluation.forward import Reader, log_probs, scoring
from workers.evaluation.generation import StopRule, generate
from workers.evaluation.harness import document_id, load_tasks
from workers.evaluation.items import Prepared, QuestionItem

MAX_NEW_TOKENS: Final = 256  # the harness's own default


def score_task(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    name: str,
    *,
    include_path: Path | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Scores of a task's documents under each of its own metrics that gives an item a number.

    Args:
        model: A causal model; its mode is restored.
        tokenizer: Its tokenizer.
        name: Of a task or group.
        include_path: A directory with task files; None looks among the harness's own.
        batch_size: Prompts that are answered together.

    Returns:
        By metric, then by the id that an import gives the document, so that they can be posted as results.

    Raises:
        BadRequest: There is no such task, or it draws answers at random.
    """
    tasks = load_tasks(name, include_path)
    base = import_module("lm_eval.api.model").LM
    answering = type("RetainModel", (_Answers, base), {})(tokenizer, batch_size)
    with scoring(model):
        answering.reader = Reader(model)
        found = import_module("lm_eval.evaluator").evaluate(
            answering, {task.config.task: task for task in tasks}, bootstrap_iters=0
        )
    scores: dict[str, dict[str, float]] = {}
    for task, samples in found["samples"].items():
        for sample in samples:
            key = document_id(task, sample["doc"])
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, numbers.Real):
                    # of several ways to read an answer the first counts, as in the harness's own tables
                    scores.setdefault(metric, {}).setdefault(key, float(value))
    return scores


class _Answers:
    """What the harness asks of a model; prompts are taken as they stand, without a chat template."""

    reader: Reader

    def __init__(self, tokenizer: Any, batch_size: int) -> None:  # noqa: ANN401
        super().__init__()
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether greedy decoding would say it."""
        return [self._score(*self._split(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Nats of each whole text, read after the token that begins or ends one."""
        return [self._score([self._start], self._encode(r.args[0]))[0] for r in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy continuation of each context, up to the first of its stops."""
        ends = {self._tokenizer.eos_token_id} - {None}
        stop = StopRule(
            Prepared(stop_ids=frozenset(ends), one_line=False), self._tokenizer, self.reader
        )
        said: list[str] = []
        for start in range(0, len(requests), self._batch_size):
            batch = [request.args for request in requests[start : start + self._batch_size]]
            items = [self._question(context, settings) for context, settings in batch]
            texts = self._tokenizer.batch_decode(
                generate(self.reader, items, stop), skip_special_tokens=True
            )
            said += [
                _cut(text, settings.get("until") or ())
                for text, (_, settings) in zip(texts, batch, strict=True)
            ]
        return said

    @property
    def _start(self) -> int:
        begin = self._tokenizer.bos_token_id
        return int(self._tokenizer.eos_token_id if begin is None else begin)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the cut, as the harness cuts: white space goes to the continuation."""
        if not context:
            return [self._start], self._encode(continuation)
        bare = context.rstrip()
        whole = self._encode(context + continuation)
        cut = len(self._encode(bare))
        return whole[:cut], whole[cut:]

    def _score(self, before: list[int], after: list[int]) -> tuple[float, bool]:
        ids = [*before, *after][-self.reader.max_tokens :]
        first = len(ids) - len(after)
        ids_T = self.reader.tensor([ids])
        positions = self.reader.tensor(range(max(first, 1) - 1, len(ids) - 1))
        logits_NV = self.reader.logits(ids_T, positions)
        targets_N = ids_T[0, max(first, 1) :]
        nats = float(log_probs(logits_NV, targets_N).double().sum())
        return nats, bool(torch.equal(logits_NV.argmax(dim=-1), targets_N))

    def _question(self, context: str, settings: dict[str, Any]) -> QuestionItem:
        if settings.get("do_sample") and float(settings.get("temperature") or 0) > 0:
            raise BadRequest("task: it draws answers at random; scores must not change.", "task")
        room = min(int(settings.get("max_gen_toks") or MAX_NEW_TOKENS), self.reader.max_tokens - 1)
        prompt = self._encode(context) or [self._start]
        return QuestionItem(prompt[-(self.reader.max_tokens - room) :], (), room)


def _cut(text: str, stops: Sequence[str] | str) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text
