"""`python -m app.demo`: builds the base, runs the stack, and shows that fine-tuning need not forget."""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from app.demo.client import Client, Json
from app.demo.receiver import Receiver
from app.demo.results import (
    Outcome,
    broken_claims,
    build_table,
    describe_decision,
    read_outcome,
)
from app.demo.scenario import (
    Base,
    Plan,
    add_domain_benchmarks,
    add_receiver,
    clear_away,
    plan_jobs,
    submit,
)
from app.demo.server import DemoFailed, build_base, create_key, run_retain, running_stack

WEBHOOK_SECONDS = 20.0
PROGRESS_SECONDS = 3.0  # between two lines of progress in one phase

console = Console(highlight=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    """Runs the demo; 0 when everything it claims holds, 1 when not, 130 when interrupted."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    try:
        return _run(options, started)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except DemoFailed as error:
        console.print(f"[red]The demo failed:[/red] {_plain(str(error))}")
        return 1


def _run(options: argparse.Namespace, started: float) -> int:
    data_dir = options.data_dir.resolve()
    _head("1. The base model")
    directory = data_dir / f"base-{options.seed}"
    build_base(directory, options.seed, _say)
    base = Base.read(directory)
    _head("2. The stack: Postgres, Redis, API, control loops, a worker")
    with running_stack(data_dir, options.port, _say) as address:
        _say(f"ready at {address}")
        key = create_key(data_dir)
        client = Client(address, key)
        try:
            status = _show(client, base, data_dir, options.seed)
        finally:
            client.close()
        console.print(f"\n{time.monotonic() - started:.0f} s in all. Dashboard: {address}/")
        if options.keep:
            console.print(f"Key: {key}\nThe stack runs until you press Ctrl-C.")
            _wait_for_interrupt()
    if not options.keep:
        console.print(f"To look again: retain up --data-dir {options.data_dir}")
    return status


def _show(client: Client, base: Base, data_dir: Path, seed: int) -> int:
    """Registers what is needed, runs the jobs and judges them; the exit status."""
    clear_away(client)
    if not client.exists(f"/v1/models/{base.model_name}"):
        run_retain(
            [
                *("models", "build-demo", base.model_name),
                *("--seed", str(seed), "--out", str(base.directory)),
            ],
            data_dir,
            _say,
        )
    add_domain_benchmarks(client, base)
    outcomes: dict[str, Outcome] = {}
    with Receiver(_say_webhook) as receiver:
        endpoint, secret = add_receiver(client, receiver.url)
        receiver.trust(secret)
        for number, (name, plan) in enumerate(plan_jobs(client, base, seed).items(), start=3):
            _head(f"{number}. Job '{plan.title}': {plan.why}")
            outcomes[name] = _run_job(client, base, plan)
        num_hooks = _await_webhooks(receiver, [o.job["id"] for o in outcomes.values()])
        client.delete(f"/v1/webhook_endpoints/{endpoint}")
    _head("The controller's decisions")
    for outcome in outcomes.values():
        for decision in outcome.decisions:
            if decision["action"] != "keep":
                _say(f"{outcome.title}: {describe_decision(decision)}")
    console.print()
    console.print(build_table(list(outcomes.values())))
    _say(f"{num_hooks} signed webhooks received and verified, {receiver.num_refused} refused")
    broken = broken_claims(outcomes["plain"], outcomes["controlled"])
    for claim in broken:
        console.print(f"[red]Does not hold:[/red] {_plain(claim)}")
    if not broken:
        console.print(
            "[green]Holds:[/green] plain fine-tuning forgets; with the controller it learns as much and general"
            " ability stays, on unseen skills, by multiple choice and by exact match."
        )
    return 1 if broken else 0


def _run_job(client: Client, base: Base, plan: Plan) -> Outcome:
    job = submit(client, plan, _say)
    job = client.follow(job["id"], _say_event, _Progress())
    if job["status"] != "succeeded":
        error = job["error"] or {}
        raise DemoFailed(f"job '{plan.title}' {job['status']}: {error.get('message', '')}")
    return read_outcome(client, base, plan.title, job)


class _Progress:
    """Says how far a job is: each phase once, and every few seconds the steps done since."""

    def __init__(self) -> None:
        self._said: tuple[str, int] | None = None
        self._said_at = 0.0

    def __call__(self, job: Json) -> None:
        progress, now = job["progress"], time.monotonic()
        phase, step = progress["phase"] or job["status"], progress["step"]
        is_new_phase = self._said is None or self._said[0] != phase
        if self._said == (phase, step) or (
            not is_new_phase and now - self._said_at < PROGRESS_SECONDS
        ):
            return
        self._said, self._said_at = (phase, step), now
        left = progress["seconds_remaining"]
        remaining = "" if not left else f", about {left:.0f} s left"
        _say(f"{phase}: step {step} of {progress['total_steps']}{remaining}")


def _await_webhooks(receiver: Receiver, job_ids: list[str]) -> int:
    """Waits until the end of every job was delivered; the number of events so far.

    Raises:
        DemoFailed: One did not come, or one came with a wrong signature.
    """
    ends_at = time.monotonic() + WEBHOOK_SECONDS
    missing = set(job_ids)
    while missing and time.monotonic() < ends_at:
        events = list(receiver.events.values())
        missing -= {e["data"]["id"] for e in events if e["type"] == "fine_tuning.job.succeeded"}
        time.sleep(0.2)
    if missing or receiver.num_refused:
        raise DemoFailed(
            f"{len(missing)} jobs sent no webhook about their end, {receiver.num_refused} webhooks came with a"
            " wrong signature"
        )
    return len(receiver.events)


def _say_event(event: Json) -> None:
    if event["type"] != "metrics":
        style = {"warn": "yellow", "error": "red"}.get(event["level"], "default")
        console.print(f"  [{style}]{_plain(event['message'])}[/{style}]")


def _say_webhook(event: dict[str, Any]) -> None:
    _say(f"webhook {event['type']}, signature verified")


def _say(text: str) -> None:
    console.print(f"  [dim]{_plain(text)}[/dim]")


def _head(text: str) -> None:
    console.print(f"\n[bold]{_plain(text)}[/bold]")


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _wait_for_interrupt() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        _say("interrupted")


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app.demo", description=__doc__)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(".retain/demo"),
        help="where everything is kept; a second run finds the base model there [.retain/demo]",
    )
    parser.add_argument("--port", type=int, default=0, help="of the API; 0 takes a free one [0]")
    parser.add_argument("--seed", type=int, default=0, help="of base model, data and jobs [0]")
    parser.add_argument("--keep", action="store_true", help="leave the stack up at the end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
