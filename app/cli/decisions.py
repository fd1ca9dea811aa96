"""`retain decisions`: what was decided, and whether its evidence leads to it again."""

import json
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from app.cli.client import ApiClient
from app.cli.output import complain, show, show_json, show_table
from app.domain.decisions import Decision
from app.domain.replay import RULES, differences, replay, rules_of
from app.errors import RetainError

decisions = typer.Typer(help="What the controller decided (HTTP).", no_args_is_help=True)


@decisions.command("list")
def list_(
    subject: Annotated[str, typer.Argument(help="A job (ftjob-...) or an external run (run_...).")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer.")] = False,
) -> None:
    """List decisions: a job's newest first, a run's oldest first."""
    path = "runs" if subject.startswith("run_") else "fine_tuning/jobs"
    with ApiClient() as client:
        rows = list(client.iter_list(f"{path}/{subject}/decisions", limit=limit))
    if as_json:
        show_json(rows)
        return
    show_table(
        ["ID", "STEP", "BRANCH", "VERDICT", "ACTION", "CODE", "STATE"],
        [
            [
                row["id"],
                row["step"],
                row["branch"],
                row["trigger"]["verdict"],
                row["action"],
                row["code"],
                row["state"],
            ]
            for row in rows
        ],
    )


@decisions.command("replay")
def replay_(
    decision_id: Annotated[str, typer.Argument(help="A decision (rdec_...).")],
) -> None:
    """Compute a decision again from its evidence, here, and compare; exit 1 when the two differ."""
    with ApiClient() as client:
        row = client.get(f"decisions/{decision_id}", include="evidence")
    recorded: dict[str, Any] = row["decision"]
    show(f"recorded    {_line(recorded)}")
    try:
        # Read back first: what an older version did not write has its default.
        written = Decision.model_validate(recorded).model_dump(mode="json")
        found = replay(row["evidence"]).model_dump(mode="json")
        rules = rules_of(row["evidence"])
    except (ValidationError, KeyError, RetainError) as error:
        complain(f"the evidence leads to no decision: {error}")
        raise typer.Exit(1) from None
    show(f"recomputed  {_line(found)}")
    if rules < RULES:
        show(f"The evidence is of rules {rules} of the controller, before those of now ({RULES}).")
    changed = list(differences(written, found))
    # Columns of the row repeat parts of the decision; they are shown to people, so they count too.
    for name in ("action", "code", "reason"):
        changed += [*differences({name: row[name]}, {name: found[name]}, at="row")]
    if not changed:
        show("They agree.")
        return
    show_table(
        ["FIELD", "RECORDED", "RECOMPUTED"],
        [[one.path, _value(one.recorded), _value(one.recomputed)] for one in changed],
    )
    complain("the recorded decision is not what its evidence leads to")
    raise typer.Exit(1)


def _line(decision: dict[str, Any]) -> str:
    return f"{decision.get('action')} ({decision.get('code')}): {decision.get('reason')}"


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
