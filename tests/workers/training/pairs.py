"""Pairs of answers for the tests of preference runs: random ones, ones that can be learned, and files of them."""

import json
from typing import Any

import numpy as np
import torch

from app.domain.runplan import RowsPlan
from tests.workers.training.runs import ListRows, make_plan, make_run
from workers.data.preferences import PairTokens
from workers.data.tokens import TokenStore
from workers.training.preferences import CHOSEN, REJECTED
from workers.training.reference import meet_reference

BETA = 0.3


def store(rows):
    """Rows of (token ids, loss weights) as a store."""
    lengths = [len(ids) for ids, _ in rows]
    return TokenStore(
        input_ids=np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        weights=np.concatenate([w for _, w in rows]).astype(np.float32),
        lines=np.arange(1, len(rows) + 1),
    )


def make_pairs(count=24, *, seed=0, longest=14):
    """Random prompts, each with two answers of other lengths."""
    generator = np.random.default_rng(seed)
    sides: tuple[list[Any], list[Any]] = ([], [])
    for _ in range(count):
        prompt = generator.integers(3, 300, int(generator.integers(2, 9)))
        for side in sides:
            answer = generator.integers(3, 300, int(generator.integers(1, longest)))
            side.append(
                (
                    np.concatenate([prompt, answer]),
                    np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))]),
                )
            )
    return PairTokens(*(store(side) for side in sides))


def make_pair_run(scratch, *, pairs=None, kind="full", beta=BETA, start=True, general=True, **more):
    """A run of pairs that has met its reference and stands at step 0."""
    pairs = pairs or make_pairs()
    training = {"type": kind, "beta": beta, "weight_decay": 0.0} | more.pop("training", {})
    plan = make_plan(
        scratch,
        training=training,
        strategies=more.pop("strategies", ()),
        **more.pop("plan", {}),
    )
    stores = {CHOSEN: pairs.chosen, REJECTED: pairs.rejected}
    if general:
        stores["general"] = ListRows(48, seed=2)
    run = make_run(plan, stores=stores, start=False, **more)
    meet_reference(run, pairs, None)
    if start:
        for strategy in run.strategies:
            strategy.on_task_start(run.ctx)
    return run


def log_prob(model, ids, weights):
    """Of what counts of one row, alone in its own forward: the written-out way."""
    tokens = torch.from_numpy(np.asarray(ids, np.int64))[None]
    log_p = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    return sum(log_p[at - 1, tokens[0, at]] for at in range(1, len(ids)) if weights[at] > 0)


def write_pairs(path, count, seed):
    """A file of pairs: colours are preferred to things."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        asked = " ".join(generator.choice(["say", "one", "word", "now", "please"], 3))
        good, bad = generator.choice(["red", "green", "blue"]), generator.choice(["river", "lamp"])
        messages = [{"role": "user", "content": f"{asked} {generator.integers(100)}"}]
        lines.append(
            json.dumps(
                {
                    "input": {"messages": messages},
                    "preferred_output": [{"role": "assistant", "content": str(good)}],
                    "non_preferred_output": [{"role": "assistant", "content": str(bad)}],
                }
            )
        )
    path.write_text("\n".join(lines) + "\n")
    return RowsPlan(path=str(path), sha256=f"{seed:064d}")
