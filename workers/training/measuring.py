"""What a run measures of itself: rows and seconds of its steps, and the peak of its memory."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from app.domain.estimates_calibration import Measured
from workers.strategies.batch import Micro

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak of resident memory begins anew


class Workload:
    """Counts over the steps of an attempt; of the first one only memory is counted, as it warms up."""

    def __init__(self) -> None:
        self.held_before = 0  # bytes, before the model was loaded
        self._steps = self._rows = self._tokens = self._supervised = 0
        self._pairs = self._micros = 0
        self._seconds = self._cpu_seconds = self._cpu_pending = 0.0
        self._peak = 0
        self._largest = (0, 0, 0)
        self._pending: list[tuple[int, int, int]] = []
        self._is_warm = False

    def add(self, micros: Sequence[Micro]) -> None:
        """What this rank reads in the step at hand."""
        self._pending = [
            (*micro.input_ids_BT.shape, int(micro.positions_N.numel())) for micro in micros
        ]

    @contextlib.contextmanager
    def step(self, device: torch.device) -> Iterator[None]:
        """Watches memory while a step is done inside."""
        self._pending = []
        begin_peak(device)
        before = time.process_time()
        yield
        self._cpu_pending = time.process_time() - before
        self._peak = max(self._peak, read_peak(device))

    def end_step(self, seconds: float) -> None:
        """Counts the step just done."""
        for rows, width, supervised in self._pending:
            if rows * width > self._largest[0] * self._largest[1]:
                self._largest = (rows, width, max(supervised, self._largest[2]))
        if not self._is_warm:
            self._is_warm = True
            return
        self._steps += 1
        self._seconds += seconds
        self._cpu_seconds += self._cpu_pending
        self._micros += len(self._pending)
        for rows, width, supervised in self._pending:
            self._rows += rows
            self._tokens += rows * width
            self._pairs += rows * width * width
            self._supervised += supervised

    def measured(
        self, device: torch.device, *, world_size: int, mean_row_tokens: float
    ) -> Measured | None:
        """What is told of the run; None where it had but one step."""
        if self._steps == 0 or self._tokens == 0:
            return None
        return Measured(
            device=device_name(device),
            device_type="cuda" if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            memory_bytes=device_bytes(device),
            world_size=world_size,
            peak_bytes=max(self._peak - self.held_before, 1),
            steps=self._steps,
            step_seconds=self._seconds,
            cpu_seconds=self._cpu_seconds,
            rows=self._rows,
            tokens=self._tokens,
            supervised=self._supervised,
            pairs=self._pairs,
            micros=self._micros,
            largest=self._largest,
            mean_row_tokens=mean_row_tokens,
        )


def begin_peak(device: torch.device) -> None:
    """The peak is measured from here on, where the system lets it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not everywhere allowed: then it is that of the process
        CLEAR_REFS.write_text(RESET_PEAK)


def read_peak(device: torch.device) -> int:
    """Bytes allocated on a GPU, or resident in this process, at most since the last reset."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def held_bytes(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine() or "CPU"


def device_bytes(device: torch.device) -> int | None:
    """The device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _status(key: str) -> int:
    """A size of this process as Linux tells it; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0
