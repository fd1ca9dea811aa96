"""The trainer as a process: bound to its parent, offline, with the threads it was given."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GOMP_SPINCOUNT": "1000",  # longer spins cost 2 to 5x where threads share cores
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # repeatable matrix products
}


def die_with_parent() -> None:
    """Asks the kernel for SIGKILL when the parent ends; exits if it already did (Linux alone)."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def prepare_environment(threads: int) -> None:
    """Sets what libraries read when they are imported: no network, few threads."""
    os.environ.update(OFFLINE)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def prepare_torch(threads: int) -> None:
    """Sets what torch and transformers take by call."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
