"""`make fuzz`: schemathesis against a real API, for so many seconds; its figures, and an error where anything failed."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.server import running_target

CONFIG = Path(__file__).with_name("schemathesis.toml")


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("rest", nargs="*", help="passed on to schemathesis")
    wish = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retain-fuzz-") as name:
        root = Path(name)
        with running_target(root) as target:
            before = target.resident_bytes()
            report = root / "report.ndjson"
            line = [str(Path(sys.executable).with_name("st")), "--config-file", str(CONFIG), "run"]
            line += [f"{target.url}/openapi.json", "--max-time", str(wish.seconds)]
            line += ["--seed", str(wish.seed), "--report", "ndjson"]
            line += ["--report-ndjson-path", str(report), *wish.rest]
            environment = os.environ | {"RETAIN_FUZZ_KEY": target.key}
            status = subprocess.run(line, env=environment, cwd=root, check=False).returncode
            grown = (target.resident_bytes() - before) / 2**20
            statuses = count_statuses(report)
            log = target.log.read_text(errors="replace")
    errors = sum(count for code, count in statuses.items() if code >= 500)
    print(f"FUZZ cases={sum(statuses.values())} 5xx={errors} tracebacks={log.count('Traceback')} "
          f"rss_growth_mib={grown:.0f} statuses={dict(sorted(statuses.items()))}")  # fmt: skip
    if errors or "Traceback" in log:
        print(log[-8000:])
        return status or 1
    return status


def count_statuses(report: Path) -> Counter[int]:
    """Answers by status, from what schemathesis wrote down."""
    found: Counter[int] = Counter()

    def visit(value: object) -> None:
        if isinstance(value, dict):
            code = value.get("status_code")
            if isinstance(code, int) and "headers" in value:
                found[code] += 1
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list):
            for inner in value:
                visit(inner)

    with report.open() as lines:
        for line in lines:
            visit(json.loads(line))
    return found


if __name__ == "__main__":
    sys.exit(main())
