"""The trainer process: `python -m workers.training.trainer --plan PLAN.json --socket PATH`."""

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from app.domain.messages import (
    EXIT_CUDA,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_RELEASED,
    Failed,
)
from app.domain.runplan import EvaluationPlan, ExportPlan, RunPlan
from app.errors import TrainingFailed
from workers.training.process import die_with_parent, prepare_environment

if TYPE_CHECKING:
    from workers.training.conversation import Conversation

Plan = RunPlan | ExportPlan | EvaluationPlan
PLANS: TypeAdapter[Plan] = TypeAdapter(Plan)
EXIT_CRASHED = 1


def main(arguments: list[str] | None = None) -> int:
    """Runs one plan to its end; the answer is the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.training.trainer",
        description="Runs one attempt of a job. Started by a worker, which it talks to in JSON lines.",
    )
    parser.add_argument("--plan", required=True, help="file with the plan as JSON")
    parser.add_argument("--socket", required=True, help="the supervisor's Unix socket")
    options = parser.parse_args(arguments)
    die_with_parent()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    plan = PLANS.validate_json(Path(options.plan).read_bytes())
    prepare_environment(plan.threads)
    return run_plan(plan, options.socket)


def run_plan(plan: Plan, socket_path: str) -> int:
    """Connects to the supervisor, works, and tells how it ended."""
    import torch

    from workers.training.conversation import Conversation, Line
    from workers.training.evaluating import evaluate_version
    from workers.training.exporting import export
    from workers.training.flow import fine_tune
    from workers.training.models import choose_device
    from workers.training.process import prepare_torch
    from workers.training.ranks import Ranks
    from workers.training.start import write_start

    prepare_torch(plan.threads)
    device = choose_device()
    ranks = Ranks.join(device)
    talk = Conversation(Line(socket_path) if ranks.is_speaker else None, ranks)
    code = EXIT_DONE
    try:
        if plan.base.layers:
            start = write_start(plan.base, Path(plan.scratch_directory) / "start", ranks)
            plan = plan.model_copy(update={"base": start})
        if isinstance(plan, ExportPlan):
            export(plan, talk, ranks, device)
        elif isinstance(plan, EvaluationPlan):
            evaluate_version(plan, talk, ranks, device)
        elif not fine_tune(plan, talk, ranks, device):
            code = EXIT_RELEASED
    except TrainingFailed as error:
        _say_failed(talk, error)
        code = EXIT_FAILED
    except torch.OutOfMemoryError as error:
        _say_failed(
            talk,
            TrainingFailed(
                "The device ran out of memory. Lower training.max_tokens_per_micro_batch, or turn on "
                f"training.gradient_checkpointing. ({error})",
                "training.max_tokens_per_micro_batch",
                "out_of_memory",
            ),
        )
        code = EXIT_FAILED
    except RuntimeError as error:
        traceback.print_exc()
        code = EXIT_CUDA if device.type == "cuda" and "CUDA" in str(error) else EXIT_CRASHED
    if code in (EXIT_DONE, EXIT_RELEASED):
        ranks.leave()
    talk.close()
    return code


def _say_failed(talk: "Conversation", error: TrainingFailed) -> None:
    talk.ask_alone(
        Failed(id=talk.next_id(), code=error.code, message=error.message, param=error.param)
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # interpreter shutdown with torch loaded costs up to a second, and can hang
