"""Logits at selected positions against whole forwards; the teacher."""

import pytest
import torch
from transformers import LlamaForCausalLM

from app.errors import TrainingFailed
from tests.tiny import make_llama
from tests.workers.training.runs import make_plan, make_run
from workers.strategies.batch import Micro
from workers.strategies.modes import evaluating
from workers.training.forward import SelectedLogits
from workers.training.loop import train_step


def make_micro(*, rows=3, width=9):
    torch.manual_seed(3)
    positions = torch.tensor([0, 4, 9, 12, 17, 20, 26])
    return Micro(
        input_ids_BT=torch.randint(3, 300, (rows, width)),
        positions_N=positions,
        targets_N=torch.randint(3, 300, (7,)),
        row_of_N=positions // width,
        weights_N=torch.ones(7),
        sources=("domain", "general", "domain"),
        sample_ids=(0, 1, 2),
        is_task_B=torch.tensor([True, False, True]),
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_selected_logits_are_those_of_the_whole_forward(tmp_path, kind):
    run = make_run(make_plan(tmp_path, training={"type": kind}))
    for _ in range(3):
        train_step(run)
    micro = make_micro()
    assert run.student.has_split_head
    found = run.student(micro.input_ids_BT, micro.positions_N)
    whole = run.model(input_ids=micro.input_ids_BT).logits.flatten(0, 1)[micro.positions_N]
    assert torch.allclose(found, whole, atol=1e-6)


def test_a_head_that_does_more_than_project_is_run_whole():
    class Capped(LlamaForCausalLM):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = 0.05 * torch.tanh(out.logits / 0.05)
            return out

    model = Capped(make_llama().config)
    student = SelectedLogits(model, autocast=None)
    micro = make_micro()
    assert not student.has_split_head
    whole = model(input_ids=micro.input_ids_BT).logits.flatten(0, 1)[micro.positions_N]
    assert torch.equal(student(micro.input_ids_BT, micro.positions_N), whole)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_teacher_reads_only_the_rows_it_is_asked_for_as_the_starting_model(tmp_path, kind):
    run = make_run(make_plan(tmp_path, training={"type": kind}))
    micro = make_micro()
    with torch.no_grad():
        start = run.student(micro.input_ids_BT, micro.positions_N)
    for _ in range(3):
        train_step(run)
    mask = micro.source_mask_N(frozenset({"domain"}))
    taught = run.teacher(micro, mask)
    assert not taught.requires_grad
    assert torch.allclose(taught, start[mask], atol=1e-6)
    assert not torch.allclose(run.student(micro.input_ids_BT, micro.positions_N)[mask], taught)


def test_a_changed_base_is_no_teacher(tmp_path):
    run = make_run(make_plan(tmp_path, training={"type": "lora"}))
    run.teacher.check()
    run.ctx.lora_pairs[0].base_weight.data.add_(0.1)
    with pytest.raises(TrainingFailed) as caught:
        run.teacher.check()
    assert caught.value.code == "base_changed"


def test_evaluating_gives_the_mode_back_also_after_an_error():
    model = make_llama().train()
    with evaluating(model):
        assert not model.training
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training
