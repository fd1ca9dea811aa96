"""Estimates against real runs: short jobs in the real trainer, some to calibrate by, the others to be foretold.

`python -m tests.benchmarks.estimates` writes ESTIMATES.md; `--quick` runs four jobs and writes nothing.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from app.domain.configs.distillation import DistillationConfig
from app.domain.configs.freeze import FreezeConfig
from app.domain.configs.quadratic import EwcConfig, L2SpConfig
from app.domain.configs.replay import ReplayConfig
from app.domain.estimates import Estimate, estimate
from app.domain.estimates_calibration import Calibration, Measured, Run, calibrate
from app.domain.estimates_devices import Device, cpu
from app.domain.estimates_evaluation import EvaluationRows
from app.domain.estimates_job import Asked, RowSample, StageRows
from app.domain.estimates_runs import reckon_run
from app.domain.estimates_shapes import ModelShape, describe_shape
from app.domain.estimates_work import RowTokens
from app.domain.messages import CheckpointSaved, Finished
from app.domain.runplan import RowsPlan
from app.domain.spec import LoraConfig
from app.domain.strategies import StrategyConfig
from tests.benchmarks.five_billion import five_billion_table
from tests.tiny import make_tiny_model
from tests.workers.training.runs import make_plan, make_training
from tests.workers.training.supervised import Supervisor

OUTPUT = Path(__file__).with_name("ESTIMATES.md")
MEMORY_GOAL, TIME_GOAL = 0.10, 0.15
LETTERS = "abcdefghijklmnopqrstuvwxyz "
MODELS = {  # vocabulary, width, layers
    "1.6 M": (2048, 128, 8),
    "5.8 M": (4096, 256, 8),
    "14 M": (4096, 384, 10),
}


@dataclass(frozen=True)
class Case:
    """A job; `teaches` says whether the calibration sees it."""

    name: str
    model: str
    type: str = "full"
    batch_size: int = 8
    length: int = 80  # mean tokens of a row
    strategies: tuple[StrategyConfig, ...] = ()
    rank: int = 8
    more: dict[str, Any] = field(default_factory=dict)
    teaches: bool = False


CASES = (
    Case("full", "5.8 M", teaches=True),
    Case("lora", "5.8 M", type="lora", teaches=True),
    Case("full, long rows", "1.6 M", length=240, teaches=True),
    Case("full, larger", "14 M", batch_size=4, teaches=True),
    Case("ewc", "5.8 M", strategies=(EwcConfig(fisher_samples=16),), teaches=True),
    Case("lora, larger", "14 M", type="lora", batch_size=4, teaches=True),
    Case("full, small batches", "1.6 M", batch_size=2, length=40, teaches=True),
    Case("full, large batches", "5.8 M", batch_size=24),
    Case("full, long rows, larger", "5.8 M", length=240),
    Case("full, short rows", "14 M", length=40),
    Case("lora, rank 32, long rows", "5.8 M", type="lora", rank=32, length=160),
    Case("replay 25 %", "5.8 M", strategies=(ReplayConfig(strength=0.25, store_fraction=1.0),)),
    Case("l2sp", "14 M", batch_size=4, strategies=(L2SpConfig(),)),
    Case("distillation", "5.8 M", strategies=(DistillationConfig(on=("general",)),)),
    Case("half frozen", "14 M", strategies=(FreezeConfig(strength=0.5),)),
    Case("checkpointing", "5.8 M", more={"gradient_checkpointing": True}),
    Case("split steps", "5.8 M", batch_size=16, more={"max_tokens_per_micro_batch": 512}),
)
QUICK = tuple(case for case in CASES if case.name in {"full", "lora", "replay 25 %", "l2sp"})


@dataclass(frozen=True)
class Result:
    """What a job measured, and what it is reckoned from."""

    case: Case
    measured: Measured
    run: Run
    asked: Asked
    checkpoint_bytes: int

    @property
    def seconds_per_step(self) -> float:
        """Of the measured steps, by the clock that counts."""
        return self.run.seconds / self.measured.steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the jobs, prints the report and keeps it; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.estimates")
    parser.add_argument("--quick", action="store_true", help="four jobs, nothing is written")
    parser.add_argument("--rounds", type=int, default=3, help="of each job; its fastest counts")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu where the machine has other work: the process's own time",
    )
    options = parser.parse_args(arguments)
    cases = QUICK if options.quick else CASES
    rounds = 1 if options.quick else options.rounds
    results = run_cases(cases, rounds=rounds, steps=options.steps, clock=options.clock)
    text, is_met = report(results, rounds=rounds, clock=options.clock)
    sys.stdout.write(text)
    if not options.quick:
        OUTPUT.write_text(text)
    return 0 if is_met else 1


def run_cases(cases: Sequence[Case], *, rounds: int, steps: int, clock: str) -> list[Result]:
    """Every job, its rounds interleaved with those of the others; the fastest round of each."""
    found: dict[str, list[Result]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="estimates-") as name:
        root = Path(name)
        bases = {model: _make_base(root / "bases", model) for model in {c.model for c in cases}}
        for round_number in range(rounds):
            for case in cases:
                scratch = root / f"{len(found[case.name])}-{case.name.replace(' ', '-')}"
                result = run_case(case, bases[case.model], scratch, steps=steps, clock=clock)
                found[case.name].append(result)
                print(
                    f"{round_number + 1}/{rounds} {case.name}: {result.seconds_per_step:.3f} s a step,"
                    f" {result.measured.peak_bytes / 1e6:.0f} MB",
                    file=sys.stderr,
                )
    return [min(each, key=lambda result: result.seconds_per_step) for each in found.values()]


def run_case(case: Case, base: Path, scratch: Path, *, steps: int, clock: str) -> Result:
    """One job in a trainer process of its own."""
    scratch.mkdir(parents=True)
    rows = _write_rows(scratch / "train.jsonl", case, seed=1, count=case.batch_size * steps)
    general = _write_rows(scratch / "general.jsonl", case, seed=2, count=case.batch_size * steps)
    training = make_training(
        **{
            "type": case.type,
            "lora": LoraConfig(r=case.rank),
            "batch_size": case.batch_size,
            "total_steps": steps,
            "max_seq_length": 512,
            "max_tokens_per_micro_batch": 8192,
            "learning_rate": 1e-5,
            **case.more,
        }
    )
    plan = make_plan(
        scratch,
        base=base,
        strategies=case.strategies,
        training=training.model_dump(),
        training_rows=rows,
        general_rows=general,
    )
    supervisor = Supervisor(plan, scratch)
    code = supervisor.spawn()
    ends = [message for _, message in supervisor.messages if isinstance(message, Finished)]
    if code != 0 or not ends or ends[0].measured is None:
        raise RuntimeError(f"{case.name}: the trainer left with {code}\n{supervisor.log()}")
    sizes = [m.size_bytes for _, m in supervisor.messages if isinstance(m, CheckpointSaved)]
    shape = read_shape(base)
    run = reckon_run(shape, training, case.strategies, ends[0].measured)
    if clock == "cpu":
        run = run._replace(seconds=ends[0].measured.cpu_seconds)
    return Result(
        case,
        ends[0].measured,
        run,
        Asked(
            shape=shape,
            training=training,
            strategies=case.strategies,
            stages=(StageRows(training=training, rows=_sample(Path(rows.path))),),
            general=_sample(Path(general.path)),
            evaluation=EvaluationRows(),
        ),
        max(sizes),
    )


def report(results: Sequence[Result], *, rounds: int, clock: str) -> tuple[str, bool]:
    """The text of ESTIMATES.md, and whether both goals are met on the jobs that were not fitted."""
    first = results[0].measured
    device = cpu(first.device_class, first.threads)
    teachers = [r for r in results if r.case.teaches] or list(results[: len(results) // 2])
    calibration = calibrate(first.device_class, [r.run for r in teachers], device.rates)
    lines, memory, seconds = [], [], []
    for result in results:
        foretold = estimate(result.asked, device, calibration)
        line = _Line.of(result, foretold)
        is_fitted = result in teachers
        lines.append(line.text(is_fitted=is_fitted))
        if not is_fitted:
            memory.append(abs(line.memory_error))
            seconds.append(abs(line.time_error))
    is_met = max(memory) <= MEMORY_GOAL and max(seconds) <= TIME_GOAL
    text = "\n".join(
        [
            "# Estimates against runs",
            "",
            f"`python -m tests.benchmarks.estimates`: {len(results)} jobs, each in a trainer process of its own on"
            f" {first.device_class}, fastest of {rounds} rounds. {len(teachers)} of them calibrate; what counts is"
            " the error on the others. Memory is resident above what the process held before the model was loaded;"
            f" time is that of a step, by the {'process' if clock == 'cpu' else 'wall'} clock. The estimate sees the row files alone, as the server does.",
            "",
            "| job | model | fitted | peak MB | estimate | error | s a step | estimate | error |"
            " checkpoint MB | estimate |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"On the {len(memory)} jobs that were not fitted: memory within {max(memory):.1%} (median"
            f" {statistics.median(memory):.1%}, goal {MEMORY_GOAL:.0%}), time within {max(seconds):.1%} (median"
            f" {statistics.median(seconds):.1%}, goal {TIME_GOAL:.0%}): {'met' if is_met else 'missed'}.",
            "",
            _calibration_text(calibration, device),
            "",
            five_billion_table(),
        ]
    )
    return text, is_met


@dataclass(frozen=True)
class _Line:
    result: Result
    foretold: Estimate
    memory_error: float
    time_error: float

    @classmethod
    def of(cls, result: Result, foretold: Estimate) -> "_Line":
        peak = result.measured.peak_bytes
        return cls(
            result,
            foretold,
            foretold.memory.peak / peak - 1,
            foretold.seconds_per_step / result.seconds_per_step - 1,
        )

    def text(self, *, is_fitted: bool) -> str:
        result, foretold = self.result, self.foretold
        cells = [
            result.case.name,
            result.case.model,
            "yes" if is_fitted else "no",
            f"{result.measured.peak_bytes / 1e6:.0f}",
            f"{foretold.memory.peak / 1e6:.0f}",
            f"{self.memory_error:+.1%}",
            f"{result.seconds_per_step:.3f}",
            f"{foretold.seconds_per_step:.3f}",
            f"{self.time_error:+.1%}",
            f"{result.checkpoint_bytes / 1e6:.1f}",
            f"{foretold.checkpoint_bytes / 1e6:.1f}",
        ]
        return f"| {' | '.join(cells)} |"


def _calibration_text(calibration: Calibration, device: Device) -> str:
    rates = calibration.rates
    reached = 1e-9 / rates.seconds_per_flop if rates.seconds_per_flop else float("inf")
    said = 1e-9 / device.rates.seconds_per_flop
    return (
        f"Calibration: {reached:.0f} GFLOP/s (before any run {said:.0f}),"
        f" {rates.seconds_per_byte * 1e9:.2f} s a GB moved, {rates.seconds_per_call * 1e6:.0f} us a layer's"
        f" call; activations x {calibration.passing_factor:.2f}, of"
        f" adapters x {calibration.adapter_factor:.2f}, {calibration.fixed_bytes / 1e6:.0f} MB fixed."
    )


def read_shape(base: Path) -> ModelShape:
    """As `retain models add` reads it."""
    config = json.loads((base / "config.json").read_text())
    with safetensors.safe_open(base / "model.safetensors", framework="np") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    shape = describe_shape(config, tensors)
    if shape is None:
        raise ValueError(f"{base} is no decoder")
    return shape


def _make_base(root: Path, model: str) -> Path:
    vocab, hidden, layers = MODELS[model]
    return make_tiny_model(
        root / model.replace(" ", ""), vocab_size=vocab, hidden=hidden, layers=layers
    )


def _write_rows(path: Path, case: Case, *, seed: int, count: int) -> RowsPlan:
    """Texts of log-normal length, as many as the job reads: a letter is a token."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(case.length), 0.5, count), 12, 500).astype(int)
    letters = np.array(list(LETTERS))
    lines = [json.dumps({"text": "".join(generator.choice(letters, n))}) for n in lengths]
    path.write_text("\n".join(lines) + "\n")
    return RowsPlan(path=str(path), sha256=f"{seed:064d}")


def _sample(path: Path) -> RowSample:
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    rows = tuple(RowTokens(len(text) + 1, len(text)) for text in texts)
    return RowSample(rows=rows, num_rows=len(rows))


if __name__ == "__main__":
    sys.exit(main())
