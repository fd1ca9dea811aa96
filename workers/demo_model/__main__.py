"""`python -m workers.demo_model OUT [--seed N]`: builds the demo's base model and data once."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from workers.demo_model.writing import NUM_STEPS, describe, draw_all, is_complete, write_lines


def main(arguments: list[str]) -> int:
    """Builds OUT and returns 0; does nothing where it is complete for the seed."""
    parser = argparse.ArgumentParser(prog="python -m workers.demo_model", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order")
    parser.add_argument(
        "--steps", type=int, default=NUM_STEPS, help="fewer make a worse model, sooner"
    )
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    if is_complete(out, options.seed, options.steps):
        print(f"{out} is complete", flush=True)
        return 0
    if out.exists() and any(out.iterdir()) and not (out / "demo.json").exists():
        print(f"{out} holds something else; name a new or empty directory", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        build(scratch, options.seed, options.steps)
        scratch.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{out} is complete", flush=True)
    return 0


def build(directory: Path, seed: int, num_steps: int) -> None:
    """Writes model, rows, benchmarks and domains, and last demo.json, into the directory."""
    print("generating questions, rows and notes", flush=True)
    samples, files = draw_all(seed)
    for path, lines in files.items():
        write_lines(directory / path, lines)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported
    import torch

    from workers.demo_model import pretraining

    torch.set_num_threads(1)
    print(f"training the base model on {len(samples):,} rows", flush=True)
    model, tokenizer = pretraining.pretrain(samples, seed, _report, num_steps=num_steps)
    pretraining.save(model, tokenizer, directory / "model")
    paths = [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]
    described = describe(seed, num_steps, directory, paths)
    (directory / "demo.json").write_text(json.dumps(described, indent=1) + "\n")


def _report(step: int, num_steps: int, loss: float, seconds: float) -> None:
    left = seconds / step * (num_steps - step)
    print(f"step {step}/{num_steps}  loss {loss:.3f}  {left:.0f} s left", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
