"""What a job's owner is warned of at submit."""

from typing import Any

from app.domain.power import Power
from app.domain.spec import JobSpec
from app.domain.submit import MEASURED_PARAMETERS, ResolvedStrategies
from app.services.watched import Watched

Warnings = list[dict[str, Any]]


def warn_of_spec(
    spec: JobSpec, watched: tuple[Watched, ...], chosen: ResolvedStrategies
) -> Warnings:
    """That nothing is watched, that mandatory benchmarks are all the same, and that strengths are guesses."""
    warnings: Warnings = []
    is_off = spec.request.retention is None
    if is_off and watched:
        names = ", ".join(found.benchmark.reference for found in watched)
        warnings.append(
            warning(
                "benchmarks_mandatory",
                f"Retention is off, and yet {names} must not drop: they are mandatory here. Without"
                " strategies the controller can only lower the learning rate, roll back or stop.",
                "retention",
            )
        )
    if not is_off and not any(found.is_general for found in watched):
        why = "only domain benchmarks are" if watched else "no benchmark is"
        warnings.append(
            warning(
                "retention_unwatched",
                f"General ability is not watched: {why} in the base model's suite or in"
                " retention.policy.benchmarks. The strategies run, and nothing checks that they hold.",
                "retention.policy.benchmarks",
            )
        )
    if chosen.is_extrapolated:
        warnings.append(
            warning(
                "extrapolated",
                "The strengths that `auto` takes were never measured on a model above"
                f" {MEASURED_PARAMETERS:,} parameters: read the verdict before you trust them.",
                "retention.strategies",
            )
        )
    return warnings


def warning(code: str, message: str, param: str, **more: object) -> dict[str, Any]:
    """One warning; `more` are its numbers."""
    return {"code": code, "message": message, "param": param} | more


def warn_of_floors(found: Power) -> Warnings:
    """Benchmarks that say nothing of this base model."""
    return [
        warning(
            "at_floor",
            f"The base model is not above chance on {name}, so that benchmark is not watched.",
            "retention.policy.benchmarks",
        )
        for name, estimate in found.benchmarks.items()
        if estimate.at_floor
    ]
