"""The shift between two domains in a model's hidden states, before and after training, as numbers with an interval."""

# Shape letters: X and Y rows of the two domains, N rows of both, D width, B rows, T tokens.

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from workers.data.batches import Rows, fed_length

Array = NDArray[np.float64]
Read = Callable[[Tensor], Tensor]  # token ids (B, T) -> hidden states (B, T, D)

MOST_ROWS: Final = 2000  # a domain
FEWEST_ROWS: Final = 20  # a domain: below, nothing is said
RESAMPLES: Final = 500
PERMUTATIONS: Final = 200  # of the domains, for whether the base has a shift at all
INTERVAL: Final = 0.95
FOLDS: Final = 5
RIDGE: Final = 1e-2  # of the logistic regressions, for standardised features and the mean loss
CLAIM: Final = 0.4  # the reduction that is claimed or not
LOSS_TOLERANCE: Final = 0.01  # relative rise of the domain's cross-entropy
PROBE_TOLERANCE: Final = 0.02  # absolute drop of the content probe's accuracy
PROBE_TOKENS: Final = 8


@dataclass(frozen=True)
class States:
    """Pooled states of the same held-out rows, of the domain (X) and of general data (Y), by one model."""

    domain_XD: Array
    general_YD: Array


def pooled_states(read: Read, store: Rows, rows: Sequence[int], *, token_budget: int) -> Array:
    """Each row's mean hidden state (rows, D), over the tokens that the model is fed."""
    contents = {row: store.row(row)[0] for row in rows}
    order = sorted(rows, key=lambda row: (len(contents[row]), row))
    pooled: dict[int, Array] = {}
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order):
            width = fed_length(len(contents[order[stop]]))
            if (stop + 1 - start) * width > token_budget:
                break
            stop += 1
        batch = order[start:stop]
        lengths = [fed_length(len(contents[row])) for row in batch]
        ids_BT = np.zeros((len(batch), max(lengths)), np.int64)
        for place, (row, length) in enumerate(zip(batch, lengths, strict=True)):
            ids_BT[place, :length] = contents[row][:length]
        with torch.no_grad():
            hidden_BTD = read(torch.from_numpy(ids_BT)).double().cpu().numpy()
        for place, (row, length) in enumerate(zip(batch, lengths, strict=True)):
            pooled[row] = hidden_BTD[place, :length].mean(0)
        start = stop
    return np.stack([pooled[row] for row in rows])


def evenly(count: int, most: int = MOST_ROWS) -> list[int]:
    """At most so many of `count` rows, evenly spaced: files are often ordered."""
    if count <= most:
        return list(range(count))
    return [int(k) for k in np.linspace(0, count - 1, most).astype(np.int64)]


def squared_distances(left_XD: Array, right_YD: Array) -> Array:
    """|x - y|^2 for all pairs."""
    squares = (left_XD**2).sum(1)[:, None] + (right_YD**2).sum(1)[None]
    return np.asarray(np.maximum(squares - 2 * left_XD @ right_YD.T, 0.0))


def median_bandwidth(states_ND: Array) -> float:
    """The median heuristic: the median squared distance between two different rows, sigma^2 of the kernel.

    The kernel is exp(-|x - y|^2 / (2 sigma^2)).
    """
    distances = squared_distances(states_ND, states_ND)[np.triu_indices(len(states_ND), 1)]
    return float(np.median(distances)) or 1.0


@dataclass(frozen=True)
class Kernels:
    """RBF kernels within and between two sets of rows."""

    own_XX: Array
    other_YY: Array
    cross_XY: Array

    @classmethod
    def of(cls, left_XD: Array, right_YD: Array, sigma_squared: float) -> "Kernels":
        """With a given bandwidth."""

        def rbf(one: Array, two: Array) -> Array:
            return np.asarray(np.exp(squared_distances(one, two) / (-2 * sigma_squared)))

        return cls(rbf(left_XD, left_XD), rbf(right_YD, right_YD), rbf(left_XD, right_YD))

    def mmd(self, *, is_biased: bool = False) -> float:
        """MMD^2 (Gretton 2012, eq. 3; biased: eq. 5). The unbiased one may fall below 0 where nothing differs."""
        if is_biased:
            return float(self.own_XX.mean() + self.other_YY.mean() - 2 * self.cross_XY.mean())
        ones = np.ones((len(self.own_XX), 1)), np.ones((len(self.other_YY), 1))
        return float(self.weighted(*ones)[0])

    def weighted(self, left_XR: Array, right_YR: Array) -> Array:
        """The unbiased MMD^2 of R resamples, given how often each row occurs in each.

        A row's kernel with itself is left out, also with its copies: they would look like likeness.
        """
        own = _off_diagonal(self.own_XX, left_XR) + _off_diagonal(self.other_YY, right_YR)
        cross = (left_XR * (self.cross_XY @ right_YR)).sum(0)
        return np.asarray(own - 2 * cross / (left_XR.sum(0) * right_YR.sum(0)))

    def p_value(self, rng: np.random.Generator) -> float:
        """The share of random splits of all rows whose MMD^2 reaches this one's (Gretton 2012, 5)."""
        both = np.block([[self.own_XX, self.cross_XY], [self.cross_XY.T, self.other_YY]])
        label = np.repeat([1.0, 0.0], [len(self.own_XX), len(self.other_YY)])
        left_NR = np.stack([rng.permutation(label) for _ in range(PERMUTATIONS)], -1)
        right_NR = 1 - left_NR
        own = _off_diagonal(both, left_NR) + _off_diagonal(both, right_NR)
        cross = (left_NR * (both @ right_NR)).sum(0) / (left_NR.sum(0) * right_NR.sum(0))
        return float((1 + ((own - 2 * cross) >= self.mmd()).sum()) / (1 + PERMUTATIONS))


def linear_mmd(left_XD: Array, right_YD: Array) -> float:
    """The biased MMD^2 of the linear kernel: the squared distance of the means."""
    return float(((left_XD.mean(0) - right_YD.mean(0)) ** 2).sum())


def coral_distance(left_XD: Array, right_YD: Array) -> float:
    """|C - C'|_F^2 / (4 D^2) + |m - m'|^2 / D: covariances alone don't see a shift of the mean (Sun 2016)."""
    width = left_XD.shape[1]
    difference = np.cov(left_XD.T) - np.cov(right_YD.T)
    return float((difference**2).sum() / (4 * width**2) + linear_mmd(left_XD, right_YD) / width)


def held_out_accuracy(states_ND: Array, labels_N: NDArray[np.bool_], seed: int = 0) -> float:
    """Accuracy of a ridge logistic regression, each row told by a fit on the other four folds.

    Folds are balanced by label, and a fit's features are standardised by its own rows.
    """
    rng = np.random.default_rng(seed)
    fold_N = np.empty(len(labels_N), np.int64)
    for label in (False, True):
        own = np.flatnonzero(labels_N == label)
        fold_N[rng.permutation(own)] = np.arange(len(own)) % FOLDS
    right = 0
    for fold in range(FOLDS):
        fit, told = fold_N != fold, fold_N == fold
        mean_D, scale_D = states_ND[fit].mean(0), states_ND[fit].std(0) + 1e-12
        weights = _fit((states_ND[fit] - mean_D) / scale_D, labels_N[fit])
        scores = (states_ND[told] - mean_D) / scale_D @ weights[:-1] + weights[-1]
        right += int(((scores > 0) == labels_N[told]).sum())
    return right / len(labels_N)


def proxy_a_distance(left_XD: Array, right_YD: Array, seed: int = 0) -> float:
    """2 (1 - 2 error) of telling the domains apart (Ben-David 2007), within [0, 2]; as many rows of each."""
    count = min(len(left_XD), len(right_YD))
    rng = np.random.default_rng(seed)
    sides = [side[np.sort(rng.permutation(len(side))[:count])] for side in (left_XD, right_YD)]
    labels = np.repeat([False, True], count)
    error = 1 - held_out_accuracy(np.concatenate(sides), labels, seed)
    return float(np.clip(2 * (1 - 2 * error), 0.0, 2.0))


def content_probe(
    states_ND: Array, ids: Sequence[NDArray[np.int32]], seed: int = 0
) -> float | None:
    """How well states tell what is in their rows: mean accuracy over up to 8 tokens, present or not.

    The tokens are those that come nearest to being in half of the rows (a fifth to four fifths). A model
    whose states have collapsed has no shift, and fails here. None where there is no such token.
    """
    present: dict[int, int] = {}
    for row in ids:
        for token in np.unique(row).tolist():
            present[token] = present.get(token, 0) + 1
    shares = {token: count / len(ids) for token, count in present.items()}
    chosen = sorted(
        (t for t, share in shares.items() if 0.2 <= share <= 0.8),
        key=lambda t: (abs(shares[t] - 0.5), t),
    )[:PROBE_TOKENS]
    if not chosen:
        return None
    accuracies = []
    for token in chosen:
        labels = np.asarray([token in row for row in ids])
        accuracies.append(held_out_accuracy(states_ND, labels, seed))
    return float(np.mean(accuracies))


def measure_shift(states: States, base: States, sigma_squared: float) -> dict[str, float]:
    """MMD^2, CORAL distance and proxy A-distance of standardised states.

    Args:
        states: Of the model measured.
        base: Of the starting model: its mean and deviation standardise, so units don't count.
        sigma_squared: Of the starting model's standardised states (`base_bandwidth`).
    """
    left, right = standardised(states, base)
    return {
        "mmd": Kernels.of(left, right, sigma_squared).mmd(),
        "coral": coral_distance(left, right),
        "a_distance": proxy_a_distance(left, right),
    }


def standardised(states: States, base: States) -> tuple[Array, Array]:
    """Both domains' states, less the base's mean and over its deviation (over both domains' rows)."""
    both = np.concatenate([base.domain_XD, base.general_YD])
    mean, scale = both.mean(0), both.std(0)
    scale = np.where(scale > 1e-12 * max(float(scale.max()), 1e-300), scale, 1.0)
    return (states.domain_XD - mean) / scale, (states.general_YD - mean) / scale


def base_bandwidth(base: States) -> float:
    """The median heuristic on the base's standardised states."""
    return median_bandwidth(np.concatenate(standardised(base, base)))


def reduction(base: States, tuned: States, *, seed: int = 0) -> dict[str, Any]:
    """1 - MMD^2 after / MMD^2 before, with a bootstrap interval over rows.

    The same rows are resampled before and after. `reduction` is None where the base itself shows no shift by a
    permutation test. `reduction_own_scale` standardises the tuned states by their own deviation: a model that
    merely shrinks its states has none of it.
    """
    sigma_squared = base_bandwidth(base)
    before = Kernels.of(*standardised(base, base), sigma_squared)
    after = Kernels.of(*standardised(tuned, base), sigma_squared)
    own_scale = Kernels.of(*standardised(tuned, tuned), sigma_squared)
    rng = np.random.default_rng(seed)
    counts = len(base.domain_XD), len(base.general_YD)
    draws = [rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).T.astype(float) for n in counts]
    old, new, scaled = (kernels.weighted(*draws) for kernels in (before, after, own_scale))
    tail = 100 * (1 - INTERVAL) / 2
    p_value = before.p_value(rng)
    if p_value > 1 - INTERVAL:
        return {"base_p_value": p_value, "reduction": None, "reduction_own_scale": None}
    return {
        "base_p_value": p_value,
        "reduction": 1 - after.mmd() / before.mmd(),
        "reduction_interval": _interval(1 - new / old, tail),
        "reduction_own_scale": 1 - own_scale.mmd() / before.mmd(),
        "reduction_own_scale_interval": _interval(1 - scaled / old, tail),
    }


def shift_report(
    base: States,
    tuned: States,
    *,
    domain_ids: Sequence[NDArray[np.int32]],
    base_loss: float | None,
    tuned_loss: float | None,
    seed: int = 0,
) -> dict[str, Any]:
    """Shift between domain and general rows before and after, its reduction, and what speaks against it.

    A reduction of 40 % is claimed only where the interval's lower bound reaches it on either scale, the
    domain's cross-entropy has not risen by over 1 %, and the content probe has not dropped by over 2 points.

    Args:
        base: States of the starting model.
        tuned: States of the tuned one, of the same rows.
        domain_ids: Tokens of the domain's rows, for the content probe.
        base_loss: Cross-entropy of the domain's validation rows before.
        tuned_loss: After.
        seed: Of folds and resamples.
    """
    counts = {"domain_rows": len(base.domain_XD), "general_rows": len(base.general_YD)}
    if min(counts.values()) < FEWEST_ROWS:
        return {"measured": False, **counts, "reason": f"fewer than {FEWEST_ROWS} rows of a domain"}
    if not all(np.isfinite(s).all() for s in (tuned.domain_XD, tuned.general_YD)):
        return {"measured": False, **counts, "reason": "the tuned model's states are not finite"}
    sigma_squared = base_bandwidth(base)
    found = reduction(base, tuned, seed=seed)
    probes = [content_probe(states.domain_XD, domain_ids, seed) for states in (base, tuned)]
    loss_kept = _loss_kept(base_loss, tuned_loss)
    before_probe, after_probe = probes
    content_kept = (
        None
        if before_probe is None or after_probe is None
        else after_probe >= before_probe - PROBE_TOLERANCE
    )
    bounds = [found.get("reduction_interval"), found.get("reduction_own_scale_interval")]
    reaches = all(bound is not None and bound[0] >= CLAIM for bound in bounds)
    return {
        "measured": True,
        **counts,
        "before": measure_shift(base, base, sigma_squared),
        "after": measure_shift(tuned, base, sigma_squared),
        **found,
        "bandwidth": sigma_squared,
        "guards": {
            "domain_loss_before": base_loss,
            "domain_loss_after": tuned_loss,
            "domain_loss_kept": loss_kept,
            "content_probe_before": before_probe,
            "content_probe_after": after_probe,
            "content_kept": content_kept,
        },
        "claims_40_percent": reaches and loss_kept is True and content_kept is True,
    }


def _off_diagonal(kernel_NN: Array, counts_NR: Array) -> Array:
    """Mean kernel over pairs of different rows, weighted by how often each pair occurs."""
    total = counts_NR.sum(0)
    squares = (counts_NR**2).sum(0)
    sums = (counts_NR * (kernel_NN @ counts_NR)).sum(0) - np.diagonal(kernel_NN) @ counts_NR**2
    return np.asarray(sums / (total**2 - squares))


def _interval(values: Array, tail: float) -> list[float]:
    return [float(x) for x in np.percentile(values, [tail, 100 - tail])]


def _loss_kept(before: float | None, after: float | None) -> bool | None:
    if before is None or after is None or not math.isfinite(after):
        return None if before is None or after is None else False
    return after <= before * (1 + LOSS_TOLERANCE)


def _fit(states_ND: Array, labels_N: NDArray[np.bool_]) -> Array:
    """Weights and, last, the intercept of a ridge logistic regression."""
    signs_N = np.where(labels_N, 1.0, -1.0)

    def loss(weights: Array) -> tuple[float, Array]:
        margins_N = signs_N * (states_ND @ weights[:-1] + weights[-1])
        pulls_N = -signs_N * np.exp(-np.logaddexp(0.0, margins_N)) / len(signs_N)
        value = np.logaddexp(0.0, -margins_N).mean() + 0.5 * RIDGE * (weights[:-1] ** 2).sum()
        slope = np.append(states_ND.T @ pulls_N + RIDGE * weights[:-1], pulls_N.sum())
        return float(value), slope

    start = np.zeros(states_ND.shape[1] + 1)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return np.asarray(found.x)
