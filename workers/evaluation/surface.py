"""`python -m workers.evaluation.surface`: the loss around tuned, plain and base, as JSON and as a picture."""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.domain.runplan import RowsPlan
from app.errors import RetainError
from workers.data.tokens import TokenStore, load_tokens
from workers.evaluation.adapters import load_adapter
from workers.evaluation.contours import draw_surfaces
from workers.evaluation.landscape import (
    Axes,
    Subset,
    Surface,
    difference,
    loss_of,
    sharpness,
    surface,
)

DESCRIPTION = """\
Measures the loss around the weights of a tuned model, of a plainly tuned one and of their base, on the same
rows and in the same directions, and writes surface.json and surface.png into a directory.

Directions are Gaussian, filter-normalised (Li et al. 2018): a step of 1 is as long as the weights, filter by
filter; norms and biases stay. Sharpness is the mean rise of the loss at --sharpness-radius."""

EPILOG = """\
example: python -m workers.evaluation.surface --base models/base --tuned out/tuned --plain out/plain \\
           --rows general.jsonl --out surface --grid 21 --radius 0.5
cost: grid x grid evaluations of the rows for each model, and 2 x --directions more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    asked = build_parser().parse_args(arguments)
    try:
        surfaces, num_rows = measure(asked)
    except (RetainError, ValueError, OSError) as error:
        _say(f"surface: {error}")
        return 1
    asked.out.mkdir(parents=True, exist_ok=True)
    content = {
        "rows": str(asked.rows),
        "num_rows": num_rows,
        "seed": asked.seed,
        "surfaces": {s.name: s.as_json() for s in surfaces},
    }
    (asked.out / "surface.json").write_text(json.dumps(content, indent=1) + "\n")
    draw_surfaces(surfaces, asked.out / "surface.png")
    _say(f"wrote {asked.out / 'surface.json'} and {asked.out / 'surface.png'}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m workers.evaluation.surface",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, metavar="DIR", help="the model before tuning")
    add(
        "--tuned", type=Path, required=True, metavar="DIR", help="a model or an adapter of the base"
    )
    add("--plain", type=Path, metavar="DIR", help="the same job without strategies")
    add("--rows", type=Path, required=True, metavar="FILE", help="training rows, JSON lines")
    add("--out", type=Path, required=True, metavar="DIR", help="where the two files go")
    add("--grid", type=int, default=21, help="points along each axis, odd (%(default)s)")
    add("--radius", type=float, default=1.0, help="of the grid, relative (%(default)s)")
    add("--seed", type=int, default=0, help="of directions and rows (%(default)s)")
    add("--num-rows", type=int, default=64, help="rows that are read (%(default)s)")
    add("--max-tokens", type=int, default=512, help="longer rows are cut (%(default)s)")
    add("--first", choices=("random", "tuned"), default="random",
        help="first direction: random, or from base to tuned, where base lies 1 before tuned (%(default)s)")  # fmt: skip
    add("--sharpness-radius", type=float, default=0.1, help="relative (%(default)s)")
    add("--directions", type=int, default=8, help="of the sharpness (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


def measure(asked: argparse.Namespace) -> tuple[list[Surface], int]:
    """The surfaces of tuned, plain where there is one, and base; and over how many rows.

    Raises:
        RetainError: The rows are none.
        ValueError: The grid is none, or the models differ in their parameters.
    """
    paths = {"tuned": asked.tuned, "plain": asked.plain, "base": asked.base}
    paths = {name: path for name, path in paths.items() if path is not None}
    rows = Subset(_tokenise(asked), asked.num_rows, asked.seed)
    toward = None
    if asked.first == "tuned":
        toward = difference(_load(asked.base, asked), _load(asked.tuned, asked))
    axes = Axes.grid(asked.grid, asked.radius, asked.seed, toward)
    surfaces = [_measure_one(name, path, rows, axes, asked) for name, path in paths.items()]
    return surfaces, len(rows.lengths)


def load_model(directory: Path, base: Path) -> nn.Module:
    """A model in float32; an adapter is merged into a copy of its base, so its effective weights are seen."""
    from transformers import AutoModelForCausalLM

    is_adapter = (directory / "adapter_config.json").exists()
    options: Mapping[str, Any] = {
        "dtype": torch.float32,
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    model: Any = AutoModelForCausalLM.from_pretrained(base if is_adapter else directory, **options)
    if is_adapter:
        wrapped: Any = load_adapter(model, directory)
        model = wrapped.merge_and_unload()
    loaded: nn.Module = model
    return loaded.eval()


def _measure_one(
    name: str, path: Path, rows: Subset, axes: Axes, asked: argparse.Namespace
) -> Surface:
    model = _load(path, asked)
    axes_size = len(axes.first) * len(axes.second)
    every = max(axes_size // 10, 1)

    def evaluate() -> float:
        return loss_of(model, rows)

    def tell(done: int, total: int) -> None:
        if done % every == 0 or done == total:
            _say(f"{name}: {done} of {total} points")

    measured = sharpness(
        model,
        evaluate,
        relative_radius=asked.sharpness_radius,
        num_directions=asked.directions,
        seed=asked.seed,
    )
    _say(
        f"{name}: sharpness {measured.value:.4g} +- {measured.stderr:.2g}, {axes_size} points next"
    )
    return surface(name, model, evaluate, axes, measured, tell=tell)


def _load(path: Path, asked: argparse.Namespace) -> nn.Module:
    return load_model(path, asked.base).to(asked.device)


def _tokenise(asked: argparse.Namespace) -> TokenStore:
    from transformers import AutoTokenizer

    from workers.data.templates import DEFAULT_CHAT_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(
        asked.base, local_files_only=True, trust_remote_code=False
    )
    plan = RowsPlan(
        path=str(asked.rows), sha256=hashlib.sha256(asked.rows.read_bytes()).hexdigest()
    )
    with tempfile.TemporaryDirectory(prefix="surface-") as cache:
        return load_tokens(
            plan,
            tokenizer,
            chat_template=None if tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE,
            max_seq_length=asked.max_tokens,
            cache_directory=Path(cache),
            param="--rows",
        )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
