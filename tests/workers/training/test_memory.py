"""The memory on the real loop: encoders of a run, resumes within a sequence, ranks, benchmarks, the artifact."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.domain.configs.memory import MemoryConfig
from app.domain.messages import EXIT_DONE
from app.domain.runplan import StagePlan
from app.errors import TrainingFailed
from tests.workers.evaluation.test_representations import make_clip
from tests.workers.training.ranked import on_two_ranks
from tests.workers.training.rows import make_supervisor, write_benchmarks
from tests.workers.training.runs import (
    CPU,
    ListRows,
    make_plan,
    make_run,
    make_training,
    same,
    tiny_base,
    weights,
)
from workers.data.tokens import load_tokens
from workers.evaluation.representations import DualEncoder
from workers.strategies.memory_files import load_memory
from workers.training.checkpoints import load_checkpoint, save_checkpoint
from workers.training.loop import train_step
from workers.training.ranks import Ranks

MEMORY = MemoryConfig(strength=0.5, capacity=24, fill_rows=40)
FIRST, SECOND = 4, 5

both_kinds = pytest.mark.parametrize("kind", ["full", "lora"])


def make_stores():
    return {
        "training": ListRows(40, seed=1),
        "training-1": ListRows(40, seed=3),
        "general": ListRows(60, seed=2),
    }


def staged_run(scratch, kind, config=MEMORY, *, start=True, base=None, **more):
    whole = make_training(type=kind, total_steps=FIRST + SECOND)
    rows = make_plan(scratch).training_rows
    stages = tuple(
        StagePlan(
            name=name,
            training_rows=rows,
            training=whole.model_copy(update={"total_steps": steps}),
        )
        for name, steps in (("one", FIRST), ("two", SECOND))
    )
    plan = make_plan(
        scratch, strategies=(config,), training=whole.model_dump(), stages=stages, base=base
    )
    return make_run(plan, stores=make_stores(), start=start, **more)


def shake(run):
    """Away from the start, where the model and the starting model are one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in run.ctx.params.values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@both_kinds
def test_rows_are_represented_by_the_starting_model_whatever_was_trained_since(tmp_path, kind):
    run = staged_run(tmp_path, kind, start=False)
    before = run.ctx.embed("training-1", [7, 3, 9])
    shake(run)
    after = run.ctx.embed("training-1", [7, 3, 9])
    assert torch.equal(before, after)
    assert run.model.training
    model = AutoModelForCausalLM.from_pretrained(tiny_base()).eval()
    special = AutoTokenizer.from_pretrained(tiny_base()).all_special_ids
    means = []
    for row in (7, 3, 9):
        ids = torch.from_numpy(run.stores["training-1"].row(row)[0].astype("int64"))
        with torch.no_grad():
            states = model.model(input_ids=ids[None]).last_hidden_state[0]
        means.append(states[[int(token) not in special for token in ids]].mean(0))
    cosines = torch.nn.functional.normalize(torch.stack(means))
    assert before.shape == (3, 512)
    assert torch.allclose(after @ after.T, cosines @ cosines.T, atol=1e-5)


@both_kinds
def test_a_job_left_in_its_second_task_goes_on_bit_identically(tmp_path, kind):
    whole = staged_run(tmp_path, kind)
    metrics = [train_step(whole) for _ in range(FIRST + SECOND)]
    assert metrics[0].values["strategy/memory/rows"] == 4
    memory = whole.strategies[0]
    assert {e.domain for e in memory.store.entries} == {"general", "one"}
    assert metrics[-1].values["strategy/memory/entries"] == len(memory.store) > 12

    for left_at in (FIRST, FIRST + 2):  # before the boundary's work, and after
        scratch = tmp_path / str(left_at)
        first = staged_run(tmp_path, kind)
        for _ in range(left_at):
            train_step(first)
        saved = save_checkpoint(first, scratch, 1)
        torch.manual_seed(99)
        second = staged_run(tmp_path, kind, start=False)
        load_checkpoint(second, saved.directory)
        for _ in range(FIRST + SECOND - left_at):
            train_step(second)
        assert same(weights(second), weights(whole))
        again = second.strategies[0]
        assert again.store.entries == memory.store.entries
        assert torch.equal(again.store.keys_ND, memory.store.keys_ND)
        assert json.dumps(again.state_dict()["scalars"]) == json.dumps(
            memory.state_dict()["scalars"]
        )


def test_its_share_of_rows_is_exact_and_comes_from_memory_alone(tmp_path):
    run = staged_run(tmp_path, "full")
    for _ in range(FIRST + 1):
        train_step(run)
    held = {(e.store, e.row) for e in run.strategies[0].store.entries}
    drawn = [run.sampler.draw(run.streams) for _ in range(30)]
    remembered = [row for step in drawn for row in step if row.source.startswith("memory")]
    assert abs(len(remembered) - 0.5 * 8 * 30) <= 2
    assert {(row.store, row.row) for row in remembered} <= held
    assert {row.source for row in remembered} == {"memory", "memory_earlier"}
    assert all(row.is_task for row in remembered)


def second_task(scratch, kind, ranks, base):
    run = staged_run(scratch, kind, ranks=ranks, base=base, dtype=torch.float64)
    for _ in range(FIRST + 2):
        train_step(run)
    entries = [(e.content, e.store, e.row) for e in run.strategies[0].store.entries]
    return entries, {name: value.numpy() for name, value in weights(run).items()}


def second_tasks(ranks, scratch, base):
    return {kind: second_task(scratch, kind, ranks, base) for kind in ("full", "lora")}


def test_two_ranks_remember_and_learn_what_one_does(tmp_path):
    found = on_two_ranks(second_tasks, str(tmp_path), str(tiny_base()))
    for kind in ("full", "lora"):
        entries, alone = second_task(tmp_path, kind, Ranks(), tiny_base())
        assert len(entries) > 12
        for rank in range(2):
            assert found[rank][kind][0] == entries
            for name, value in alone.items():
                assert abs(found[rank][kind][1][name] - value).max() < 1e-9


def test_a_named_encoder_reads_the_rows_as_text_by_its_own_tokenizer(tmp_path):
    directory = make_clip(tmp_path / "clip")
    config = MEMORY.model_copy(update={"encoder": "clip"})
    plan = make_plan(tmp_path, strategies=(config,), models={"clip": str(directory)})
    run = make_run(plan)
    encoder = DualEncoder.load(directory, dim=512, device=CPU)
    assert run.ctx.encoder() == encoder.sha256 == run.strategies[0].store.encoder
    tokenizer = AutoTokenizer.from_pretrained(tiny_base())
    texts = [
        str(tokenizer.decode(run.stores["general"].row(row)[0].tolist(), skip_special_tokens=True))
        for row in (3, 5)
    ]
    assert torch.allclose(run.ctx.embed("general", [3, 5]), encoder.encode_texts(texts), atol=1e-6)
    assert len(run.strategies[0].store) > 10
    train_step(run)


def test_an_encoder_that_is_not_there_or_is_none_is_refused(tmp_path):
    config = MEMORY.model_copy(update={"encoder": "clip"})
    with pytest.raises(TrainingFailed, match="not among the job's models"):
        make_run(make_plan(tmp_path, strategies=(config,)))
    models = {"clip": str(tiny_base())}
    with pytest.raises(TrainingFailed, match="no text and image towers"):
        make_run(make_plan(tmp_path, strategies=(config,), models=models))


def test_domain_rows_that_repeat_a_watched_item_are_not_remembered(tmp_path):
    benchmarks = write_benchmarks(tmp_path)
    lines = [json.dumps({"prompt": f"what is {n}?", "completion": f" {n}"}) for n in range(12)]
    lines[4] = json.dumps({"prompt": "seven 3?", "completion": " red"})
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    plan = make_plan(tmp_path, strategies=(MEMORY,), benchmarks=benchmarks)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base())
    store = load_tokens(
        plan.training_rows.model_copy(update={"path": str(path)}),
        tokenizer,
        chat_template=None,
        max_seq_length=64,
        cache_directory=tmp_path / "cache",
    )
    plan = plan.model_copy(
        update={"training_rows": plan.training_rows.model_copy(update={"path": str(path)})}
    )
    own = ListRows(3)  # rows that a strategy made: they lie in no file
    ids = np.asarray(tokenizer("seven 3?")["input_ids"], np.int32)
    own.rows[1] = (ids, np.ones(len(ids), np.float32))
    run = make_run(plan, stores={"training": store, "general": ListRows(20)}, start=False)
    run.stores["own"] = own
    assert run.ctx.overlaps("training", list(range(12))) == [n == 4 for n in range(12)]
    assert run.ctx.overlaps("own", [0, 1, 2]) == [False, True, False]
    memory = run.strategies[0]
    memory.on_task_end(run.ctx)
    assert 4 not in {entry.row for entry in memory.store.entries}
    assert memory.metrics()["overlapping"] == 1


@both_kinds
def test_the_index_is_published_beside_the_weights(tmp_path, kind):
    supervisor = make_supervisor(
        tmp_path, with_suite=False, strategies=(MEMORY,), training={"type": kind}
    )
    assert supervisor.run_here() == EXIT_DONE
    (finished,) = supervisor.of("finished")
    directory = Path(finished.artifact_directory)
    manifest = json.loads((directory / "memory.json").read_text())
    store = load_memory(directory, encoder=manifest["encoder"])
    assert {entry.domain for entry in store.entries} == {"general", "training"}
    assert all(entry.text is None for entry in store.entries)
