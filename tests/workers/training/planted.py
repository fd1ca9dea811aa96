"""Damage planted in a tiny model that knows facts: of the form of its answers, or of the facts themselves."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.policy import Policy
from app.domain.runplan import BenchmarkPlan
from tests.tiny import make_llama, make_tokenizer
from tests.workers.training.runs import CPU, make_plan
from workers.training.build import build_run
from workers.training.diagnosis import diagnose, find_regression
from workers.training.ranks import Ranks
from workers.training.suite import Measured, Suite, Watched

SUBJECTS, FIRST_SUBJECT = 160, 10  # one token a subject
ANSWERS, FIRST_ANSWER = 16, 180
ASKED, PREFIX, END = (4, 5), 6, 2
LEARNING_RATE = 1e-3
FORMAT, KNOWLEDGE = ("shifted", "prefixed"), ("overwritten", "noise")
POLICY = Policy(gate_items=10_000)


class Facts(NamedTuple):
    """A base model that knows all facts, and who is asked about what."""

    directory: Path
    answers: Any
    domain: Any
    general: Any
    items: Any  # of the benchmark: subjects that no general row names


class FactRows:
    """A store of question and answer."""

    def __init__(self, subjects, answers):
        self._ids = as_rows(subjects, answers)

    @property
    def lengths(self):
        return np.full(len(self._ids), self._ids.shape[1], np.int64)

    def row(self, index):
        weights = np.zeros(self._ids.shape[1], np.float32)
        weights[3:] = 1.0
        return self._ids[index].numpy().astype(np.int32), weights


def as_rows(subjects, answers, *, prefixed=False):
    prefix = [PREFIX] if prefixed else []
    pairs = zip(subjects, answers, strict=True)
    return torch.tensor(
        [[ASKED[0], FIRST_SUBJECT + int(s), ASKED[1], *prefix, int(a), END] for s, a in pairs]
    )


def nats(model, rows):
    logits = model(input_ids=rows[:, :-1]).logits[:, 2:]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 3:].flatten())


def right(model, subjects, answers):
    """1 where the first token of the answer is right."""
    rows = as_rows(subjects, answers)
    with torch.no_grad():
        said = model(input_ids=rows[:, :3]).logits[:, -1].argmax(-1)
    return (said == rows[:, 3]).float().numpy()


@functools.cache
def learn_facts(seed) -> Facts:
    generator = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_llama()
    answers = FIRST_ANSWER + generator.integers(0, ANSWERS, SUBJECTS)
    everybody = np.arange(SUBJECTS)
    train(
        model,
        as_rows(everybody, answers),
        generator,
        lambda: right(model, everybody, answers).mean() > 0.99,
        learning_rate=5e-3,
        batch=64,
    )
    directory = Path(tempfile.mkdtemp(prefix="facts-"))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    order = generator.permutation(SUBJECTS)
    return Facts(directory, answers, order[:40], order[40:96], order[96:])


def train(model, rows, generator, is_done, *, learning_rate=LEARNING_RATE, batch=16):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(1, 601):
        chosen = generator.choice(len(rows), min(batch, len(rows)), replace=False)
        nats(model, rows[torch.from_numpy(chosen)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0 and is_done():
            return


def plant(kind, model, facts, generator, depth):
    """Damages the model so that about `depth` of the benchmark is lost."""
    answers, items = facts.answers, facts.items
    lost, rest = np.split(items, [int(len(items) * depth)])

    def is_down():
        return right(model, items, answers[items]).mean() < 1 - depth

    if kind == "shifted":  # the right answer, named by the next word
        named = FIRST_ANSWER + (answers - FIRST_ANSWER + 1) % ANSWERS
        train(model, as_rows(facts.domain, named[facts.domain]), generator, is_down)
    elif kind == "prefixed":  # the right answer, behind a constant word
        rows = as_rows(facts.domain, answers[facts.domain], prefixed=True)
        train(model, rows, generator, is_down)
    elif kind == "overwritten":  # other answers learned for these subjects alone
        other = FIRST_ANSWER + (answers - FIRST_ANSWER + 1 + generator.integers(0, 14)) % ANSWERS
        other = np.where(generator.random(SUBJECTS) < 0.5, other, np.roll(answers, 1))
        other = np.where(other == answers, FIRST_ANSWER + (other + 1) % ANSWERS, other)
        kept = np.concatenate([facts.domain, rest])
        rows = torch.cat([as_rows(lost, other[lost]), as_rows(kept, answers[kept])])
        train(
            model, rows, generator, lambda: right(model, lost, other[lost]).mean() > 0.95, batch=32
        )
    else:  # what the weights hold of these subjects drowned in noise
        table = model.get_input_embeddings().weight
        noise = torch.from_numpy(generator.standard_normal((len(lost), table.shape[1])))
        with torch.no_grad():
            scale = table[FIRST_SUBJECT : FIRST_SUBJECT + SUBJECTS].std()
            table[FIRST_SUBJECT + torch.from_numpy(lost)] = noise.float() * scale


def make_fact_run(scratch, facts, *, general=True, strategies=(), policy=POLICY, training=None):
    plan = make_plan(
        scratch,
        base=facts.directory,
        policy=policy,
        strategies=strategies,
        training={"learning_rate": LEARNING_RATE, **(training or {})},
    )
    stores = {"training": FactRows(facts.domain, facts.answers[facts.domain])}
    if general:
        stores["general"] = FactRows(facts.general, facts.answers[facts.general])
    return build_run(plan, stores, Ranks(), CPU)


def make_fact_suite(run, facts):
    """All of its items are gate items; the baseline is what the run's model knows now."""
    asked = facts.items

    def score(_, indices):
        found = np.full(len(asked), np.nan, np.float32)
        chosen = asked[indices]
        found[indices] = right(run.model, chosen, facts.answers[chosen])
        return Measured(found, None)

    plan = BenchmarkPlan(
        benchmark_version_id="benchv_facts",
        name="facts",
        kind=BenchmarkKind.GENERAL,
        scorer=Scorer.EXACT_MATCH,
        weight=1.0,
        max_drop=None,
        path="/facts.jsonl",
        sha256="2" * 64,
    )
    everything = np.arange(len(asked))
    watched = Watched(
        plan,
        tuple(f"f{i}" for i in gate_names(len(asked))),
        np.zeros(len(asked)),
        score(plan, everything),
    )
    return Suite((watched,), score, gate_items=10_000)


@functools.cache
def gate_names(count):
    """Numbers whose ids fall into the gate half."""
    from app.domain.benchmarks import split_items

    ids = [f"f{i}" for i in range(4 * count)]
    return tuple(int(i) for i in split_items(ids, 10_000)[0][:count])


def diagnose_planted(scratch, kind, seed, depth):
    """The diagnosis of one planted damage."""
    facts = learn_facts(seed)
    run = make_fact_run(scratch, facts)
    suite = make_fact_suite(run, facts)
    generator = np.random.default_rng([seed, len(kind), int(10 * depth)])
    plant(kind, run.model, facts, generator, depth)
    marks = suite.measure("gate")
    reading = find_regression(run, suite, POLICY, marks)
    assert reading is not None
    return diagnose(run, suite, POLICY, reading, marks)
