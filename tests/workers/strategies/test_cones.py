"""Projections on cones, half spaces and subspaces against their definitions and against another solver."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from workers.strategies.cones import (
    Geometry,
    Place,
    half_space,
    hold_blocks,
    measure,
    nearest,
    project_on_cone,
    project_on_cone_within,
)

F64 = torch.float64
NUM_CASES = 4000


def project(u, r, tau):
    return project_on_cone([u], [r], tau)[0][0]


def random_cases(count=NUM_CASES, seed=0, largest=8):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size = int(rng.integers(1, largest + 1))
        u, r = (torch.from_numpy(rng.normal(size=size)) for _ in range(2))
        yield (
            u * float(10 ** rng.uniform(-3, 3)),
            r * float(10 ** rng.uniform(-3, 3)),
            rng.uniform(),
        )


@pytest.fixture(scope="module")
def cases():
    found = []
    for u, r, tau in random_cases():
        (v,), geometry, share = project_on_cone([u], [r], tau)
        found.append((u, r, tau, v, geometry, share.place))
    return found


def test_all_places_are_met_and_the_cosine_is_that_of_the_cone(cases):
    counts = Counter(place for *_, place in cases)
    # 20,000 cases of another implementation gave 4866 inside, 12539 on the boundary and 2595 at 0
    for place, share in (
        (Place.INSIDE, 4866),
        (Place.BOUNDARY, 12539),
        (Place.POLAR, 2595),
    ):
        assert counts[place] / len(cases) == pytest.approx(share / 20000, abs=0.03)
    for u, r, tau, v, _, place in cases:
        if place is Place.INSIDE:
            assert torch.equal(u, v)
            assert torch.dot(u, r) >= (tau - 1e-12) * u.norm() * r.norm()
        elif place is Place.BOUNDARY:
            assert float(torch.dot(v, r) / (v.norm() * r.norm())) == pytest.approx(tau, abs=1e-12)
        else:
            assert not v.any()


def test_it_is_idempotent_homogeneous_and_never_expands(cases):
    for (u, r, tau, v, _, _), (other, *_) in itertools.pairwise(cases[:800]):
        scale = float(u.norm())
        assert (project(v, r, tau) - v).norm() <= 1e-14 * scale
        assert (project(3.0 * u, r, tau) - 3.0 * v).norm() <= 1e-13 * scale
        assert (project(u, 7.0 * r, tau) - v).norm() <= 1e-13 * scale
        if other.shape == u.shape:
            moved = (project(other, r, tau) - v).norm()
            assert moved <= (other - u).norm() + 1e-12 * (scale + float(other.norm()))


def test_what_is_removed_is_the_projection_on_the_polar_cone(cases):
    """Moreau: u = P_C(u) + P_polar(u), orthogonal; the polar is the cone around -r with tau* = sigma."""
    for u, r, tau, v, _, _ in cases:
        polar = project(u, -r, math.sqrt(1.0 - tau * tau))
        scale = float(u.norm())
        assert (v + polar - u).norm() <= 1e-11 * scale
        assert abs(float(torch.dot(v, u - v))) <= 1e-12 * scale * scale


def test_no_point_of_the_cone_makes_an_acute_angle_with_what_is_removed(cases):
    """The variational inequality <u - v, c - v> <= 0 over random points c of the cone."""
    rng = np.random.default_rng(5)
    for u, r, tau, v, _, _ in cases[:1500]:
        axis = r / r.norm()
        for _ in range(8):
            w = torch.from_numpy(rng.normal(size=len(u)))
            w = w - torch.dot(w, axis) * axis
            w = w / w.norm() if w.norm() > 1e-9 else w * 0
            angle = rng.uniform(0, math.acos(tau))
            c = float(rng.exponential()) * u.norm() * (math.cos(angle) * axis + math.sin(angle) * w)
            gap = float(torch.dot(u - v, c - v))
            assert gap <= 1e-12 * float(u.norm()) * float(u.norm() + c.norm())


def test_a_general_solver_finds_the_same_point():
    checked = 0
    for vector, reference, tau in random_cases(60, seed=9, largest=5):
        if len(vector) < 2:
            continue
        u, r = vector / vector.norm(), reference / reference.norm()
        a, axis = u.numpy(), r.numpy()
        constraint = {
            "type": "ineq",
            "fun": lambda x, axis=axis, tau=tau: x @ axis - tau * np.sqrt(x @ x + 1e-18),
        }
        found = minimize(
            lambda x, a=a: ((x - a) ** 2).sum(),
            0.5 * axis,
            method="SLSQP",
            constraints=[constraint],
            options={"ftol": 1e-13, "maxiter": 400},
        )
        ours = float((project(u, r, tau) - u).square().sum())
        if found.success:
            assert ours <= found.fun + 1e-7
            assert found.fun <= ours + 1e-5
            checked += 1
    assert checked >= 30


def test_without_a_cosine_it_is_the_half_space_of_a_gem():
    for u, r, _ in random_cases(500, seed=3):
        expected = u - min(float(torch.dot(u, r)), 0.0) / float(torch.dot(r, r)) * r
        projected, removed, cosine = half_space([u], [r])
        scale = float(u.norm())
        assert (project(u, r, 0.0) - expected).norm() <= 1e-13 * scale
        assert (projected[0] - expected).norm() <= 1e-13 * scale
        assert removed == pytest.approx(float((u - expected).norm()), abs=1e-12 * scale)
        assert cosine == pytest.approx(float(torch.dot(u, r) / (u.norm() * r.norm())), abs=1e-12)


def test_a_half_space_is_of_all_parts_together_and_scales():
    """Two tensors of which one conflicts: together they don't, so nothing is removed."""
    g = [torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([3.0], dtype=F64)]
    r = [torch.tensor([-1.0, 0.0], dtype=F64), torch.tensor([1.0], dtype=F64)]
    kept, removed, _ = half_space(g, r)
    assert removed == 0
    assert all(a is b for a, b in zip(kept, g, strict=True))
    against = [-part for part in g]
    half, _, _ = half_space(g, against, 0.25)
    assert torch.allclose(torch.cat(half), 0.75 * torch.cat(g))
    zero = [torch.zeros(2, dtype=F64), torch.zeros(1, dtype=F64)]
    assert half_space(g, zero)[1:] == (0.0, 0.0)


def test_degenerate_vectors():
    u, r = torch.tensor([0.0, 2.0], dtype=F64), torch.tensor([3.0, 0.0], dtype=F64)
    nothing = torch.zeros_like(u)
    assert project_on_cone([u], [nothing], 0.8)[2].place is Place.FREE
    assert torch.equal(project(u, nothing, 0.8), u)
    assert not project(nothing, r, 0.8).any()
    for tau in (0.0, 0.5, 1.0):
        assert not project(-r, r, tau).any()
        assert torch.equal(project(r, r, tau), r)
    assert torch.equal(project(torch.tensor([2.0, 5.0], dtype=F64), r, 1.0), 2.0 * r / 3.0)
    # orthogonal: cut to 0.6 of its length, of which 0.48 lies along r
    v = project(u, r, 0.8)
    assert float(v.norm() / u.norm()) == pytest.approx(0.6)
    assert float(v[0] / u.norm()) == pytest.approx(0.48)
    for tau in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            nearest(Geometry(1.0, 1.0, 1.0), tau)


def test_a_vector_nearly_along_the_reference_keeps_its_cosine_in_single_precision():
    generator = torch.Generator().manual_seed(1)
    r = torch.randn(500, generator=generator)
    off = torch.randn(500, generator=generator)
    u = -0.2 * r / r.norm() + off / off.norm() * 1e-3 + r * 0.3 / r.norm()
    v = project(u, r, 0.99999)
    assert v.dtype == torch.float32
    cosine = float(torch.dot(v.double(), r.double()) / (v.double().norm() * r.double().norm()))
    assert cosine == pytest.approx(0.99999, abs=1e-7)
    assert Geometry(*measure([u], [r]).tolist()).along == pytest.approx(
        float(torch.dot(u.double(), r.double()) / r.double().norm()), rel=1e-6
    )


def test_blocks_within_their_cones_do_not_put_the_whole_within():
    """Two blocks of opposite size: each has cosine 0.8, all together nearly 0."""
    big, small = torch.tensor([100.0, 0.0], dtype=F64), torch.tensor([0.01, 0.0], dtype=F64)
    references = {"a": big, "b": small}
    delta = {
        "a": torch.tensor([0.0, 0.02], dtype=F64),
        "b": torch.tensor([0.0, 300.0], dtype=F64),
    }
    held, numbers = hold_blocks([("a",), ("b",)], references, delta, 0.8)
    assert numbers["cos_block_min"] == pytest.approx(0.8)
    assert numbers["cos_global"] < 0.02
    _, numbers = hold_blocks([("a", "b")], references, delta, 0.8)
    assert numbers["cos_global"] == pytest.approx(0.8)
    assert numbers["cos_before"] == pytest.approx(0.0)
    assert numbers["length_kept"] == pytest.approx(0.6)
    moved = sum(float((held[n] - delta[n]).square().sum()) for n in delta) ** 0.5
    assert hold_blocks([("a",), ("b",)], references, delta, 0.8)[1][
        "applied_norm"
    ] == pytest.approx(moved)


def test_a_block_inside_or_without_a_reference_is_left_as_the_same_tensor():
    delta = {"a": torch.ones(3), "b": torch.ones(2)}
    held, numbers = hold_blocks([("a",), ("b",)], {"a": torch.ones(3)}, delta, 0.9)
    assert held["a"] is delta["a"]
    assert held["b"] is delta["b"]
    assert numbers["applied_norm"] == 0
    assert numbers["blocks_inside"] == 0.5
    assert numbers["blocks_free"] == 0.5


def test_the_numbers_of_all_blocks_are_those_of_one_vector():
    generator = torch.Generator().manual_seed(4)
    names = [(str(k),) for k in range(5)]
    references = {n: torch.randn(7, generator=generator, dtype=F64) for (n,) in names}
    delta = {n: torch.randn(7, generator=generator, dtype=F64) for (n,) in names}
    held, numbers = hold_blocks(names, references, delta, 0.7)
    u, r, v = (torch.cat([d[n] for (n,) in names]) for d in (delta, references, held))

    def cosine(x, y):
        return float(torch.dot(x, y) / (x.norm() * y.norm()))

    assert numbers["cos_before"] == pytest.approx(cosine(u, r), abs=1e-12)
    assert numbers["cos_global"] == pytest.approx(cosine(v, r), abs=1e-12)
    assert numbers["applied_norm"] == pytest.approx(float((v - u).norm()))
    assert numbers["length_kept"] == pytest.approx(float(v.norm() / u.norm()))


def test_a_momentum_of_vectors_in_the_cone_stays_there_and_adam_does_not():
    generator = torch.Generator().manual_seed(2)
    r = torch.exp(2.0 * torch.randn(2000, generator=generator, dtype=F64))
    momentum = torch.zeros_like(r)
    for _ in range(50):
        step = project(torch.randn(2000, generator=generator, dtype=F64), r, 0.8)
        momentum = 0.9 * momentum + step
        if momentum.any():
            cosine = torch.dot(momentum, r) / (momentum.norm() * r.norm())
            assert cosine >= 0.8 - 1e-12
    weight = torch.nn.Parameter(torch.zeros_like(r))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    weight.grad = -r.clone()
    optimizer.step()
    moved = weight.detach()
    cosine = float(torch.dot(moved, r) / (moved.norm() * r.norm()))
    assert cosine == pytest.approx(float(r.abs().sum() / (math.sqrt(len(r)) * r.norm())), rel=1e-6)
    assert cosine < 0.5


def test_a_cone_within_a_subspace_is_exact_in_one_shot():
    rng = np.random.default_rng(8)
    seen: Counter[str] = Counter()
    u, basis = torch.zeros(0), torch.zeros(0)
    for _ in range(400):
        size, taken = int(rng.integers(3, 8)), int(rng.integers(1, 3))
        basis = torch.linalg.qr(torch.from_numpy(rng.normal(size=(size, taken)))).Q
        u, r = (torch.from_numpy(rng.normal(size=size)) for _ in range(2))
        tau = float(rng.uniform(0, 0.9))
        v = project_on_cone_within(u, r, tau, basis)
        assert (basis.T @ v).norm() <= 1e-14 * u.norm() * 10
        assert torch.dot(v, r) >= tau * v.norm() * r.norm() - 1e-12
        left = r - basis @ (basis.T @ r)
        seen["empty" if tau * r.norm() > left.norm() else "cone"] += 1
        for _ in range(10):  # no other feasible point is nearer
            other = torch.from_numpy(rng.normal(size=size))
            other = project_on_cone_within(other, r, tau, basis)
            assert torch.dot(u - v, other - v) <= 1e-11
    assert min(seen.values()) > 20
    inside = project_on_cone_within(u, torch.zeros_like(u), 0.8, basis)
    assert (inside - (u - basis @ (basis.T @ u))).norm() < 1e-14
