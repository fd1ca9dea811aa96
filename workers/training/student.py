"""The last stage of a roadmap: the tuned model teaches one with fewer layers, which has to hold to be published."""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from app.domain.configs.distillation import DistillationConfig
from app.domain.decisions import Reading, Verdict
from app.domain.policy import Policy
from app.domain.runplan import RunPlan
from app.domain.sensing import read_report
from app.domain.spec import ResolvedStudent
from workers.evaluation.evaluate import validation_loss
from workers.export.shallow import make_student
from workers.strategies.modes import evaluating
from workers.training.build import assemble_run
from workers.training.conversation import StopRequested
from workers.training.exporting import write_artifact
from workers.training.forward import SelectedLogits, Teacher
from workers.training.loop import Run, start_task, train_step
from workers.training.models import autocast_type, load_base
from workers.training.opening import chat_template, make_score
from workers.training.session import Session
from workers.training.strategies import build_strategies
from workers.training.suite import Marks, Suite

if TYPE_CHECKING:
    from workers.data.batches import Rows

TIMED_FORWARDS = 9
TIMED_TOKENS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Student:
    """What came of it."""

    directory: str
    marks: Marks
    suite: Suite
    valid_loss: float | None


def distil_student(
    session: Session, config: ResolvedStudent, teacher_directory: Path
) -> Student | None:
    """Trains the student from the published weights; None where it does not hold, which is told.

    It starts at its own beginning in every attempt, and gives the same student: nothing in it depends on
    when it runs.

    Args:
        session: Whose report set has been measured.
        config: The student's numbers.
        teacher_directory: The tuned model as it is published, whole weights.

    Raises:
        StopRequested: Told to leave meanwhile.
        TrainingFailed: The model has no layers to choose from.
    """
    run, plan = session.run, session.plan
    session.enter("student")
    run.ranks.broadcast(None)  # rank 0 has written the teacher
    teacher = load_base(
        plan.base.model_copy(update={"directory": str(teacher_directory)}),
        run.ctx.device,
        torch.float32,
    ).requires_grad_(requires_grad=False)
    student = make_student(teacher, config.layers)
    learning = _student_run(session, config, student, teacher)
    for _ in range(config.training.total_steps):
        orders, stop = session.talk.hear()
        session.orders += orders
        if stop is not None:
            raise StopRequested(stop)
        train_step(learning)
        session.report()
    return _judge(session, config, learning, teacher)


def _student_run(
    session: Session, config: ResolvedStudent, student: nn.Module, teacher: nn.Module
) -> Run:
    """CE(domain) + kd / ce * KL(teacher || student) on domain and general rows; the optimiser is blind to the scale."""
    run, plan = session.run, session.plan
    has_general = "general" in run.stores and config.general_ratio > 0
    distillation = DistillationConfig(
        strength=config.kd_coef / config.ce_coef,
        temperature=config.temperature,
        on=("domain", "general") if has_general else ("domain",),
        general_ratio=config.general_ratio or 0.25,
    )
    own = plan.model_copy(
        update={
            "training": config.training,
            "stages": (),
            "strategies": (distillation,),
            "branch": 0,
        }
    )
    autocast = autocast_type(plan.training, run.ctx.device)
    copy = SelectedLogits(teacher.eval(), autocast=autocast)
    stores: dict[str, Rows] = {
        name: run.stores[name] for name in ("training", "general") if name in run.stores
    }
    learning = assemble_run(
        own,
        student,
        lambda selected: Teacher(selected, lambda: copy),
        stores,
        run.ranks,
        build_strategies(own.strategies),
    )
    start_task(learning)
    return learning


def _judge(
    session: Session, config: ResolvedStudent, learning: Run, teacher: nn.Module
) -> Student | None:
    plan, run, policy = session.plan, session.run, session.plan.policy
    score = make_score(
        learning.student,
        session.tokenizer,
        chat_template(plan.base),
        plan.training.max_tokens_per_micro_batch,
        run.ranks,
    )
    suite = dataclasses.replace(session.suite, score=score)
    marks = suite.measure("report")
    reading = None if policy is None else read_report(policy, suite.sensed(marks, "report"))
    valid_loss = _validate(session, learning)
    facts = _facts(learning, teacher, config, reading, valid_loss)
    if not _may_publish(policy, reading):
        session.talk.note(
            "warn",
            "student_not_held",
            "The student does not hold on the report set, so the tuned model is published instead.",
            **facts,
        )
        return None
    directory = session.scratch / f"artifact-a{plan.attempt}-{config.name}"
    if run.ranks.is_speaker:
        write_artifact(_as_full(plan), learning.model, session.tokenizer, directory, alpha=1.0)
    session.talk.note(
        "info", "student_distilled", "The student holds; it is what is published.", **facts
    )
    return Student(str(directory), marks, suite, valid_loss)


def _may_publish(policy: Policy | None, reading: Reading | None) -> bool:
    if policy is None or reading is None or reading.verdict in {Verdict.NO_DATA, Verdict.AT_FLOOR}:
        return True
    if reading.verdict is Verdict.INCONCLUSIVE:
        return policy.on_inconclusive == "publish"
    return reading.verdict is Verdict.PASS


def _validate(session: Session, learning: Run) -> float | None:
    rows = session.validation
    if rows is None:
        return None
    with evaluating(learning.model), learning.student.precision(learning.ctx.device):
        budget = learning.training.max_tokens_per_micro_batch
        return validation_loss(learning.model, rows, token_budget=budget)[0]


def _facts(
    learning: Run,
    teacher: nn.Module,
    config: ResolvedStudent,
    reading: Reading | None,
    valid_loss: float | None,
) -> dict[str, Any]:
    """Sizes, the time of a forward of 64 tokens, and what the report set says of the student against the base."""
    models = {"teacher": teacher, "student": learning.model}
    return {
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
        "forward_seconds": {name: _forward_seconds(model) for name, model in models.items()},
        "valid_loss": valid_loss,
        "steps": config.training.total_steps,
        "report": None if reading is None else reading.model_dump(mode="json"),
    }


def _forward_seconds(model: nn.Module) -> float:
    ids = torch.ones((1, TIMED_TOKENS), dtype=torch.int64, device=next(model.parameters()).device)
    seconds = []
    with torch.no_grad(), evaluating(model):
        for _ in range(TIMED_FORWARDS):
            started = time.perf_counter()
            model(input_ids=ids, use_cache=False).logits.sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _as_full(plan: RunPlan) -> RunPlan:
    return plan.model_copy(
        update={"training": plan.training.model_copy(update={"late_adapter": False})}
    )
