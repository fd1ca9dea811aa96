"""Projections on a direction: the cone, the half space, and the cone inside a subspace."""

# A vector comes in parts, one a parameter: blocks and whole models are never copied into one tensor.
# Shape letters: I inputs of a linear layer or length of a vector, K vectors of a basis.

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

Parts = Sequence[Tensor]


class Place(IntEnum):
    """Where a vector lies with regard to a cone."""

    INSIDE = 0  # it stays as it is, bit for bit
    BOUNDARY = 1  # the nearest point lies on the cone's surface
    POLAR = 2  # the nearest point is 0
    FREE = 3  # the reference is 0, so there is no cone


class Geometry(NamedTuple):
    """A vector u seen from a reference r: `along` = <u, r/|r|>, `across` = |u - along r/|r||."""

    norm: float  # of r
    along: float
    across: float

    @property
    def length(self) -> float:
        """|u|."""
        return math.hypot(self.along, self.across)

    @property
    def cosine(self) -> float:
        """cos(u, r); 0 where either is 0."""
        return self.along / self.length if self.length > 0 and self.norm > 0 else 0.0


class Share(NamedTuple):
    """The nearest point as `along` r/|r| + `across` w/|w|, with w the part of u across r."""

    place: Place
    along: float
    across: float


def dot(left: Parts, right: Parts) -> Tensor:
    """The inner product of two vectors in parts, as a float64 scalar."""
    products = [(x * y).sum().double() for x, y in zip(left, right, strict=True)]
    return torch.stack(products).sum()


def across_part(vector: Parts, reference: Parts) -> tuple[list[Tensor], Tensor, Tensor]:
    """The part of a vector across a reference, what it has along it, and the reference's norm.

    It is orthogonalised twice: where u is nearly along r, rounding leaves some of r in the difference.
    """
    norm = dot(reference, reference).sqrt()
    divisor = norm.clamp(min=torch.finfo(norm.dtype).tiny)
    along, rest = torch.zeros_like(norm), list(vector)
    for _ in range(2):
        share = dot(rest, reference) / divisor
        rest = [u - (share / divisor) * r for u, r in zip(rest, reference, strict=True)]
        along = along + share
    return rest, along, norm


def measure(vector: Parts, reference: Parts) -> Tensor:
    """The three numbers of a `Geometry` on the vector's device: those of many blocks are read at once."""
    rest, along, norm = across_part(vector, reference)
    return torch.stack([norm, along, dot(rest, rest).sqrt()])


def nearest(geometry: Geometry, tau: float) -> Share:
    """Where in the plane of u and r the point of the cone {v: <v, r> >= tau |v| |r|} nearest to u lies.

    With sigma = sqrt(1 - tau^2) and d = tau r/|r| + sigma w/|w| the ray that bounds the cone on u's side:
    u itself where it is inside; 0 where t = <u, d> <= 0; else t d, whose cosine is tau exactly.

    Raises:
        ValueError: tau is not within 0 to 1: below 0 the set is not convex.
    """
    if not 0.0 <= tau <= 1.0:
        raise ValueError(f"a cone's cosine must be between 0 and 1, not {tau}")
    if geometry.norm == 0.0:
        return Share(Place.FREE, geometry.along, geometry.across)
    if geometry.along >= tau * geometry.length:
        return Share(Place.INSIDE, geometry.along, geometry.across)
    sigma = math.sqrt((1.0 - tau) * (1.0 + tau))
    t = geometry.along * tau + geometry.across * sigma
    if t <= 0.0:
        return Share(Place.POLAR, 0.0, 0.0)
    return Share(Place.BOUNDARY, t * tau, t * sigma)


def move_to(vector: Parts, reference: Parts, geometry: Geometry, share: Share) -> list[Tensor]:
    """The vector at a point that `nearest` gave; the same tensors where it stays."""
    if share.place in (Place.INSIDE, Place.FREE):
        return list(vector)
    if share.place is Place.POLAR:
        return [torch.zeros_like(u) for u in vector]
    rest, _, _ = across_part(vector, reference)
    length = dot(rest, rest).sqrt()
    out = share.across / length.clamp(min=torch.finfo(length.dtype).tiny)
    ahead = share.along / geometry.norm
    return [ahead * r + out * w for r, w in zip(reference, rest, strict=True)]


def project_on_cone(
    vector: Parts, reference: Parts, tau: float
) -> tuple[list[Tensor], Geometry, Share]:
    """The point nearest to a vector whose cosine with a reference is at least tau.

    Args:
        vector: In float32 or float64.
        reference: Parts of the same shapes; a direction of displacement, not a gradient.
        tau: 0 (the half space of A-GEM) to 1 (the ray of the reference).

    Returns:
        The point, and the geometry it follows from.
    """
    geometry = Geometry(*measure(vector, reference).tolist())
    share = nearest(geometry, tau)
    return move_to(vector, reference, geometry, share), geometry, share


def hold_blocks(
    blocks: Sequence[tuple[str, ...]],
    references: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    tau: float,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Projects each block of a displacement on its cone.

    Args:
        blocks: Names of the weights that make up one vector; no name in two of them.
        references: By name; a weight without one counts as 0, and a block of such is free.
        delta: By name.
        tau: Least cosine of a block.

    Returns:
        The displacement, the same tensors where a block stays as it is, and what is reported of it.
    """
    pairs: list[tuple[list[Tensor], list[Tensor]]] = []
    for names in blocks:
        parts = [delta[n].to(torch.promote_types(delta[n].dtype, torch.float32)) for n in names]
        own = [references.get(n, torch.zeros_like(u)) for n, u in zip(names, parts, strict=True)]
        pairs.append((parts, own))
    seen = torch.stack([measure(vector, reference) for vector, reference in pairs]).tolist()
    before = [Geometry(*numbers) for numbers in seen]
    shares = [nearest(geometry, tau) for geometry in before]
    held = dict(delta)
    for names, pair, geometry, share in zip(blocks, pairs, before, shares, strict=True):
        if share.place in (Place.BOUNDARY, Place.POLAR):
            for name, part in zip(names, move_to(*pair, geometry, share), strict=True):
                held[name] = part.to(delta[name].dtype)
    after = [
        Geometry(geometry.norm, share.along, share.across)
        for geometry, share in zip(before, shares, strict=True)
    ]
    numbers = _angles(before, after)
    for place in Place:
        count = sum(share.place is place for share in shares)
        numbers[f"blocks_{place.name.lower()}"] = count / len(shares)
    return held, numbers


def half_space(
    gradient: Parts, reference: Parts, strength: float = 1.0
) -> tuple[list[Tensor], float, float]:
    """A-GEM: g - strength * <g, g_ref> / <g_ref, g_ref> g_ref where <g, g_ref> < 0, over all parts as one vector.

    Args:
        gradient: Of the task.
        reference: Gradient of the memory; all 0 constrains nothing.
        strength: Share of the conflict that is removed; 1 is A-GEM.

    Returns:
        The gradient (the same tensors where there is no conflict), the norm of what was removed, and the
        cosine before.
    """
    inner, square = float(dot(gradient, reference)), float(dot(reference, reference))
    size = float(dot(gradient, gradient)) ** 0.5
    cosine = inner / (size * square**0.5) if size > 0 and square > 0 else 0.0
    if square == 0.0 or inner >= 0.0:
        return list(gradient), 0.0, cosine
    factor = strength * inner / square
    projected = [g - factor * r for g, r in zip(gradient, reference, strict=True)]
    return projected, abs(factor) * square**0.5, cosine


def project_on_cone_within(
    vector_I: Tensor, reference_I: Tensor, tau: float, basis_IK: Tensor
) -> Tensor:
    """The point nearest to a vector that is orthogonal to a basis and has a cosine of at least tau.

    Exact in one shot: inside the subspace the constraint is a cone around the reference's projection with
    tau' = tau |r| / |P r|; where tau' > 1 the only such point is 0.

    Args:
        vector_I: What is projected.
        reference_I: The cone's direction.
        tau: Cosine, 0 to 1.
        basis_IK: Orthonormal columns that the result must be orthogonal to.
    """
    inside_I = vector_I - basis_IK @ (basis_IK.T @ vector_I)
    seen_I = reference_I - basis_IK @ (basis_IK.T @ reference_I)
    whole, left = float(reference_I.norm()), float(seen_I.norm())
    if whole == 0.0 or tau == left == 0.0:
        return inside_I
    steeper = math.inf if left == 0.0 else tau * whole / left
    if steeper > 1.0:
        return torch.zeros_like(inside_I)
    return project_on_cone([inside_I], [seen_I], steeper)[0][0]


def _angles(before: Sequence[Geometry], after: Sequence[Geometry]) -> dict[str, float]:
    """Cosines of blocks and of all of them as one vector: as blocks share no weight, squares add up."""
    moved = [
        (b.along - a.along) ** 2 + (b.across - a.across) ** 2
        for b, a in zip(before, after, strict=True)
    ]
    cosines = [g.cosine for g in after if g.norm > 0 and g.length > 0] or [0.0]
    kept = _ratio(sum(g.length**2 for g in after), sum(g.length**2 for g in before))
    return {
        "applied_norm": sum(moved) ** 0.5,
        "cos_before": _joint_cosine(before),
        "cos_global": _joint_cosine(after),
        "cos_block_min": min(cosines),
        "cos_block_mean": sum(cosines) / len(cosines),
        "length_kept": kept**0.5,
    }


def _joint_cosine(geometries: Sequence[Geometry]) -> float:
    inner = sum(g.along * g.norm for g in geometries)
    size = sum(g.length**2 for g in geometries) * sum(g.norm**2 for g in geometries)
    return _ratio(inner, size**0.5)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
