"""One trial: a method at a setting learns a seed's domains one after the other, and is scored after each."""

import contextlib
import copy
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from app.domain.runplan import BasePlan, RowsPlan, RunPlan, StagePlan
from app.domain.spec import LoraConfig, ResolvedTraining
from tests.benchmarks.board.counterparts import add_counterparts, read_rows, write_rows
from tests.benchmarks.board.domains import DOMAINS
from tests.benchmarks.board.material import GENERAL, Material, TokenRows
from tests.benchmarks.board.methods import (
    STEPS,
    Method,
    Setting,
    rate_of,
    resolve,
    uses_general_rows,
)
from tests.benchmarks.board.packing import pack_bits
from tests.benchmarks.board.routing import RoutedModel, fit_routed
from tests.benchmarks.board.scoring import Prepared, Scores, prepare, score
from workers.export.interpolate import Interpolation
from workers.training.build import build_run
from workers.training.loop import Run, start_task, train_step
from workers.training.ranks import Ranks
from workers.training.tasks import store_name

if TYPE_CHECKING:
    from workers.data.batches import Rows

BATCH_SIZE = 32
CPU = torch.device("cpu")
CHECK_EVERY, PATIENCE = 8, 5  # of early stopping: steps, checks


@dataclass(frozen=True)
class Items:
    """What is scored, tokenised once a process."""

    unseen: Prepared
    seen: Prepared
    domains: tuple[Prepared, ...]
    validation: tuple[Prepared, ...]


def prepare_items(material: Material) -> Items:
    """Choices are scored for the general skills; domains and validation by exact match alone."""
    tokenizer = material.tokenizer
    return Items(
        prepare(tokenizer, material.unseen_items, choices=True),
        prepare(tokenizer, material.seen_items, choices=True),
        tuple(prepare(tokenizer, own, choices=False) for own in material.domain_items),
        tuple(prepare(tokenizer, own, choices=False) for own in material.validation),
    )


@dataclass
class Point:
    """Scores after a domain: of the general skills, and of the domains learnt so far."""

    unseen: Scores
    seen: Scores
    domains: list[Scores]

    def pack(self) -> dict[str, Any]:
        """As JSON: a string of hex digits for each list of items."""
        return {
            "unseen_em": pack_bits(self.unseen.exact_match),
            "unseen_mc": pack_bits(self.unseen.multiple_choice),
            "seen_em": pack_bits(self.seen.exact_match),
            "seen_mc": pack_bits(self.seen.multiple_choice),
            "domains": [pack_bits(scores.exact_match) for scores in self.domains],
        }


@dataclass
class Cost:
    """CPU seconds of training without scoring, accepted steps, and bytes held at the end."""

    seconds: float = 0.0
    steps: int = 0
    memory_bytes: int = 0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the CPU time of what is inside."""
        started = time.process_time()
        yield
        self.seconds += time.process_time() - started


def run_trial(
    method: Method, setting: Setting, material: Material, items: Items, num_stages: int
) -> dict[str, Any]:
    """The scores after each domain and the cost, as JSON."""
    torch.set_num_threads(1)
    started, wall = time.process_time(), time.monotonic()
    trial = _Trial(method, setting, material, items, num_stages)
    with tempfile.TemporaryDirectory() as scratch:
        trial.scratch = scratch
        points = trial.run()
    return {
        "points": [point.pack() for point in points],
        "train_cpu_seconds": trial.cost.seconds,
        "steps": trial.cost.steps,
        "memory_bytes": trial.cost.memory_bytes,
        "cpu_seconds": time.process_time() - started,
        "wall_seconds": time.monotonic() - wall,
    }


class _Trial:
    def __init__(
        self,
        method: Method,
        setting: Setting,
        material: Material,
        items: Items,
        num_stages: int,
    ) -> None:
        self.method, self.setting = method, setting
        self.material, self.items, self.num_stages = material, items, num_stages
        self.configs = resolve(method, setting)
        self.cost = Cost()
        self.scratch = ""

    def run(self) -> list[Point]:
        """The points of the method's protocol."""
        match self.method.protocol:
            case "sequence" | "frozen":
                return self.sequence()
            case "joint":
                return self.joint()
            case "early_stop":
                return self.early_stop()
            case "oracle_adapters":
                return self.oracle_adapters()

    def sequence(self) -> list[Point]:
        """One run with a stage for each domain."""
        stages = range(self.num_stages)
        run = self._start([self.material.training[stage] for stage in stages])
        steps = 0 if self.method.protocol == "frozen" else self._steps()
        points = []
        for stage in stages:
            with self.cost.timed():
                for _ in range(steps):
                    train_step(run)
            points.append(self._score(run, stage))
        self._finish(run)
        return points

    def joint(self) -> list[Point]:
        """One stage with the rows of all domains, as many steps as a sequence has."""
        stores = self.material.training[: self.num_stages]
        rows = [store.row(i) for store in stores for i in range(len(store.lengths))]
        run = self._start([TokenRows(rows)], self.num_stages)
        with self.cost.timed():
            for _ in range(self._steps() * self.num_stages):
                train_step(run)
        self._finish(run)
        return [self._score(run, self.num_stages - 1)] * self.num_stages

    def early_stop(self) -> list[Point]:
        """A run for each domain that starts from the best point of the one before."""
        points = []
        weights: dict[str, Any] | None = None
        for stage in range(self.num_stages):
            run = self._start([self.material.training[stage]], weights=weights)
            best, since = float("inf"), 0
            for step in range(1, self._steps() + 1):
                with self.cost.timed():
                    train_step(run)
                if step % CHECK_EVERY:
                    continue
                loss = score(run.student, self.items.validation[stage]).loss_nats
                since = 0 if loss < best else since + 1
                if loss < best:
                    best, weights = loss, copy.deepcopy(run.model.state_dict())
                if since == PATIENCE:
                    break
            if weights is not None:
                run.model.load_state_dict(weights)
            points.append(self._score(run, stage))
            self._finish(run)
        return points

    def oracle_adapters(self) -> list[Point]:
        """An adapter for each domain, all from the base; told which domain a question is of."""
        learnt: list[Scores] = []
        points = []
        for stage in range(self.num_stages):
            run = self._start([self.material.training[stage]])
            with self.cost.timed():
                for _ in range(self._steps()):
                    train_step(run)
            learnt.append(score(run.student, self.items.domains[stage]))
            model: Any = run.model
            with model.disable_adapter():
                general = self._general(run)
            points.append(Point(*general, list(learnt)))
            self._finish(run)
        return points

    def _start(
        self,
        stores: Sequence[TokenRows],
        length: int = 1,
        *,
        weights: Mapping[str, Any] | None = None,
    ) -> Run:
        """A run at step 0, each of whose stages is so many domains long."""
        plan = self._plan(len(stores), length)
        has_pairs = "causal" in self.method.kinds()
        rows: dict[str, Rows] = {store_name(stage): store for stage, store in enumerate(stores)}
        if has_pairs:
            plan = self._with_files(plan)
            for index, stage in enumerate(plan.stages):
                rows[store_name(index)] = read_rows(stage.training_rows, plan, self.material)
        if uses_general_rows(self.method):
            rows[GENERAL] = self.material.general
        run = build_run(plan, rows, Ranks(), CPU)
        if weights is not None:
            run.model.load_state_dict(weights)
        with self.cost.timed():
            if has_pairs:
                add_counterparts(plan, run, self.material)
            start_task(run)
        return run

    def _plan(self, num_stages: int, length: int) -> RunPlan:
        training = self._training(self._steps() * length)
        rows = RowsPlan(path=str(Path(self.scratch) / "rows"), sha256="0" * 64)
        names = [domain.name for domain in DOMAINS[:num_stages]]
        return RunPlan(
            job_id="board",
            attempt=1,
            branch=0,
            base=BasePlan(
                name="board",
                directory=str(self.material.directory),
                sha256=f"{self.material.seed:064x}",
                default_template=False,
            ),
            training_rows=rows,
            validation_rows=None,
            general_rows=rows if uses_general_rows(self.method) else None,
            training=training.model_copy(update={"total_steps": training.total_steps * num_stages}),
            strategies=self.configs,
            stages=tuple(StagePlan(name=n, training_rows=rows, training=training) for n in names),
            policy=None,
            scratch_directory=self.scratch,
            cache_directory=str(Path(self.scratch) / "cache"),
        )

    def _with_files(self, plan: RunPlan) -> RunPlan:
        """The same with rows that can be read as text, a domain a stage."""
        questions = self.material.training_questions
        stages = tuple(
            stage.model_copy(
                update={"training_rows": write_rows(Path(self.scratch), stage.name, own)}
            )
            for stage, own in zip(plan.stages, questions, strict=False)
        )
        return plan.model_copy(update={"stages": stages})

    def _training(self, total_steps: int) -> ResolvedTraining:
        return ResolvedTraining(
            type=self.method.training,
            lora=LoraConfig(r=8, alpha=16.0),
            n_epochs=1,
            batch_size=BATCH_SIZE,
            total_steps=total_steps,
            learning_rate=rate_of(self.method, self.setting),
            max_seq_length=64,
            warmup_ratio=0.05,
            lr_scheduler="cosine",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_tokens_per_micro_batch=4096,
            gradient_checkpointing=False,
            checkpoint_interval=None,
            precision="fp32",
            seed=self.material.seed,
        )

    def _steps(self) -> int:
        return round(STEPS * self.setting.steps)

    def _score(self, run: Run, stage: int) -> Point:
        with self._as_used(run) as routed:
            learnt = range(stage + 1)
            if routed is None:
                domains = [score(run.student, self.items.domains[i]) for i in learnt]
                return Point(*self._general(run), domains)
            domains = [routed.score(self.items.domains[i]) for i in learnt]
            return Point(routed.score(self.items.unseen), routed.score(self.items.seen), domains)

    def _general(self, run: Run) -> tuple[Scores, Scores]:
        return score(run.student, self.items.unseen), score(run.student, self.items.seen)

    @contextlib.contextmanager
    def _as_used(self, run: Run) -> Iterator[RoutedModel | None]:
        """The model as it would be deployed: merged with the base, or with its adapters routed."""
        if "domain_adapters" in self.method.kinds():
            yield fit_routed(run)
            return
        if self.setting.alpha is None:
            yield None
            return
        with self._line(run) as line:
            line.set(self.setting.alpha)
            yield None

    def _line(self, run: Run) -> Interpolation:
        if self.method.training == "lora":
            return Interpolation.of_adapter(run.model)
        from workers.training.models import load_base

        base = load_base(self._plan(1, 1).base, CPU, torch.float32)
        return Interpolation.of_weights(run.all_params, dict(base.named_parameters()))

    def _finish(self, run: Run) -> None:
        self.cost.steps += run.step
        self.cost.memory_bytes = max(self.cost.memory_bytes, memory_bytes(run))


def memory_bytes(run: Run) -> int:
    """Bytes of weights, gradients, optimiser, what strategies keep, and the teacher's copy of the model.

    Activations and rows are left out: they depend on batch size and length.
    """
    model = {id(p): p for p in run.model.parameters()}
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    kept = [
        value
        for state in run.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    for strategy in run.strategies:
        kept += [t for t in strategy.state_dict()["tensors"].values() if t.is_floating_point()]
    teacher = run.teacher._copy
    copies = [] if teacher is None else list(teacher.model.parameters())
    tensors = [*model.values(), *trained, *kept, *copies]
    return sum(t.numel() * t.element_size() for t in tensors)
