"""Results on disk: one JSON file for each (method, setting, seed, scenario), named by all that it depends on."""

import ast
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.board.material import SIZES
from tests.benchmarks.board.methods import (
    STEPS,
    Method,
    Setting,
    rate_of,
    resolve,
    uses_general_rows,
)

BOARD = "tests.benchmarks.board"
BASE_ROOTS = (f"{BOARD}.material", "workers.demo_model.pretraining")
TRIAL_ROOTS = (f"{BOARD}.trial", "workers.training.build", "workers.training.loop")
# Imports every method; a trial depends on its own methods alone. The table holds what `describe` writes out.
NOT_FOLLOWED = frozenset({"workers.training.strategies", f"{BOARD}.table", f"{BOARD}.methods"})


@dataclass(frozen=True)
class Cell:
    """One trial: a method at one of its settings, on a seed, over so many domains."""

    method: Method
    setting: Setting
    seed: int
    num_stages: int

    def describe(self) -> dict[str, Any]:
        """All that its result depends on; the method's name and place in the table are not among it."""
        method = self.method
        return {
            "strategies": [config.model_dump() for config in resolve(method, self.setting)],
            "training": method.training,
            "protocol": method.protocol,
            "rate": rate_of(method, self.setting),
            "steps": round(STEPS * self.setting.steps),
            "alpha": self.setting.alpha,
            "general_rows": uses_general_rows(method),
            "seed": self.seed,
            "num_stages": self.num_stages,
            "sizes": vars(SIZES),
            "torch": torch.__version__,
            "code": trial_fingerprint(method.kinds()),
        }

    def key(self) -> str:
        """Names its file."""
        described = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:20]


class Cache:
    """Finished trials, and what went wrong with those that did not finish."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a trial, where it is there."""
        return self._read(cell.key(), "json")

    def failure(self, cell: Cell) -> str | None:
        """Why its last try failed; None where it was not tried, or succeeded."""
        found = self._read(cell.key(), "failed")
        return None if found is None else str(found["error"])

    def save(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keeps a result; an interrupted program leaves the whole of it or nothing."""
        about = {"method": cell.method.name, "setting": cell.setting.label}
        self._write(cell.key(), "json", {**about, **cell.describe(), **result})
        (self.directory / f"{cell.key()}.failed").unlink(missing_ok=True)

    def save_failure(self, cell: Cell, error: str) -> None:
        """Keeps an error for the report; the trial is tried again by the next run."""
        self._write(cell.key(), "failed", {"method": cell.method.name, "error": error})

    def _read(self, key: str, ending: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.directory / f"{key}.{ending}").read_text())
        except FileNotFoundError:
            return None
        return found

    def _write(self, key: str, ending: str, content: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f".{key}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(content))
        temporary.replace(self.directory / f"{key}.{ending}")


@cache
def base_fingerprint() -> str:
    """Of the code that makes base models and rows."""
    return fingerprint(BASE_ROOTS)


@cache
def trial_fingerprint(kinds: tuple[str, ...]) -> str:
    """Of the code that a trial with these strategies runs: not of the other strategies'."""
    methods = tuple(f"workers.strategies.methods.{kind}" for kind in sorted(kinds))
    return fingerprint(TRIAL_ROOTS + methods)


def fingerprint(roots: Iterable[str]) -> str:
    """Hash of the syntax trees of the modules and all of this project's that they import."""
    seen: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in seen or name in NOT_FOLLOWED:
            continue
        path = _find(name)
        if path is None:
            continue
        tree = ast.parse(path.read_text())
        seen[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
        waiting += _imports(tree)
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _find(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _imports(tree: ast.Module) -> list[str]:
    """Modules of the workers and of the board; the application's types show in the configurations."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.startswith(("workers.", f"{BOARD}."))]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
