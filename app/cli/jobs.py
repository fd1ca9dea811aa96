"""`retain jobs`: submit, follow and steer fine-tuning jobs over HTTP."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.client import ApiClient
from app.cli.output import local_time, show, show_json, show_table, tell
from app.errors import BadRequest

JOBS = "fine_tuning/jobs"
POLL_SECONDS = 1.0
ENDED = frozenset({"succeeded", "failed", "cancelled"})
JOB_FAILED_STATUS = 3

jobs = typer.Typer(help="Fine-tuning jobs (HTTP).", no_args_is_help=True)
JobId = Annotated[str, typer.Argument(help="ftjob-...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer.")]


@jobs.command()
def submit(  # noqa: PLR0913 - one argument an option
    model: Annotated[str | None, typer.Argument(help="Base model or model version.")] = None,
    training_file: Annotated[
        str | None, typer.Argument(help="Rows as JSONL: a local file, or a file-... id.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Rows to validate on: a local file, or a file-... id.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the run.")] = None,
    body: Annotated[
        Path | None, typer.Option(help="A JSON file with the request's body; options go over it.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Repeatable: any field by its path, the value as JSON or text, such as"
            " training.learning_rate=1e-4 or retention.policy.max_drop=0.02.",
            show_default=False,
        ),
    ] = None,
    no_retention: Annotated[
        bool, typer.Option("--no-retention", help="Plain fine-tuning: let it forget.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Then follow it until it ends.")] = False,
) -> None:
    """Submit a job and print its id."""
    request: dict[str, Any] = {} if body is None else _read_body(body)
    if no_retention:
        request["retention"] = None
    for assignment in set_ or ():
        set_path(request, assignment)
    fields = {"model": model, "suffix": suffix, "seed": seed}
    request |= {name: value for name, value in fields.items() if value is not None}
    with ApiClient() as client:
        for field, given in (("training_file", training_file), ("validation_file", validation)):
            if given is not None:
                is_id = given.startswith("file-")
                request[field] = given if is_id else client.upload(Path(given), "fine-tune")
        job = client.post(JOBS, request)
        for warning in job.get("warnings") or ():
            tell(
                f"warning: {warning.get('message', warning) if isinstance(warning, dict) else warning}"
            )
        show(str(job["id"]))
        if watch:
            _follow(client, job["id"])


@jobs.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List the project's jobs, newest first."""
    with ApiClient() as client:
        rows = list(client.iter_list(JOBS, limit=limit))
    if as_json:
        show_json(rows)
        return
    show_table(
        ("ID", "STATUS", "MODEL", "PROGRESS", "CREATED", "RESULT"),
        [
            (
                row["id"],
                row["status"],
                row["model"],
                _progress(row),
                local_time(row["created_at"]),
                row.get("fine_tuned_model") or (row.get("error") or {}).get("code"),
            )
            for row in rows
        ],
    )


@jobs.command("show")
def show_(job_id: JobId) -> None:
    """Print a job as the server describes it."""
    with ApiClient() as client:
        show_json(client.get(f"{JOBS}/{job_id}"))


@jobs.command()
def watch(job_id: JobId) -> None:
    """Follow a job's events until it ends; status 3 unless it succeeded."""
    with ApiClient() as client:
        _follow(client, job_id)


@jobs.command()
def cancel(job_id: JobId) -> None:
    """Cancel a job."""
    _act(job_id, "cancel")


@jobs.command()
def pause(job_id: JobId) -> None:
    """Save a running job and free its GPUs."""
    _act(job_id, "pause")


@jobs.command()
def resume(job_id: JobId) -> None:
    """Queue a paused job again; it goes on where it stopped."""
    _act(job_id, "resume")


def set_path(request: dict[str, Any], assignment: str) -> None:
    """Puts the value of `a.b.0.c=VALUE` at its place; numbers index lists, JSON that does not parse is text.

    Raises:
        BadRequest: It has no `=`, or the path leads through something that is not an object or list.
    """
    path, separator, text = assignment.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise BadRequest(f"--set {assignment}: write PATH=VALUE.", "set")
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = text
    place: Any = request
    for key, following in zip(keys, [*keys[1:], ""], strict=True):
        empty: Any = [] if following.isdigit() else {}
        place = _step(place, key, empty if following else value, assignment, is_last=not following)


def _step(place: Any, key: str, value: Any, assignment: str, *, is_last: bool) -> Any:  # noqa: ANN401
    """Goes one step down, making what is missing; at the last step the value is put there."""
    if isinstance(place, list) and key.isdigit() and int(key) <= len(place):
        index = int(key)
        if index == len(place):
            place.append(value)
        elif is_last or place[index] is None:
            place[index] = value
        return place[index]
    if isinstance(place, dict):
        if is_last or place.get(key) is None:
            place[key] = value
        return place[key]
    raise BadRequest(f"--set {assignment}: there is no place '{key}'.", "set")


def _read_body(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path}: {error}", "body") from None
    if not isinstance(body, dict):
        raise BadRequest(f"{path}: the body must be a JSON object.", "body")
    return body


def _act(job_id: str, verb: str) -> None:
    with ApiClient() as client:
        job = client.post(f"{JOBS}/{job_id}/{verb}")
    show(str(job["status"]))


def _follow(client: ApiClient, job_id: str) -> None:
    seen: str | None = None
    while True:
        job = client.get(f"{JOBS}/{job_id}")  # before the events: its last one is then among them
        events = _new_events(client, job_id, seen)
        for event in events:
            if event.get("type") != "metrics":
                tell(f"{local_time(event['created_at'])}  {event['level']:5}  {event['message']}")
        seen = events[-1]["id"] if events else seen
        if job["status"] in ENDED:
            break
        time.sleep(POLL_SECONDS)
    error = job.get("error") or {}
    tell(f"{job['status']}: {job.get('fine_tuned_model') or error.get('message') or job_id}")
    if job["status"] != "succeeded":
        raise typer.Exit(JOB_FAILED_STATUS)


def _new_events(client: ApiClient, job_id: str, seen: str | None) -> list[dict[str, Any]]:
    """Events after the one seen last, oldest first; the server lists them newest first."""
    found: list[dict[str, Any]] = []
    for event in client.iter_list(f"{JOBS}/{job_id}/events", limit=100_000):
        if event["id"] == seen:
            break
        found.append(event)
    return found[::-1]


def _progress(job: dict[str, Any]) -> str | None:
    progress = job.get("progress") or {}
    done, total = progress.get("step"), progress.get("total_steps")
    return None if done is None or total is None else f"{done}/{total}"
