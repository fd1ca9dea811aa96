"""Runs with one adapter a stage are merged, published, loaded again and routed to."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from tests.tiny import make_tokenizer
from tests.workers.training.runs import CPU, ListRows, make_plan, make_run
from tests.workers.training.staged import (
    NAMES,
    STEPS,
    adapters,
    make_staged_plan,
    make_staged_run,
)
from workers.evaluation.adapters import load_adapter
from workers.evaluation.routing import Router, base_representations, load_router
from workers.export.bottleneck import BottleneckModel, load_bottlenecks
from workers.export.merge import active_adapters, adapted_layers, adapter_change
from workers.training.exporting import write_artifact
from workers.training.loop import train_step
from workers.training.models import load_base

IDS = torch.tensor([[7, 20, 33, 46, 59, 72]])


def train(run, steps):
    return [train_step(run) for _ in range(steps)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_model():
    return load_base(make_plan("unused").base, CPU, torch.float32).eval()


def finish(run):
    """What happens at the end of a run before the report."""
    for strategy in run.strategies:
        strategy.on_task_end(run.ctx)
    for strategy in run.strategies:
        strategy.on_publish(run.ctx)
    run.model.eval()
    return run


@pytest.mark.parametrize("merge", ["cat", "svd", "ties", "dare"])
def test_a_merged_job_is_measured_and_published_as_one_adapter(tmp_path, merge):
    run = make_staged_run(tmp_path, adapters(merge=merge, density=0.7))
    train(run, STEPS * 3)
    changes: dict[str, Any] = {}
    for name in NAMES:
        for layer_name, layer in adapted_layers(run.model, name, "x").items():
            changes[layer_name] = changes.get(layer_name, 0) + adapter_change(layer, name).detach()
    told = {}
    run.ctx.note = lambda code, text, data: told.update({code: data})
    finish(run)
    assert active_adapters(run.model) == ("merged",)
    assert told["adapters_merged"]["rank"] == (4 if merge == "svd" else 12)
    if merge == "cat":
        for layer_name, layer in adapted_layers(run.model, "merged", "x").items():
            found = adapter_change(layer, "merged")
            assert (found - changes[layer_name]).norm() <= 1e-6 * changes[layer_name].norm()
        assert told["adapters_merged"]["relative_error"] == 0
    assert not any("merged" in name for name in run.all_params)
    merged = logits(run.model)
    directory = tmp_path / "artifact"
    plan = make_staged_plan(tmp_path, adapters(merge=merge))
    write_artifact(plan, run.model, make_tokenizer(), directory, alpha=1.0)
    torch.testing.assert_close(logits(load_peft(directory)), merged, rtol=1e-5, atol=1e-6)
    run.ctx.adapters.activate(["law"])
    assert torch.equal(logits(load_peft(directory / "law")), logits(run.model))


def load_peft(directory):
    return load_adapter(base_model(), directory).eval()


def test_merging_again_gives_the_same(tmp_path):
    run = make_staged_run(tmp_path, adapters(merge="dare"))
    train(run, STEPS * 2)
    finish(run)
    once = logits(run.model)
    for strategy in run.strategies:
        strategy.on_publish(run.ctx)
    assert torch.equal(logits(run.model), once)


def test_stacked_adapters_compute_the_same_once_they_are_one(tmp_path):
    run = make_staged_run(tmp_path, adapters(compose="stacked"))
    train(run, STEPS * 3)
    run.model.eval()
    stacked = logits(run.model)
    finish(run)
    assert active_adapters(run.model) == ("merged",)
    torch.testing.assert_close(logits(run.model), stacked, rtol=1e-5, atol=1e-5)


def test_an_artifact_holds_every_finished_adapter_and_routes_to_them(tmp_path):
    run = make_staged_run(tmp_path, adapters())
    train(run, STEPS * 2)  # the third has not begun
    finish(run)
    directory = tmp_path / "artifact"

    def extras(partial):
        for strategy in run.strategies:
            strategy.export_files(run.ctx, partial)

    plan = make_staged_plan(tmp_path, adapters())
    write_artifact(plan, run.model, make_tokenizer(), directory, alpha=1.0, extras=extras)
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"law", "medicine"}
    assert torch.equal(logits(load_peft(directory)), logits(run.model))
    for name in ("law", "medicine"):
        run.ctx.adapters.activate([name])
        assert torch.equal(logits(load_peft(directory / name)), logits(run.model))
    record = json.loads((directory / "law" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == "tiny"
    files = {p.suffix for p in directory.rglob("*") if p.is_file()}
    assert files <= {".json", ".safetensors", ".jinja"}

    prompts = [run.stores["training"].row(k)[0] for k in range(4)]
    cut = [ids[: len(ids) // 3] if len(ids) // 3 > 1 else ids for ids in prompts]
    found = base_representations(run.model, cut)
    own = run.ctx.represent("training", range(4))
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    router: Router[Any] = load_router(directory, lambda rows: base_representations(run.model, rows))
    similar = own @ torch.stack([run.strategies[0].centroids[n] for n in ("law", "medicine")]).T
    best, index = similar.max(1)
    expected = [
        ("law", "medicine")[k] if v >= router.threshold else None
        for v, k in zip(best.tolist(), index.tolist(), strict=True)
    ]
    assert router.route_all(cut) == expected


def test_bottlenecks_are_published_and_loaded_again(tmp_path):
    run = make_staged_run(tmp_path, adapters(kind="bottleneck", compose="stacked"))
    train(run, STEPS * 2)
    finish(run)
    assert isinstance(run.model, BottleneckModel)
    assert active_adapters(run.model) == NAMES[:2]
    directory = tmp_path / "artifact"
    plan = make_staged_plan(tmp_path, adapters(kind="bottleneck"))
    write_artifact(plan, run.model, make_tokenizer(), directory, alpha=1.0)
    loaded = load_bottlenecks(base_model(), directory).eval()
    assert torch.equal(logits(loaded), logits(run.model))
    assert not torch.equal(logits(loaded), logits(base_model()))


class WordRows(ListRows):
    """Rows of tokens from a range of their own."""

    def __init__(self, count, low, high, *, seed):
        super().__init__(count, seed=seed, vocab_size=high - low + 3)  # its ids begin at 3
        self.rows = [((ids + low - 3).astype("int32"), weights) for ids, weights in self.rows]


def test_domains_of_other_words_are_told_apart_on_rows_that_were_not_trained_on(tmp_path):
    ranges = {"law": (20, 28), "medicine": (90, 98), "general": (180, 290)}
    stores = {
        "training": WordRows(40, *ranges["law"], seed=1),
        "training-1": WordRows(40, *ranges["medicine"], seed=2),
        "general": WordRows(80, *ranges["general"], seed=3),
    }
    names = ("law", "medicine")
    plan = make_staged_plan(tmp_path, adapters(), names=names)
    run = make_run(plan, stores=stores)
    train(run, STEPS * 2)
    finish(run)
    strategy = run.strategies[0]
    assert strategy.routing["false_accept"] <= 0.15  # of 40 held-out rows; 5 % of the others pass
    router: Router[Any] = Router(
        names,
        torch.stack([strategy.centroids[name] for name in names]),
        strategy.routing["threshold"],
        lambda rows: base_representations(run.model, rows),
    )
    for name, (low, high) in ranges.items():
        rows = [ids for ids, _ in WordRows(60, low, high, seed=50).rows]
        routes = Counter(router.route_all(rows))
        if name == "general":
            assert routes[None] >= 0.8 * len(rows)
        else:  # rows of four tokens may fall back to the base; few go to the other domain
            assert routes[name] >= 0.6 * len(rows)
            assert routes[name] + routes[None] >= 0.95 * len(rows)
