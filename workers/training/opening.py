"""How an attempt begins: rows are read, the model is built, and the session is put together."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.domain.policy import Policy
from app.domain.rows import TRAINING_FILE
from app.domain.runplan import BasePlan, BenchmarkPlan, RowsPlan, RunPlan
from workers.data.preferences import PairTokens, load_pair_tokens
from workers.data.rendering import DEFAULT_CHAT_TEMPLATE
from workers.data.tokens import TokenStore, load_tokens
from workers.evaluation.evaluate import evaluate, validation_loss
from workers.strategies.modes import evaluating
from workers.training.blend import line_from_base
from workers.training.build import build_run
from workers.training.conversation import Conversation
from workers.training.forward import SelectedLogits
from workers.training.loop import Run
from workers.training.measuring import held_bytes
from workers.training.models import load_tokenizer
from workers.training.pairs import add_pairs
from workers.training.preferences import CHOSEN, REJECTED
from workers.training.ranks import Ranks
from workers.training.reference import meet_reference
from workers.training.session import Session, Validated
from workers.training.suite import Indices, Measured, Score, Suite, most_gate_items
from workers.training.tasks import store_name

VALIDATION = "validation"
TIMED_STEPS = 5  # before the evaluation budget is spent; the first is a warm-up


def open_session(plan: RunPlan, talk: Conversation, ranks: Ranks, device: torch.device) -> Session:
    """Loads rows and model at step 0 of the plan.

    Raises:
        TrainingFailed: The rows can't be trained on, or the model can't be built as asked.
    """
    _tell(plan, talk, "loading")
    held_before = held_bytes(device)
    tokenizer = load_tokenizer(plan.base)
    template = chat_template(plan.base)
    stores = _load_stores(plan, tokenizer, talk, ranks)
    validation, others = stores.pop(VALIDATION, None), stores.pop(f"{VALIDATION}-{REJECTED}", None)
    run = build_run(plan, stores, ranks, device)
    run.workload.held_before = held_before
    run.ctx.note = lambda code, text, data: talk.note("info", code, text, **data)
    add_pairs(plan, run, tokenizer, talk)
    policy = plan.policy or Policy()
    budget = plan.training.max_tokens_per_micro_batch
    if run.preferences is None:
        validate = _shown_validation(run, validation, budget)
    else:
        _tell(plan, talk, "reference")
        held_out = None if validation is None or others is None else PairTokens(validation, others)
        validate = meet_reference(run, PairTokens(stores[CHOSEN], stores[REJECTED]), held_out)

    return Session(
        plan=plan,
        run=run,
        talk=talk,
        tokenizer=tokenizer,
        suite=Suite.read(
            plan.benchmarks,
            make_score(run.student, tokenizer, template, budget, ranks),
            plan.gate_items or most_gate_items(policy),
        ),
        validation=validation,
        validate=validate,
        line=lambda: line_from_base(
            run.model, run.all_params, plan.base, is_lora=plan.training.type == "lora"
        ),
        is_planned=is_planned(plan),
        eval_interval=first_interval(plan, run.ctx.num_training_rows),
        first_eval_step=1 if _interval_is_fixed(plan) else TIMED_STEPS + 1,
    )


def _tell(plan: RunPlan, talk: Conversation, phase: str) -> None:
    talk.progress(
        now=True,
        branch=plan.branch,
        step=0,
        total_steps=plan.training.total_steps,
        seconds_remaining=None,
        trained_tokens=0,
        phase=phase,
    )


def _shown_validation(
    run: Run, rows: TokenStore | None, token_budget: int
) -> Callable[[], Validated]:
    """The loss on rows that show an answer."""

    def validate() -> Validated:
        if rows is None:
            return Validated()
        with evaluating(run.model), run.student.precision(run.ctx.device):
            return Validated(*validation_loss(run.model, rows, token_budget=token_budget))

    return validate


def make_score(
    student: SelectedLogits,
    tokenizer: Any,  # noqa: ANN401 - transformers has no types
    template: str | None,
    token_budget: int,
    ranks: Ranks,
) -> Score:
    """Measures a model as it stands at the call, its items shared among the ranks."""

    def score(benchmark: BenchmarkPlan, indices: Indices) -> Measured:
        device = next(student.model.parameters()).device
        with evaluating(student.model), student.precision(device):
            scores, tokens = evaluate(
                student.model,
                tokenizer,
                benchmark,
                indices,
                chat_template=template,
                token_budget=token_budget,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        merged = None if tokens is None else ranks.merge_scores(tokens)
        return Measured(ranks.merge_scores(scores), merged)

    return score


def chat_template(base: BasePlan) -> str | None:
    """The built-in template where the base has none; None uses the tokenizer's own."""
    return DEFAULT_CHAT_TEMPLATE if base.default_template else None


def is_planned(plan: RunPlan) -> bool:
    """Whether nothing is left for the evaluation budget to choose."""
    if plan.policy is None or not plan.benchmarks:
        return True
    has_interval = plan.eval_interval is not None or plan.policy.eval_interval is not None
    return has_interval and (plan.gate_items or plan.policy.gate_items) is not None


def first_interval(plan: RunPlan, num_rows: int) -> int:
    """Steps between evaluations as far as plan and policy say; an epoch without a suite; 0: not chosen yet."""
    if plan.eval_interval is not None:
        return plan.eval_interval
    asked = "epoch" if plan.policy is None else plan.policy.eval_interval
    if asked is None and plan.benchmarks:
        return 0
    return asked if isinstance(asked, int) else steps_per_epoch(plan, num_rows)


def steps_per_epoch(plan: RunPlan, num_rows: int) -> int:
    """Steps that read every training row once, the last one rounded up."""
    return max(math.ceil(num_rows / plan.training.batch_size), 1)


def _interval_is_fixed(plan: RunPlan) -> bool:
    """Whether the job itself says when it is evaluated; the answer is the same after a resume."""
    return plan.policy is None or plan.policy.eval_interval is not None or not plan.benchmarks


def _load_stores(
    plan: RunPlan,
    tokenizer: Any,  # noqa: ANN401 - transformers has no types
    talk: Conversation,
    ranks: Ranks,
) -> dict[str, TokenStore]:
    """The tokenised row files, and a note for what was cut or left out of each."""
    if not ranks.is_speaker:
        ranks.broadcast(None)  # rank 0 fills the cache
    stores = {}
    files: dict[str, tuple[RowsPlan | None, str]] = {
        store_name(index): (stage.training_rows, f"stages.{index}.training_file")
        for index, stage in enumerate(plan.stages)
    } or {"training": (plan.training_rows, TRAINING_FILE)}
    files["general"] = (plan.general_rows, "retention.general_data")
    files[VALIDATION] = (plan.validation_rows, "validation_file")
    for name, (rows, param) in files.items():
        if rows is None:
            continue
        how: Any = {
            "chat_template": chat_template(plan.base),
            "max_seq_length": plan.training.max_seq_length,
            "cache_directory": Path(plan.cache_directory),
            "param": param,
        }
        if plan.training.beta is not None and name != "general":
            pairs = load_pair_tokens(rows, tokenizer, **how)
            stores[name] = store = pairs.chosen
            stores[REJECTED if name == CHOSEN else f"{name}-{REJECTED}"] = pairs.rejected
        else:
            how["benchmarks"] = plan.benchmarks if name == "general" else ()
            stores[name] = store = load_tokens(rows, tokenizer, **how)
        for finding in store.findings:
            data = {"param": param, "count": finding.count, "lines": list(finding.lines)}
            talk.note("warn", finding.code, f"{param}: {finding.message}", **data)
    if ranks.is_speaker:
        ranks.broadcast(None)
    return stores
