"""The bucketed divergence: the chain rule, bounds, closed-form gradients, and what the shortcuts get wrong."""

import math

import pytest
import torch

from workers.strategies.penalties import divergence_sum
from workers.strategies.topk import TopK, bucketed_kl_sum, keep_top

F64 = torch.float64
N, V = 7, 50


def logits(seed, spread=2.0, size=(N, V), dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(size, generator=generator, dtype=dtype)


def with_gradient(student, kept, temperature=1.0):
    leaf = student.clone().requires_grad_()
    value, squared = bucketed_kl_sum(leaf, kept, temperature=temperature)
    value.backward()
    return value.detach(), leaf.grad, squared


def tails(student, teacher, kept):
    """Teacher's and student's distributions within the tail, and their masses."""
    outside = torch.ones_like(teacher, dtype=torch.bool).scatter_(-1, kept.ids_NK, value=False)
    p, q = (x.softmax(-1) * outside for x in (teacher, student))
    alpha, alpha_q = p.sum(-1), q.sum(-1)
    return p / alpha[:, None], q / alpha_q[:, None], alpha, alpha_q, outside


@pytest.mark.parametrize("k", [1, 5, 20])
def test_whole_kl_minus_bucketed_is_the_tails_mass_times_the_tails_kl(k):
    teacher, student = logits(1), logits(2)
    kept = keep_top(teacher, k, 1.0)
    p, q, alpha, _, outside = tails(student, teacher, kept)
    inner = torch.where(outside, p * (p / q).log(), torch.zeros_like(p)).sum(-1)
    whole = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    )
    bucketed, _ = bucketed_kl_sum(student, kept)
    assert float(whole - bucketed) == pytest.approx(float((alpha * inner).sum()), abs=1e-12)
    difference = (teacher - student).masked_fill(~outside, math.nan)
    width = torch.tensor([row[~row.isnan()].max() - row[~row.isnan()].min() for row in difference])
    bound = (alpha * width.to(F64) ** 2 / 8).sum()  # Hoeffding's lemma, on each tail
    assert 0 <= float(whole - bucketed) <= float(bound)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_ids_kept_it_is_the_whole_kl_and_its_gradient(temperature):
    teacher, student = logits(1), logits(2)
    kept = keep_top(teacher, V, temperature)
    assert torch.isinf(kept.log_tail_N).all()
    value, gradient, squared = with_gradient(student, kept, temperature)
    leaf = student.clone().requires_grad_()
    whole, whole_squared = divergence_sum(leaf, teacher, temperature=temperature)
    whole.backward()
    assert float(value) == pytest.approx(float(whole.detach()), abs=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-12)
    assert float(squared) == pytest.approx(float(whole_squared), rel=1e-10)


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_exact_on_kept_ids_and_off_by_the_tails_difference_elsewhere(k, temperature):
    teacher, student = logits(3), logits(4)
    kept = keep_top(teacher, k, temperature)
    _, gradient, squared = with_gradient(student, kept, temperature)
    exact = temperature * (
        (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    )
    error = (gradient - exact) / temperature
    assert error.gather(-1, kept.ids_NK).abs().max() < 1e-15
    p, q, alpha, _, _ = tails(student / temperature, teacher / temperature, kept)
    expected = alpha * (p - q).abs().sum(-1)
    torch.testing.assert_close(error.abs().sum(-1), expected, rtol=0, atol=1e-14)
    assert (expected <= 2 * alpha).all()
    assert float(squared) == pytest.approx(float(gradient.square().sum()), rel=1e-12)


def test_gradient_agrees_with_finite_differences():
    kept = keep_top(logits(5), 6, 1.7)
    student = logits(6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: bucketed_kl_sum(x, kept, temperature=1.7)[0], (student,), atol=1e-7
    )


def test_a_student_that_is_the_teacher_has_no_loss_and_the_shortcuts_would_pull_it():
    teacher = logits(7)
    kept = keep_top(teacher, 6, 1.0)
    value, gradient, _ = with_gradient(teacher, kept)
    assert abs(float(value)) < 1e-14
    assert gradient.abs().max() < 1e-15
    log_q = teacher.log_softmax(-1).requires_grad_()
    alpha = kept.log_tail_N.exp()
    p = kept.log_p_NK.exp()
    dropped = teacher.clone().requires_grad_()
    (p * (kept.log_p_NK - dropped.log_softmax(-1).gather(-1, kept.ids_NK))).sum().backward()
    torch.testing.assert_close(
        dropped.grad.abs().sum(-1), 2 * alpha * (1 - alpha), atol=1e-14, rtol=0
    )
    renormed = teacher.clone().requires_grad_()
    share = p / p.sum(-1, keepdim=True)
    (share * (share.log() - renormed.log_softmax(-1).gather(-1, kept.ids_NK))).sum().backward()
    torch.testing.assert_close(renormed.grad.abs().sum(-1), 2 * alpha, atol=1e-14, rtol=0)
    assert log_q.grad is None


def test_a_tiny_tail_keeps_its_mass_in_float32():
    teacher = torch.tensor([[20.0, 0.0, -1.0, -2.0]])
    kept = keep_top(teacher, 1, 1.0)
    exact = teacher.double().softmax(-1)[0, 1:].sum()
    assert float(kept.log_tail_N.exp()) == pytest.approx(float(exact), rel=1e-5)
    assert float(1 - kept.log_p_NK.exp().sum()) == 0.0  # what the shortcut would have stored


def test_high_temperature_tends_to_the_squared_distance_of_centred_logits():
    teacher, student = logits(8), logits(9)
    temperature = 1e4
    value, _ = bucketed_kl_sum(student, keep_top(teacher, V, temperature), temperature=temperature)
    centred = (student - student.mean(-1, keepdim=True)) - (
        teacher - teacher.mean(-1, keepdim=True)
    )
    assert float(value) == pytest.approx(float(centred.square().sum() / (2 * V)), rel=1e-3)


def test_every_kept_mass_adds_up_and_the_ids_are_the_likeliest():
    teacher = logits(10)
    kept = keep_top(teacher, 9, 1.3)
    log_p = (teacher / 1.3).log_softmax(-1)
    expected, ids = log_p.sort(-1, descending=True)
    assert torch.equal(kept.ids_NK, ids[:, :9])
    torch.testing.assert_close(kept.log_p_NK, expected[:, :9], rtol=0, atol=1e-14)
    total = kept.log_p_NK.exp().sum(-1) + kept.log_tail_N.exp()
    torch.testing.assert_close(total, torch.ones(N, dtype=F64), rtol=0, atol=1e-14)


def test_chunks_of_positions_do_not_matter(monkeypatch):
    teacher, student = logits(11), logits(12)
    whole = with_gradient(student, keep_top(teacher, 4, 1.0))
    monkeypatch.setattr("workers.strategies.topk.CHUNK_LOGITS", 2 * V)
    split = with_gradient(student, keep_top(teacher, 4, 1.0))
    for left, right in zip(whole, split, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-14, atol=0)


def test_half_precision_students_get_their_gradient_in_half_precision():
    teacher, student = logits(13, dtype=torch.float32), logits(14, dtype=torch.float32)
    kept = keep_top(teacher, 8, 1.0)
    value, gradient, _ = with_gradient(student.bfloat16(), kept)
    exact, expected, _ = with_gradient(student.bfloat16().float(), kept)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=1e-6)


def test_distributions_of_other_positions_are_refused():
    kept = keep_top(logits(1), 3, 1.0)
    with pytest.raises(ValueError, match="distributions for"):
        bucketed_kl_sum(logits(2)[:3], kept)
    assert isinstance(kept, TopK)
