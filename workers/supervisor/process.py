"""The trainer as a child process: bound to its supervisor, without its secrets."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import app
from app.domain.runplan import EvaluationPlan, ExportPlan, RunPlan
from app.embedded.processes import Identity, launch_line
from workers.supervisor.slots import Slot

SOURCE_ROOT = Path(app.__file__).resolve().parent.parent
TRAINER = "workers.training.trainer"
#: All that a trainer may see of its supervisor's environment; the rest holds the database's password and more.
PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME"),
    *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "CUDA_DEVICE_ORDER", "VIRTUAL_ENV"),
    *("NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "COVERAGE_PROCESS_START"),
)
LOG_TAIL_BYTES = 4000


class TrainerProcess:
    """A running trainer, or torchrun over several; `kill` ends all of them.

    Start it from the thread that waits for it: the kernel ends it when that thread ends.

    Args:
        plan: What it runs.
        plan_path: Where that lies as JSON.
        socket_path: Where it connects.
        slots: Its devices; it inherits their locks.
        log_path: Its output.
        command: Replaces the trainer; gets `--plan` and `--socket` appended.
    """

    def __init__(
        self,
        plan: RunPlan | ExportPlan | EvaluationPlan,
        plan_path: Path,
        socket_path: str,
        slots: Sequence[Slot],
        log_path: Path,
        *,
        command: Sequence[str] | None = None,
    ) -> None:
        self._log_path = log_path
        line = [
            *(command or trainer_command(plan)),
            *("--plan", str(plan_path), "--socket", socket_path),
        ]
        locks: list[IO[str]] = [slot.file for slot in slots if slot.file is not None]
        with log_path.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line, without a shell
                launch_line(
                    line,
                    identity=Identity(),
                    directory=log_path.parent,
                    death_signal=signal.SIGKILL,
                ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=trainer_environment(plan.threads, slots),
                pass_fds=[lock.fileno() for lock in locks],
            )

    @property
    def pid(self) -> int:
        """Process id, which is also its group's."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status once it has ended: negative for a signal."""
        return self._process.poll()

    def end(self) -> None:
        """Ends it and whatever it started, without waiting; from any thread."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends it and whatever it started, at once."""
        self.end()
        self._process.wait()

    def tail(self) -> str:
        """The end of what it wrote."""
        with contextlib.suppress(OSError):
            return self._log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    def last_line(self) -> str:
        """The last line it wrote: of a crash, the error."""
        lines = [line.strip() for line in self.tail().splitlines()]
        return next((line for line in reversed(lines) if line), "")[:300]


def trainer_command(plan: RunPlan | ExportPlan | EvaluationPlan) -> list[str]:
    """The interpreter on the trainer; under torchrun from two ranks on."""
    ranks = plan.num_processes if isinstance(plan, RunPlan) else 1
    if ranks == 1:
        return [sys.executable, "-m", TRAINER]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "--max-restarts", "0", "-m", TRAINER),
    ]


def trainer_environment(threads: int, slots: Sequence[Slot]) -> dict[str, str]:
    """A small environment: no database, no broker, no keys, no network of hubs; few threads that spin briefly."""
    devices = [slot.device for slot in slots if slot.device is not None]
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return kept | {
        "PYTHONPATH": str(SOURCE_ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "1000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
