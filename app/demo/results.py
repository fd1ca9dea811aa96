"""What the three jobs led to, from per-item scores; the closing table and the claims it has to meet."""

from dataclasses import dataclass, field

from rich.table import Table

from app.demo.client import JOBS, Client, Json
from app.demo.scenario import Base

LIMIT = 0.03  # relative drop that the controlled job must stay under
DOMAIN_SHARE = 0.95  # of plain fine-tuning's domain accuracy
GROUPS = ("seen", "unseen")
SCORERS = ("multiple_choice", "exact_match")
SHORT = {"multiple_choice": "MC", "exact_match": "EM"}


@dataclass(frozen=True, slots=True)
class Change:
    """Accuracy before and after on the same report items."""

    before: float
    after: float
    num_items: int

    @property
    def drop(self) -> float:
        """Relative; negative where it rose."""
        return (self.before - self.after) / self.before if self.before else 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One job's end in numbers."""

    title: str
    job: Json
    changes: dict[tuple[str, str], Change]  # by scorer and group of skills
    domain: dict[str, float]  # accuracy by scorer
    decisions: list[Json] = field(default_factory=list)  # oldest first

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return float(self.job["finished_at"] - self.job["started_at"])


def read_outcome(client: Client, base: Base, title: str, job: Json) -> Outcome:
    """Reads a finished job's report scores, item by item, beside those of its base model."""
    names = {row["scorer"]: row["name"] for row in base.general}
    changes = {}
    for scorer in SCORERS:
        before = _scores(client, base.model_name, names[scorer], "baseline")
        after = _scores(client, job["id"], names[scorer], "report")
        for group in GROUPS:
            ids = [key for key in after if key.startswith(f"{group}-") and key in before]
            changes[scorer, group] = Change(
                _mean([before[key] for key in ids]), _mean([after[key] for key in ids]), len(ids)
            )
    domain = {
        scorer: _mean(
            list(_scores(client, job["id"], base.domain_benchmark(scorer), "report").values())
        )
        for scorer in SCORERS
    }
    decisions = list(client.pages(f"{JOBS}/{job['id']}/decisions", limit=100))[::-1]
    return Outcome(title, job, changes, domain, decisions)


def build_table(outcomes: list[Outcome]) -> Table:
    """The closing table: a column a job."""
    table = Table(title="What was learned, and what was forgotten", title_justify="left")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.title, justify="right")
    for scorer in SCORERS:
        cells = [f"{outcome.domain[scorer]:.1%}" for outcome in outcomes]
        table.add_row(f"tickets, {SHORT[scorer]}", *cells)
    table.add_section()
    for scorer in SCORERS:
        for group in GROUPS:
            shown = [outcome.changes[scorer, group] for outcome in outcomes]
            table.add_row(
                f"general {SHORT[scorer]}, {group} ({shown[0].num_items:,} items)",
                *(f"{c.before:.1%} -> {c.after:.1%}" for c in shown),
            )
    table.add_section()
    table.add_row("drop of the mean [90 % interval]", *(_interval(o.job) for o in outcomes))
    table.add_row("verdict", *(_verdict(o.job) for o in outcomes))
    table.add_row("decisions", *(_decisions(o) for o in outcomes))
    table.add_row("seconds", *(f"{o.seconds:.0f}" for o in outcomes))
    return table


def describe_decision(decision: Json) -> str:
    """One decision as a line."""
    change = ", ".join(
        f"{name} {decision['before']['strengths'].get(name, 0):g} -> {value:g}"
        for name, value in decision["after"]["strengths"].items()
        if value != decision["before"]["strengths"].get(name)
    )
    text = f"step {decision['step']:>3} branch {decision['branch']}  {decision['action']}"
    return f"{text}  {change}".rstrip() + f"  {decision['reason']}"


def broken_claims(plain: Outcome, controlled: Outcome) -> list[str]:
    """What the run does not bear out, in words; nothing where every claim holds."""
    broken = []
    for scorer in SCORERS:
        name = SHORT[scorer]
        lost = plain.changes[scorer, "unseen"]
        if lost.drop <= LIMIT:
            broken.append(f"plain fine-tuning lost only {lost.drop:.1%} by {name} on unseen skills")
        held = controlled.changes[scorer, "unseen"]
        if held.num_items < 1000:
            broken.append(f"only {held.num_items} unseen items were measured by {name}")
        if held.drop > LIMIT:
            broken.append(
                f"the controlled job lost {held.drop:.1%} by {name} on unseen skills, above {LIMIT:.0%}"
            )
        wanted = DOMAIN_SHARE * plain.domain[scorer]
        if controlled.domain[scorer] < wanted:
            broken.append(
                f"the controlled job reaches {controlled.domain[scorer]:.1%} on the domain by {name}, below"
                f" {wanted:.1%}"
            )
    actions = [decision["action"] for decision in controlled.decisions]
    if "roll_back" not in actions:
        broken.append("the controller never rolled back")
    retention = (controlled.job["report"] or {}).get("retention")
    if retention != "held":
        broken.append(f"the controlled job ended {retention or controlled.job['status']}, not held")
    return broken


def _scores(client: Client, subject: str, benchmark: str, purpose: str) -> dict[str, float]:
    found = client.get(
        "/v1/benchmark_results",
        subject_id=subject,
        benchmark=benchmark,
        purpose=purpose,
        include="items",
        limit=1,
    )["data"]
    return {item["id"]: item["score"] for row in found for item in row["items"] or ()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _interval(job: Json) -> str:
    verdict = (job["report"] or {}).get("verdict")
    if not verdict or verdict["drop"] is None:
        return "-"
    return f"{verdict['drop']:.1%} [{verdict['lower']:.1%}, {verdict['upper']:.1%}]"


def _verdict(job: Json) -> str:
    report = job["report"] or {}
    if not job["retention"] or not job["retention"]["strategies"]:
        return "off"
    verdict = report.get("verdict") or {}
    return f"{verdict.get('verdict', '-')} ({report.get('retention') or job['status']})"


def _decisions(outcome: Outcome) -> str:
    counts: dict[str, int] = {}
    for decision in outcome.decisions:
        counts[decision["action"]] = counts.get(decision["action"], 0) + 1
    return ", ".join(f"{count} {action}" for action, count in counts.items()) or "-"
