"""The figures of a method: from per-item scores of all seeds to values with intervals."""

# Shape letters: R draws, S seeds, N items, C columns, K domains.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.board.bootstrap import Estimate, Floats, TwoLevelBootstrap, interval
from tests.benchmarks.board.packing import unpack_bits

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """What a method's trials are read against: the base model's and plain training's, in the order of the seeds."""

    bootstrap: TwoLevelBootstrap
    base: Sequence[Result]
    plain: Sequence[Result]


@dataclass(frozen=True)
class Figures:
    """Of a method; shares from 0 to 1, drops positive where something was lost.

    `decay_*` are of exact match on unseen skills relative to the base, after each domain: their mean, their
    worst, and the last. `lost_*` are of earlier domains, relative to what they reached when they were learnt.
    """

    single_domain: Estimate
    single_em_drop: Estimate  # points of exact match on unseen skills, as are the next two
    single_mc_drop: Estimate
    single_seen_drop: Estimate
    final_domain: Estimate  # mean over domains at the end
    learning_domain: Estimate  # mean over domains of the accuracy just after each was learnt
    of_plain_learning: Estimate  # final accuracy over plain's just after each domain
    of_plain_final: Estimate
    backward_transfer: Estimate
    decay_mean: Estimate
    decay_worst: Estimate
    decay_last: Estimate
    decay_mc_mean: Estimate
    decay_mc_worst: Estimate
    lost_mean: Estimate
    lost_worst: Estimate
    time_ratio: float
    memory_ratio: float


def measure(results: Sequence[Result], reference: Reference) -> Figures:
    """All figures of one method, one result a seed in the order of the reference's."""
    boot = reference.bootstrap
    unseen = _Columns(boot, "unseen", results, reference.base)
    seen = _Columns(boot, "seen", results, reference.base)
    own, plain = _Domains(boot, results), _Domains(boot, reference.plain)

    def drop(columns: _Columns, kind: str) -> Estimate:
        return _estimate(lambda m: m[:, columns.base(kind)] - m[:, columns.at(kind, 0)], columns)

    def decay(kind: str, how: Any) -> Estimate:
        def of(means: Floats) -> Floats:
            base = means[:, [unseen.base(kind)]]
            after = means[:, [unseen.at(kind, k) for k in range(unseen.num_points)]]
            return np.asarray(how(1.0 - after / np.maximum(base, 1e-9)))

        return _estimate(of, unseen)

    def both(of: Any) -> Estimate:
        return interval(
            float(of(own.value, plain.value)[0]), np.asarray(of(own.draws, plain.draws))
        )

    return Figures(
        single_domain=both(lambda o, _: o[:, 0, 0]),
        single_em_drop=drop(unseen, "em"),
        single_mc_drop=drop(unseen, "mc"),
        single_seen_drop=drop(seen, "em"),
        final_domain=both(lambda o, _: final(o)),
        learning_domain=both(lambda o, _: learning(o)),
        of_plain_learning=both(lambda o, p: final(o) / np.maximum(learning(p), 1e-9)),
        of_plain_final=both(lambda o, p: final(o) / np.maximum(final(p), 1e-9)),
        backward_transfer=both(lambda o, _: backward_transfer(o)),
        decay_mean=decay("em", lambda d: d.mean(1)),
        decay_worst=decay("em", lambda d: d.max(1)),
        decay_last=decay("em", lambda d: d[:, -1]),
        decay_mc_mean=decay("mc", lambda d: d.mean(1)),
        decay_mc_worst=decay("mc", lambda d: d.max(1)),
        lost_mean=both(lambda o, _: lost(o).mean(1)),
        lost_worst=both(lambda o, _: lost(o).max(1)),
        time_ratio=_ratio(results, reference.plain, "train_cpu_seconds"),
        memory_ratio=_ratio(results, reference.plain, "memory_bytes"),
    )


def final(accuracy_RKK: Floats) -> Floats:
    """Mean over domains after the last one: ACC of card 7."""
    return np.asarray(accuracy_RKK[:, -1].mean(1))


def learning(accuracy_RKK: Floats) -> Floats:
    """Mean over domains of the accuracy just after each was learnt."""
    return np.asarray(np.diagonal(accuracy_RKK, axis1=1, axis2=2).mean(1))


def backward_transfer(accuracy_RKK: Floats) -> Floats:
    """Mean over all but the last domain of R[K][i] - R[i][i]; 0 with one domain."""
    if accuracy_RKK.shape[1] < 2:
        return np.zeros(len(accuracy_RKK))
    then = np.diagonal(accuracy_RKK, axis1=1, axis2=2)[:, :-1]
    return np.asarray((accuracy_RKK[:, -1, :-1] - then).mean(1))


def lost(accuracy_RKK: Floats) -> Floats:
    """Share of its accuracy just after learning that each earlier domain has lost at the end: (R, K - 1)."""
    if accuracy_RKK.shape[1] < 2:
        return np.zeros((len(accuracy_RKK), 1))
    then = np.diagonal(accuracy_RKK, axis1=1, axis2=2)[:, :-1]
    return np.asarray(1.0 - accuracy_RKK[:, -1, :-1] / np.maximum(then, 1e-9))


class _Columns:
    """General scores of base and trained models on the same items."""

    def __init__(
        self,
        bootstrap: TwoLevelBootstrap,
        group: str,
        results: Sequence[Result],
        base: Sequence[Result],
    ) -> None:
        self.num_points = len(results[0]["points"])
        self._group = group
        self._kinds = ("em", "mc")
        values_SNC = np.stack(
            [
                np.stack(
                    [
                        unpack_bits(p[f"{group}_{k}"])
                        for p in self._points(r, b)
                        for k in self._kinds
                    ],
                    1,
                )
                for r, b in zip(results, base, strict=True)
            ]
        ).astype(np.float32)
        self.value = values_SNC.mean(1, dtype=np.float64).mean(0)[None]
        self.draws = bootstrap.means(group, values_SNC)

    def base(self, kind: str) -> int:
        """Column of the base model."""
        return self._kinds.index(kind)

    def at(self, kind: str, point: int) -> int:
        """Column after a domain."""
        return 2 * (point + 1) + self._kinds.index(kind)

    @staticmethod
    def _points(result: Result, base: Result) -> list[Any]:
        return [base["points"][0], *result["points"]]


class _Domains:
    """Accuracies on domain i after domain k: `value` (1, K, K) and `draws` (R, K, K), 0 above the diagonal."""

    def __init__(self, bootstrap: TwoLevelBootstrap, results: Sequence[Result]) -> None:
        size = len(results[0]["points"])
        self.value = np.zeros((1, size, size))
        self.draws = np.zeros((bootstrap.num_draws, size, size))
        for domain in range(size):
            values_SNC = np.stack([_domain_columns(result, domain) for result in results])
            self.value[0, domain:, domain] = values_SNC.mean((0, 1), dtype=np.float64)
            self.draws[:, domain:, domain] = bootstrap.means(f"domain-{domain}", values_SNC)


def _domain_columns(result: Result, domain: int) -> NDArray[np.float32]:
    """(N, C): a domain's items after it and after each later one; joint training has all of them throughout."""
    columns = [unpack_bits(point["domains"][domain]) for point in result["points"][domain:]]
    return np.stack(columns, 1).astype(np.float32)


def _estimate(of: Any, columns: _Columns) -> Estimate:
    return interval(float(of(columns.value)[0]), np.asarray(of(columns.draws)))


def _ratio(own: Sequence[Result], plain: Sequence[Result], key: str) -> float:
    """Median over seeds of a method's cost over plain's."""
    ratios = [o[key] / max(p[key], 1e-9) for o, p in zip(own, plain, strict=True)]
    return float(np.median(ratios))


def item_sizes(result: Result) -> dict[str, int]:
    """Items of each group that the bootstrap draws."""
    last = result["points"][-1]
    sizes = {group: len(unpack_bits(last[f"{group}_em"])) for group in ("unseen", "seen")}
    for domain, packed in enumerate(last["domains"]):
        sizes[f"domain-{domain}"] = len(unpack_bits(packed))
    return sizes
