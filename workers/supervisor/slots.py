"""The slots of a machine: its GPUs, each with a lock file that lives as long as anybody uses it; else one CPU slot."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import structlog

from app.settings import Settings

SUSPECT_ERRORS = 2  # device errors on one GPU within an hour, after which it gets no more jobs
SUSPECT_SECONDS = 3600.0

log = structlog.get_logger()


@dataclass
class Slot:
    """One GPU, or the CPU slot of a worker process.

    Attributes:
        device: What goes into CUDA_VISIBLE_DEVICES; None for a CPU slot.
        lock: Its lock file; None where no other process could use the slot.
    """

    number: int
    device: str | None
    lock: Path | None
    file: IO[str] | None = None
    is_taken: bool = False
    errors: list[float] = field(default_factory=list)

    @property
    def is_suspect(self) -> bool:
        """Its device failed repeatedly of late."""
        recent = [at for at in self.errors if at > time.monotonic() - SUSPECT_SECONDS]
        return len(recent) >= SUSPECT_ERRORS


class Slots:
    """What this process can give to jobs; other worker processes on the machine may hold the same GPUs."""

    def __init__(self, slots: Sequence[Slot], device: str) -> None:
        self._slots = list(slots)
        self._mutex = threading.Lock()
        self.device = device

    @property
    def count(self) -> int:
        """All slots."""
        return len(self._slots)

    @property
    def num_free(self) -> int:
        """Slots that this process does not use."""
        return sum(not slot.is_taken and not slot.is_suspect for slot in self._slots)

    def take_free(self) -> list[Slot]:
        """Takes every slot that can be had, until `give_back`."""
        with self._mutex:
            return [slot for slot in self._slots if _take(slot)]

    def give_back(self, slots: Sequence[Slot]) -> None:
        """Frees slots; a lock file stays locked as long as a trainer that inherited it lives."""
        with self._mutex:
            for slot in slots:
                slot.is_taken = False
                if slot.file is not None:
                    slot.file.close()
                    slot.file = None

    def note_device_error(self, slots: Sequence[Slot]) -> None:
        """Remembers that a trainer died of its device."""
        for slot in slots:
            slot.errors.append(time.monotonic())
            if slot.is_suspect:
                log.error("worker.device_suspect", device=slot.device, slot=slot.number)


def find_slots(settings: Settings) -> Slots:
    """One slot a GPU, else one for the CPU; `worker_slots` sets how many of them this process uses."""
    devices = find_gpus()
    if not devices:
        cpu = [Slot(number, None, None) for number in range(settings.worker_slots or 1)]
        return Slots(cpu, "cpu")
    root = Path(tempfile.gettempdir()) / f"retain-slots-{os.geteuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    gpus = [
        Slot(number, device, root / f"gpu-{device.replace('/', '_')}.lock")
        for number, device in enumerate(devices[: settings.worker_slots])
    ]
    return Slots(gpus, _gpu_name())


def find_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; no CUDA library is loaded for it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in {"", "-1"}]
    return [str(number) for number, _ in enumerate(_list_gpus())]


def _list_gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run(  # noqa: S603 - a fixed command line
        [program, "-L"], capture_output=True, text=True, timeout=30, check=False
    )
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [line for line in lines if line.startswith("GPU ")]


def _gpu_name() -> str:
    names = _list_gpus()
    return names[0].partition(": ")[2].partition(" (UUID")[0] if names else "gpu"


def _take(slot: Slot) -> bool:
    if slot.is_taken or slot.is_suspect:
        return False
    if slot.lock is not None:
        file = slot.lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        slot.file = file
    slot.is_taken = True
    return True
