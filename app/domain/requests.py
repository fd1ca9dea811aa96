"""Request bodies that are not a job."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from app.domain.benchmarks import BenchmarkKind, Scorer
from app.domain.frozen import Frozen
from app.domain.results import PostedResult, PostedResults
from app.domain.states import DeliveryState


class CreateBenchmark(Frozen):
    """`POST /v1/benchmarks`: a new version of the benchmark of that name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")  # no `@`, which pins a version
    file: str = Field(min_length=1, max_length=64)  # id of a file uploaded for `evals`
    kind: BenchmarkKind = BenchmarkKind.GENERAL
    scorer: Scorer
    limit: int | None = Field(
        default=None, ge=2, le=5_000_000
    )  # so many items are drawn, each subject in proportion; None: all
    seed: int | None = Field(default=None, ge=0, le=2_147_483_647)  # of the draw; None: 0
    source: str | None = Field(default=None, min_length=1, max_length=1024)  # where they come from


class PublishPoint(Frozen):
    """`POST /v1/fine_tuning/jobs/{id}/publish`: a point of the line from base (0) to tuned (1)."""

    alpha: float = Field(gt=0, le=1)
    suffix: str | None = Field(
        default=None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$"
    )  # None: the job's


class RerunJob(Frozen):
    """`POST /v1/fine_tuning/jobs/{id}/rerun`; every field may be left out, the body too."""

    from_checkpoint: str | None = Field(default=None, max_length=64)  # None: from the job's start
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = Field(default=None, max_length=16)  # left out: the job's


class CreateWebhookEndpoint(Frozen):
    """`POST /v1/webhook_endpoints`."""

    url: str = Field(min_length=1, max_length=2048)
    event_types: tuple[Annotated[str, Field(max_length=128)], ...] = Field(
        min_length=1, max_length=64
    )
    name: str = Field(default="endpoint", min_length=1, max_length=128)


class UpdateWebhookEndpoint(Frozen):
    """`POST /v1/webhook_endpoints/{id}`: what is given changes."""

    url: str | None = Field(default=None, min_length=1, max_length=2048)
    event_types: tuple[Annotated[str, Field(max_length=128)], ...] | None = Field(
        default=None, min_length=1, max_length=64
    )
    name: str | None = Field(default=None, min_length=1, max_length=128)


class RotateSecret(Frozen):
    """`POST /v1/webhook_endpoints/{id}/rotate_secret`."""

    keep_old_secret_active_for_24_hours: bool = Field(
        default=False,
        description="Whether the secret that is replaced signs too for 24 hours; else it ends now.",
    )
    force: bool = Field(
        default=False,
        description=(
            "Rotate although the last rotation is less than 24 hours ago and the secret before it still signs:"
            " that one ends now."
        ),
    )


class SendSample(Frozen):
    """`POST /v1/webhook_endpoints/{id}/test`."""

    event_type: str = Field(max_length=128, description="The type of the sample that is sent.")


class RetryDeliveries(Frozen):
    """`POST /v1/webhook_endpoints/{id}/deliveries/retry`."""

    since: int = Field(
        ge=0,
        le=253_402_300_799,
        description="Unix seconds: deliveries of events from then on are sent again.",
    )
    state: DeliveryState = Field(
        default=DeliveryState.DEAD, description="Only deliveries in this state."
    )


def _shape(body: Any) -> str:  # noqa: ANN401 - whatever was sent
    return "batch" if isinstance(body, dict) and "results" in body else "single"


#: `POST /v1/benchmark_results`: one result, or several that belong together.
PostedBody = Annotated[
    Annotated[PostedResult, Tag("single")] | Annotated[PostedResults, Tag("batch")],
    Discriminator(_shape),
]
