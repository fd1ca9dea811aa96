"""`make bench`: every side-by-side measurement, as JSON on stdout; figures worth keeping go to RESULTS.md."""

import json
import sys

from tests.benchmarks import distillation_cost, evaluation_speed, strategy_terms, training_speed


def main() -> None:
    """Runs them one after the other; minutes."""
    for module in (strategy_terms, distillation_cost, evaluation_speed, training_speed):
        sys.stdout.write(f"{module.__name__}\n{json.dumps(module.run(), indent=1)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
