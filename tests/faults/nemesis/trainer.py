"""The scripted trainer, signing everything it says with its attempt: `python -m tests.faults.nemesis.trainer`."""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.workers.scripted_trainer import Script, Talk

ROLLS_BACK = 21  # a job of so many steps has numbers that are not finite at its step 12, once


class SignedTalk(Talk):
    """Puts the attempt where the server keeps what a trainer says."""

    def __init__(self, path: str, attempt: int) -> None:
        super().__init__(path)
        self._attempt = attempt

    def tell(self, kind: str, **fields: Any) -> int:
        signed = {"attempt": self._attempt}
        match kind:
            case "progress":
                for row in fields["metrics"]:
                    row["values"] = row["values"] | signed
            case "evaluated":
                fields["values"] = fields.get("values", {}) | signed
            case "checkpoint_saved":
                fields["metrics"] = fields["metrics"] | signed
            case "finished":
                fields["seconds"] = fields["seconds"] | signed
            case _:
                pass  # nothing in it is kept
        return super().tell(kind, **fields)


def main() -> None:
    """Runs one attempt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pace", type=float, required=True)
    parser.add_argument("--plan", required=True)
    parser.add_argument("--socket", required=True)
    options = parser.parse_args()
    plan = json.loads(Path(options.plan).read_text())
    script = Script(plan, SignedTalk(options.socket, plan["attempt"]), options.pace)
    script.paced(bad_at=12 if script.total == ROLLS_BACK else 0)


if __name__ == "__main__":
    main()
