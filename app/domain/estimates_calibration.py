"""What finished runs measured, and the rates and factors of a device class that follow from them."""

from collections.abc import Sequence
from itertools import combinations
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.domain.estimates_devices import Rates
from app.domain.estimates_work import Work
from app.domain.frozen import Frozen

#: Weight of what is said of a device before it is measured, as a share of one measured run.
PRIOR_WEIGHT: Final = 0.002
MOST_RUNS: Final = 50  # the latest of a device class

Vector = NDArray[np.float64]


class Measured(Frozen):
    """What a trainer measured of its own run; it travels with its last message and is kept with the job."""

    device: str  # the GPU's name, or the CPU's
    device_type: Literal["cuda", "cpu"]
    threads: int
    memory_bytes: int | None  # of the device
    world_size: int
    peak_bytes: int  # above what the process held before the model was loaded
    steps: int  # that the numbers below are of
    step_seconds: float  # of all of them together; the first of an attempt is not counted
    cpu_seconds: (
        float  # of the process in those steps: what neighbours on the machine do not change
    )
    rows: int
    tokens: int  # padded
    supervised: int
    pairs: int
    micros: int
    largest: tuple[int, int, int]  # rows, width, supervised of the largest micro-batch
    mean_row_tokens: float  # of the training file

    @property
    def device_class(self) -> str:
        """Runs of one class tell of each other."""
        return self.device if self.device_type == "cuda" else f"{self.device} x{self.threads}"


class Run(NamedTuple):
    """A measured run beside what is reckoned for it."""

    work: Work  # of all measured steps together
    seconds: float
    lasting_bytes: int  # of the reckoned peak: what is exact
    passing_bytes: int  # and the rest: activations and logits, or gradients
    peak_bytes: int
    is_lora: bool = False


class Calibration(Frozen):
    """Of a device class."""

    device: str
    runs: int
    rates: Rates
    passing_factor: float  # on activations and logits
    adapter_factor: float  # the same of adapters, whose many small results leave holes on a CPU
    fixed_bytes: float  # what every run takes besides

    def factor(self, *, is_lora: bool) -> float:
        """On what passes in a step."""
        return self.adapter_factor if is_lora else self.passing_factor

    def peak_bytes(self, lasting: int, passing: int, *, is_lora: bool = False) -> int:
        """The peak of a run by these factors."""
        return int(lasting + self.factor(is_lora=is_lora) * passing + self.fixed_bytes)


def calibrate(device: str, runs: Sequence[Run], prior: Rates) -> Calibration:
    """Fits rates and memory factors to measured runs by relative error, none of them below 0.

    What the runs do not tell apart stays where the prior has it: in the same proportion to each other, at the
    scale that fits.

    Args:
        device: Its class.
        runs: At least one.
        prior: Rates before anything was measured.
    """
    work = np.array([[r.work.flops, r.work.moved, r.work.calls] for r in runs], dtype=np.float64)
    seconds = np.array([r.seconds for r in runs], dtype=np.float64)
    first = np.array([prior.seconds_per_flop, prior.seconds_per_byte, prior.seconds_per_call])
    scale = float(np.exp(np.median(np.log(seconds / (work @ first)))))
    flop, byte, call = _fit(work, seconds, first * scale)
    lasting = np.array([r.lasting_bytes for r in runs], dtype=np.float64)
    peak = np.array([r.peak_bytes for r in runs], dtype=np.float64)
    passing = np.array([r.passing_bytes for r in runs], dtype=np.float64)
    kinds = np.array([r.is_lora for r in runs])
    features = np.stack([passing * ~kinds, passing * kinds, np.ones_like(passing)], axis=1)
    typical = max(float(np.median(peak - lasting - passing)), 1.0)
    whole, adapters, fixed = _fit(features, peak, np.array([1.0, 1.0, typical]), offset=lasting)
    if kinds.all() or not kinds.any():  # of the other kind nothing was measured
        whole = adapters = adapters if kinds.all() else whole
    return Calibration(
        device=device,
        runs=len(runs),
        rates=Rates(seconds_per_flop=flop, seconds_per_byte=byte, seconds_per_call=call),
        passing_factor=whole,
        adapter_factor=adapters,
        fixed_bytes=fixed,
    )


def _fit(
    features: Vector, target: Vector, prior: Vector, *, offset: Vector | None = None
) -> list[float]:
    """Non-negative least squares of the relative error, drawn to a prior; few features, so all faces are tried.

    Args:
        features: One row a run.
        target: What was measured.
        prior: A coefficient each, above 0.
        offset: Added to what the coefficients give.
    """
    offsets = np.zeros_like(target) if offset is None else offset
    rows = features * prior / target[:, None]
    wanted = (target - offsets) / target
    pull = np.sqrt(PRIOR_WEIGHT) * np.eye(len(prior))
    matrix = np.vstack([rows, pull])
    goal = np.concatenate([wanted, np.full(len(prior), np.sqrt(PRIOR_WEIGHT))])
    best, least = np.zeros(len(prior)), float(goal @ goal)
    for size in range(1, len(prior) + 1):
        for chosen in combinations(range(len(prior)), size):
            columns = list(chosen)
            found, *_ = np.linalg.lstsq(matrix[:, columns], goal, rcond=None)
            if (found < 0).any():
                continue
            error = float(((matrix[:, columns] @ found - goal) ** 2).sum())
            if error < least:
                best, least = np.zeros(len(prior)), error
                best[columns] = found
    return [float(value) for value in best * prior]
