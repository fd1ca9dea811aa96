"""A trainer that speaks plain HTTP to Retain: `RETAIN_API_KEY=rt_... python plain_http.py general items.jsonl`.

The benchmark exists already: `retain benchmarks add general items.jsonl --scorer exact_match`. Here a "model" is
one number that every step wears away and regularisation protects; put your own trainer in its place.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

URL = os.environ.get("RETAIN_BASE_URL", "http://127.0.0.1:8000")
STEPS, INTERVAL = 100, 20


def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request; an error is a `urllib.error.HTTPError` whose body says why."""
    headers = {
        "authorization": f"Bearer {os.environ['RETAIN_API_KEY']}",
        "content-type": "application/json",
    }
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{URL}/v1/{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=150) as answer:
        return json.load(answer)


def score(benchmark: str, ids: list[str], health: float) -> list[dict[str, Any]]:
    """Your evaluation: each item right or wrong."""
    right = round(health * 0.6 * len(ids))
    items = [{"id": key, "score": float(n < right)} for n, key in enumerate(ids)]
    return [{"benchmark": benchmark, "items": items}]


def train(benchmark: str, ids: list[str]) -> str:
    """Trains under watch; gives the run's id."""
    policy = {"benchmarks": [{"name": benchmark}]}
    levers = [{"type": "l2", "strength": 1.0}]
    run_id = call("POST", "runs", {"model": "mine", "policy": policy, "levers": levers})["id"]
    run = f"runs/{run_id}"
    call("POST", f"{run}/baseline", {"scores": score(benchmark, ids, 1.0)})
    health, strength, rate, branch, step, cursor, running = 1.0, 1.0, 1.0, 0, 0, "", True
    saved = {0: health}
    while running and step < STEPS:
        step += 1
        health -= 0.002 * rate / strength  # your step
        if step % INTERVAL:
            continue
        saved[step] = health
        scores = score(benchmark, ids, health)
        call("POST", f"{run}/evaluations", {"branch": branch, "step": step, "scores": scores})
        # The decision on it, and what people ordered meanwhile.
        after = f"&after={cursor}" if cursor else ""
        for decision in call("GET", f"{run}/decisions?wait=60{after}")["data"]:
            cursor = decision["id"]
            for told in decision["instructions"]:
                match told["type"]:
                    case "set_strength":
                        strength = told["strength"]
                    case "set_learning_rate":
                        rate = told["scale"]
                    case "roll_back":
                        step, branch = told["step"], told["branch"]
                        health = saved[step]
                    case "stop":
                        running = False
            if decision["instructions"]:
                call("POST", f"{run}/decisions/{cursor}/acknowledge", {"step": step + 1})
            print(f"step {decision['step']}: {decision['action']}. {decision['reason']}")
    print("ended with", call("POST", f"{run}/finish", {})["verdict"]["verdict"])
    return run_id


if __name__ == "__main__":
    name, path = sys.argv[1:]
    train(name, [json.loads(line)["id"] for line in Path(path).read_text().splitlines()])
