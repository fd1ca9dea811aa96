"""`retain models`: base models, registered by the operator; and what the project sees."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import quote

import typer

from app.cli.client import ApiClient
from app.cli.operator import DataDir, open_database, settings_for
from app.cli.output import local_time, show, show_json, show_table, tell
from app.db.models import BaseModel
from app.domain.configs.base import CAUSAL_LM, ModelKind
from app.errors import BadRequest, Unavailable
from app.services.models import add_demo, add_model, add_other_model, require_free_name

models = typer.Typer(help="Base models (operator) and model versions.", no_args_is_help=True)


@models.command()
def add(
    name: Annotated[str, typer.Argument(help="What jobs will call it.")],
    source: Annotated[
        str,
        typer.Argument(
            help="A directory with safetensors, or a hub id. HF_ENDPOINT names a mirror, RETAIN_HF_TOKEN the"
            " token for gated and private ids."
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id; pinned to the commit.")
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable: a benchmark of its suite, as NAME or NAME=WEIGHT.", show_default=False
        ),
    ] = None,
    general_data: Annotated[
        Path | None,
        typer.Option(help="Training rows that stand for what it must not forget (JSONL)."),
    ] = None,
    kind: Annotated[
        ModelKind,
        typer.Option(
            help="What it is: jobs train a causal_lm; an encoder (text and image towers) or a seq2seq model"
            " is there for strategies that name it."
        ),
    ] = CAUSAL_LM,
    data_dir: DataDir = None,
) -> None:
    """Register a base model: checked, pinned, hashed and copied into the store."""
    settings = settings_for(data_dir)
    suite = dict(parse_weight(text) for text in benchmark or ())
    if kind != CAUSAL_LM and (suite or general_data is not None):
        raise BadRequest(
            f"A model of kind {kind} is never trained: it has no suite or rows.", "kind"
        )
    with open_database(settings, command="retain models add") as factory:
        if kind == CAUSAL_LM:
            model = add_model(
                factory,
                settings,
                name=name,
                source=source,
                revision=revision,
                benchmarks=suite,
                general_data=general_data,
            )
        else:
            model = add_other_model(
                factory, settings, name=name, source=source, revision=revision, kind=kind
            )
    _report(model)


@models.command("build-demo")
def build_demo(
    name: Annotated[str, typer.Argument(help="What jobs will call it.")],
    seed: Annotated[int, typer.Option(help="Of its weights and data.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Keep what was built here. [default: a temporary directory]")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Train a tiny base model that forgets in seconds, and register it with its suite and general data."""
    settings = settings_for(data_dir)
    with open_database(settings) as factory:
        require_free_name(factory, name)
    settings.scratch_root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="demo-", dir=settings.scratch_root) as scratch:
        directory = out or Path(scratch) / "demo"
        command = [sys.executable, "-m", "workers.demo_model", str(directory), "--seed", str(seed)]
        # Its progress goes to standard error: standard output carries results alone.
        status = subprocess.run(command, stdout=sys.stderr, check=False).returncode  # noqa: S603
        if status != 0:
            raise Unavailable(f"Building the demo model failed (exit status {status}).")
        with open_database(settings, command="retain models build-demo") as factory:
            model = add_demo(factory, settings, name=name, directory=directory)
    _report(model)


@models.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer.")] = False,
) -> None:
    """List the base models and model versions that the key's project can use."""
    with ApiClient() as client:
        page = client.get("models")
    if as_json:
        show_json(page)
        return
    show_table(
        ("ID", "OWNER", "PARENT", "RETENTION", "ALIASES", "CREATED"),
        [
            (
                row["id"],
                row.get("owned_by"),
                row.get("parent"),
                row.get("retention"),
                ", ".join(row.get("aliases") or ()) or None,
                local_time(row.get("created")),
            )
            for row in page["data"]
        ],
    )


@models.command()
def rollback(
    alias: Annotated[str, typer.Argument(help="The alias as NAME@ALIAS.")],
    to: Annotated[
        str, typer.Option(help="`previous` (the last good version before), or a version's number.")
    ] = "previous",
    reason: Annotated[str | None, typer.Option(help="Kept in the alias's history.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Pass the gate; needs --reason and models:force.")
    ] = False,
) -> None:
    """Point an alias back at an earlier version."""
    name, at, short = alias.partition("@")
    if not (name and at and short):
        raise BadRequest(f"'{alias}' is no alias; write NAME@ALIAS.", "alias")
    body: dict[str, Any] = {"to": int(to) if to.isdigit() else to, "reason": reason, "force": force}
    path = f"registered_models/{quote(name, safe='')}/aliases/{quote(short, safe='')}"
    with ApiClient() as client:
        before = client.get(path)
        after = client.post(f"{path}/rollback", body)
    tell(f"{alias}: version {before['version']} -> {after['version']}")
    show(after["model"])


def parse_weight(text: str) -> tuple[str, float]:
    """A benchmark's name and weight from `NAME` or `NAME=WEIGHT`.

    Raises:
        BadRequest: The weight is not a number above 0.
    """
    name, separator, number = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise BadRequest(f"--benchmark {text}: the weight must be a number above 0.", "benchmark")
    return name, weight


def _report(model: BaseModel) -> None:
    details = model.details
    tell(
        f"Registered {model.name}: {details['architecture']}, {details['num_parameters']:,} parameters,"
        f" {model.size_bytes / 1e6:,.1f} MB, sha256 {model.sha256[:12]}"
        + (f", revision {model.revision[:12]}" if model.revision else "")
    )
    if not model.has_chat_template and details["kind"] == CAUSAL_LM:
        tell("It has no chat template: chat rows get the built-in plain one.")
    show(model.name)
