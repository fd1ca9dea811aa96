"""The memory: what is admitted, from where rows are drawn, what is published, and what is refused."""

import hashlib
import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from app.domain.configs.memory import MemoryConfig
from tests.workers.strategies.stage import Stage, make_micro, make_rows
from workers.strategies.memory_files import load_memory
from workers.strategies.methods.memory import Memory, content_hash, worth_remembering

WIDTH = 11


def stage_of(strength=0.25, start=True, boundary=0, general=None, **knobs):
    memory = Memory(**{"dim": WIDTH, "capacity": 30, "dup_threshold": 1.0, **knobs})
    more = {} if general is None else {"general": general}
    return Stage([memory], {"memory": strength}, start=start, boundary=boundary, **more), memory


def nats_per_token(stage, rows):
    """Of the starting model, one row at a time."""
    values = []
    for ids in rows:
        micro = make_micro([("general", 0, ids, False)])
        if not micro.targets_N.numel():
            values.append(math.nan)
            continue
        with torch.no_grad():
            logits = stage.base(micro.input_ids_BT, micro.positions_N)
        values.append(float(F.cross_entropy(logits, micro.targets_N)))
    return values


def test_the_first_task_starts_by_remembering_general_rows():
    stage, memory = stage_of(nll_quantile=0.0)
    texts = {content_hash(" ".join(map(str, row))) for row in stage.general}
    assert {e.content for e in memory.store.entries} == texts
    assert {(e.domain, e.store, e.modality) for e in memory.store.entries} == {
        ("general", "general", "text")
    }
    for entry, key in zip(memory.store.entries, memory.store.keys_ND, strict=True):
        torch.testing.assert_close(key, stage.ctx.embed("general", [entry.row])[0])


def test_rows_that_the_starting_model_knows_best_are_left_out():
    stage, memory = stage_of(nll_quantile=0.3)
    nats = nats_per_token(stage, stage.general)
    known = [row for row in range(20) if not math.isnan(nats[row])]
    assert len(known) > 15
    easiest = sorted(known, key=lambda row: nats[row])[: math.floor(0.3 * len(known))]
    expected = {row for row in known if row not in easiest}
    remembered = {entry.row for entry in memory.store.entries}
    repeated = int(memory.metrics()["duplicates"])
    assert remembered <= expected
    assert len(remembered) + repeated == len(expected)
    assert memory.metrics()["too_easy"] == 20 - len(expected)


def test_the_quantile_keeps_ties_and_refuses_what_is_no_number():
    nats = torch.tensor([3.0, 1.0, 1.0, 2.0, math.nan, math.inf, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    assert worth_remembering(nats, 0.0).tolist() == [n not in (4, 5) for n in range(12)]
    assert worth_remembering(nats, 0.1).tolist() == [n not in (4, 5) for n in range(12)]
    assert worth_remembering(nats, 0.3).tolist() == [n not in (1, 2, 3, 4, 5) for n in range(12)]
    assert worth_remembering(torch.zeros(0), 0.5).tolist() == []
    assert worth_remembering(torch.full((3,), math.nan), 0.5).tolist() == [False] * 3


def test_rows_that_repeat_a_benchmark_are_never_remembered():
    stage, memory = stage_of(start=False, nll_quantile=0.0)
    asked = []

    def overlaps(store, rows):
        asked.append(store)
        return [row % 4 == 0 for row in rows]

    stage.ctx.overlaps = overlaps
    memory.on_task_start(stage.ctx)
    memory.on_task_end(stage.ctx)
    assert asked == ["general", "training"]
    assert len(memory.store) > 15
    assert all(entry.row % 4 for entry in memory.store.entries)
    assert memory.metrics()["overlapping"] == 5 + 6


def test_no_more_rows_are_read_than_asked_for_and_they_are_a_uniform_sample():
    stage, memory = stage_of(start=False, nll_quantile=0.0, fill_rows=5)
    asked = []

    def overlaps(_, rows):
        asked.append(rows)
        return [False] * len(rows)

    stage.ctx.overlaps = overlaps
    counts = torch.zeros(20)
    for seed in range(300):
        stage.ctx.run_seed = seed
        memory.on_task_start(stage.ctx)
        assert len(set(asked[-1])) == 5
        counts[asked[-1]] += 1
    assert float(((counts - 75) ** 2 / (75 * 0.75)).sum()) * 19 / 20 < 43.8  # chi-square, 19, 0.001


def test_a_finished_domain_is_replayed_from_the_next_task_on():
    stage, memory = stage_of(strength=0.5, boundary=2, nll_quantile=0.0, capacity=12)
    first = {s.name: s for s in stage.streams()}
    assert set(first) == {"domain", "memory"}
    assert first["memory"].rows_per_step == 0.5
    stage.train(3)
    assert stage.ctx.task_index == 1
    second = {s.name: s for s in stage.streams()}
    assert set(second) == {"domain", "memory", "memory_earlier"}
    of_general, of_domain = second["memory"], second["memory_earlier"]
    assert (of_general.store, of_domain.store) == ("general", "training")
    assert (len(of_general.rows), len(of_domain.rows)) == (6, 6)
    assert of_general.rows_per_step == of_domain.rows_per_step == 0.25
    assert of_general.is_uniform
    assert of_domain.counts_as_task
    assert memory.metrics()["rows"] > 0


@pytest.mark.parametrize(("rows", "asked"), [([], True), (make_rows(20, 2), False)])
def test_without_general_rows_it_waits_for_the_second_task_and_says_so(rows, asked):
    memory = Memory(dim=WIDTH, capacity=30, general=asked)
    stage = Stage([memory], {"memory": 0.5}, general=rows, start=False)
    notes = []
    stage.ctx.note = lambda code, text, data: notes.append(code)
    memory.on_task_start(stage.ctx)
    assert notes == ["memory_empty"]
    assert [s.name for s in stage.streams()] == ["domain"]
    assert not memory.streams_changed(stage.ctx)
    memory.on_task_end(stage.ctx)
    assert memory.streams_changed(stage.ctx)
    assert [s.name for s in stage.streams()] == ["domain", "memory_earlier"]


def test_what_is_deleted_is_no_longer_drawn_nor_published(tmp_path):
    stage, memory = stage_of(nll_quantile=0.0)
    gone = content_hash(" ".join(map(str, stage.general[4])))
    assert gone == hashlib.sha256(" ".join(map(str, stage.general[4])).encode()).hexdigest()
    assert memory.store.delete([gone]) == 1
    (stream,) = (s for s in stage.streams() if s.name == "memory")
    assert 4 not in stream.rows
    memory.export_files(stage.ctx, tmp_path)
    assert gone not in [e.content for e in load_memory(tmp_path, encoder="bag of tokens").entries]


@pytest.mark.parametrize("publish", ["ids", "texts", "none"])
def test_the_index_is_published_with_texts_only_where_asked(tmp_path, publish):
    stage, memory = stage_of(publish=publish)
    memory.export_files(stage.ctx, tmp_path)
    if publish == "none":
        assert not list(tmp_path.iterdir())
        return
    manifest = json.loads((tmp_path / "memory.json").read_text())
    texts = [entry["text"] for entry in manifest["entries"]]
    rows = [" ".join(map(str, stage.general[e["row"]])) for e in manifest["entries"]]
    assert texts == (rows if publish == "texts" else [None] * len(rows))
    found = load_memory(tmp_path, encoder="bag of tokens")
    assert torch.equal(found.keys_ND, memory.store.keys_ND)
    entry = memory.store.entries[3]
    ((best, *_),) = found.search(stage.ctx.embed("general", [entry.row]), 2)
    assert best.entry.id == entry.id


def test_keys_of_another_encoder_are_refused():
    _, memory = stage_of()
    state = memory.state_dict()
    other, fresh = stage_of(start=False)
    other.ctx.encoder = lambda: "another"
    other.streams()
    with pytest.raises(ValueError, match="encode its rows anew"):
        fresh.load_state_dict(state)


def test_a_run_without_representations_is_refused():
    stage, memory = stage_of(start=False)
    stage.ctx.embed = None
    with pytest.raises(ValueError, match="no representations"):
        memory.on_task_start(stage.ctx)
    stage, memory = stage_of(start=False)
    stage.ctx.base_forward = None
    with pytest.raises(ValueError, match="no starting model"):
        memory.on_task_start(stage.ctx)
    with pytest.raises(RuntimeError, match="no run"):
        Memory().store.search(torch.zeros(1, 512), 1)


def test_what_counts_as_a_repetition_follows_the_encoder_unless_it_is_said():
    assert Memory().dup_threshold == 0.999
    assert Memory(encoder="clip").dup_threshold == 0.95
    assert Memory(encoder="clip", dup_threshold=0.9).dup_threshold == 0.9


def test_the_strength_is_capped_at_half_a_batch():
    assert MemoryConfig(strength=0.5).strength == 0.5
    with pytest.raises(ValidationError, match=r"less than or equal to 0\.5"):
        MemoryConfig(strength=0.6)
    assert MemoryConfig().named_models() == ()
    assert MemoryConfig(encoder="clip").named_models() == (("encoder", "clip"),)
    assert MemoryConfig.model_kinds["encoder"] == "encoder"
