"""Readings and numbers in words, for reasons and events."""

from app.domain.decisions import Reading, Verdict


def describe_reading(reading: Reading) -> str:
    """The reading as a sentence with its numbers."""
    if reading.verdict in {Verdict.NO_DATA, Verdict.AT_FLOOR}:
        return (
            "No benchmark could be measured."
            if reading.verdict is Verdict.NO_DATA
            else "Every benchmark is at floor: nothing can be said."
        )
    parts = []
    if reading.drop is not None and reading.lower is not None and reading.upper is not None:
        parts.append(
            f"general ability fell {reading.drop:.2%} (bounds {reading.lower:.2%} to {reading.upper:.2%}, "
            f"limit {reading.limit:.2%})"
        )
    parts += [
        f"{b.name} rose {b.drop:.4f} nats per token (bounds {b.lower:.4f} to {b.upper:.4f}, limit {b.limit:.4f})"
        if b.scorer == "nll"
        else f"{b.name} fell {b.drop:.2%} (bounds {b.lower:.2%} to {b.upper:.2%}, limit {b.limit:.2%})"
        for b in reading.benchmarks
        if b.limit is not None
        and b.drop is not None
        and b.lower is not None
        and b.upper is not None
    ]
    verdict = {
        Verdict.REGRESS: "Confirmed regression",
        Verdict.PASS: "Within the limits",
        Verdict.INCONCLUSIVE: "Neither confirmed nor ruled out",
    }[reading.verdict]
    return f"{verdict} at look {reading.look}: {'; '.join(parts) or 'a score is not finite'}."


def number_text(value: float | None) -> str:
    """A number as short as six digits allow."""
    return "none" if value is None else f"{value:.6g}"
