"""Multiple choice: items per CPU second of our scorer and of lm-eval at its best batch size, answers compared.

Run as `python -m tests.benchmarks.evaluation_speed` where `lm-eval` is installed.
"""

import functools
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.domain.benchmarks import Scorer
from tests.workers.evaluation.cases import make_benchmark
from workers.evaluation.choices import score_choices
from workers.evaluation.forward import Reader, scoring
from workers.evaluation.items import ChoiceItem, prepare

NUM_ITEMS = 64
BATCH_SIZES = (8, 32, 64)
TOKEN_BUDGET = 4096
RELATIVE_TOLERANCE = 1e-4
Call = Callable[[], list[float]]


def run(rounds: int = 5) -> dict[str, Any]:
    """Medians and ranges over interleaved rounds, one thread, process CPU time.

    The model is size S of the performance page (5.8 M parameters, random weights); 64 items of four choices
    of 2 to 12 tokens after contexts of about 85 tokens. Both sides get the same token ids; lm-eval is asked
    through its own model class, without the start-up of its tasks, which favours it.

    Returns:
        Items per CPU second by scorer, the ratio to lm-eval's best, the largest relative difference of a
        log-likelihood and whether all answers agree; or `skipped` with the reason.
    """
    if importlib.util.find_spec("lm_eval") is None:
        return {"skipped": "lm-eval is not installed"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(rounds)
    finally:
        torch.set_num_threads(threads)


def _measure(rounds: int) -> dict[str, Any]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = _make_model(), _make_tokenizer()
    items = _make_items(tokenizer)
    requests = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(tokenizer.decode(item.context), tokenizer.decode(choice)),
            idx=k,
        )
        for item in items
        for k, choice in enumerate(item.choices)
    ]
    peers = {
        size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=512)
        for size in BATCH_SIZES
    }

    def ours() -> list[float]:
        with scoring(model):
            sums = score_choices(Reader(model), items, TOKEN_BUDGET)
        return [float(value) for row in sums for value in row]

    def theirs(size: int) -> list[float]:
        found = peers[size].loglikelihood(requests, disable_tqdm=True)
        return [float(value) for value, _ in found]

    calls: dict[str, Call] = {"retain": ours}
    calls |= {f"lm_eval_{size}": functools.partial(theirs, size) for size in BATCH_SIZES}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, list[float]] = {name: call() for name, call in calls.items()}  # warm-up
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.process_time()
            calls[name]()
            rates[name].append(NUM_ITEMS / (time.process_time() - started))
    return _summarise(rates, values, items)


def _summarise(
    rates: dict[str, list[float]], values: dict[str, list[float]], items: list[ChoiceItem]
) -> dict[str, Any]:
    medians = {name: statistics.median(row) for name, row in rates.items()}
    best = max((name for name in medians if name != "retain"), key=lambda name: medians[name])
    ratios = [a / b for a, b in zip(rates["retain"], rates[best], strict=True)]
    ours, theirs = np.asarray(values["retain"]), np.asarray(values[best])
    edges = np.cumsum([len(item.choices) for item in items])[:-1]
    picks = [[int(np.argmax(row)) for row in np.split(found, edges)] for found in (ours, theirs)]
    difference = float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
    return {
        "items_per_cpu_second": {
            name: {"median": medians[name], "min": min(row), "max": max(row)}
            for name, row in rates.items()
        },
        "lm_eval_best": best,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "same_answers": picks[0] == picks[1],
        "max_relative_difference": difference,
        "within_tolerance": difference <= RELATIVE_TOLERANCE,
        "mean_log_likelihood": float(ours.mean()),
    }


def _make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096,
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=6,
                num_attention_heads=8,
                num_key_value_heads=8,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        ).eval()


def _make_tokenizer() -> Any:
    """One token a word, so that lengths are as asked for and text and tokens say the same."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "Q", "A", *(f"\u2581w{i}" for i in range(4091))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def _make_items(tokenizer: Any) -> list[ChoiceItem]:
    """Contexts of 60 to 110 tokens, choices of 2 to 12, through the same path as in a run."""
    generator = np.random.Generator(np.random.PCG64(0))

    def text(low: int, high: int) -> str:
        return "".join(f" w{i}" for i in generator.integers(0, 4091, generator.integers(low, high)))

    rows = [
        {
            "id": str(k),
            "question": text(60, 111),
            "choices": [text(2, 13) for _ in range(4)],
            "answer": 0,
        }
        for k in range(NUM_ITEMS)
    ]
    with tempfile.TemporaryDirectory() as directory:
        plan = make_benchmark(Path(directory) / "items.jsonl", Scorer.MULTIPLE_CHOICE, rows)
        return list(prepare(plan, tokenizer, chat_template=None).choices)


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
