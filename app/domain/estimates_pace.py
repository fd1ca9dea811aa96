"""Seconds of passes over rows, by one run's model on one device class."""

from typing import Final

from app.domain.estimates_devices import Rates
from app.domain.estimates_memory import Trained
from app.domain.estimates_shapes import ModelShape
from app.domain.estimates_work import StepRows, Work, forward_work, step_work, update_work

#: A forward that makes one token of several rows costs its calls, and reads the weights once.
DECODED_ROWS: Final = 32
#: Padded tokens of a forward that only reads.
READ_TOKENS: Final = 4096


class Pace:
    """Seconds of passes by one run's model on one device class."""

    def __init__(
        self, shape: ModelShape, trained: Trained, layer_bytes: float, rates: Rates, ranks: int
    ) -> None:
        self._shape, self._trained = shape, trained
        self._layer, self._rates, self._ranks = layer_bytes, rates, ranks

    def step(self, rows: StepRows) -> float:
        """A step: forward, backward and update; ranks share its micro-batches."""
        return self.passes(rows) + update_work(self._trained).seconds(self._rates)

    def passes(self, rows: StepRows, *, within: StepRows | None = None) -> float:
        """Forward and backward over rows; ranks share them as they share those of the step they are `within`."""
        work = step_work(self._shape, self._trained, rows, self._layer)
        return work.seconds(self._rates) / self._share(within or rows)

    def forward(self, rows: StepRows, *, within: StepRows | None = None) -> float:
        """A forward alone."""
        work = forward_work(self._shape, rows, self._layer)
        return work.seconds(self._rates) / self._share(within or rows)

    def reading(self, tokens: float, mean: float, *, supervised: float = 1.0) -> float:
        """A forward over so many tokens in micro-batches of READ_TOKENS; ranks share them."""
        rows = StepRows(
            rows=tokens / max(mean, 1.0),
            tokens=tokens,
            real_tokens=tokens,
            supervised=tokens * supervised,
            pairs=tokens * mean,
            micros=max(tokens / READ_TOKENS, 1.0) if tokens else 0.0,
            largest=(1, 1, 1),
        )
        return self.forward(rows)

    def decoding(self, tokens: float) -> float:
        """Tokens made one after the other, in many rows at once."""
        passes = tokens / DECODED_ROWS
        weights = 4.0 * (self._shape.matrix_parameters + self._shape.head_size_parameters)
        matrices = self._shape.matrix_parameters + self._shape.head_size_parameters
        work = Work(
            flops=2.0 * matrices * tokens,
            moved=weights * passes,
            calls=self._shape.num_layers * passes,
        )
        return work.seconds(self._rates)

    def _share(self, rows: StepRows) -> float:
        return max(min(float(self._ranks), rows.micros), 1.0)
