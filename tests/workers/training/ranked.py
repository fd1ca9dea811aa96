"""Two processes that train as the two ranks of one run."""

import multiprocessing
import os
import socket

from torch.multiprocessing.spawn import start_processes

from tests.workers.training.runs import CPU
from workers.training.ranks import Ranks

# Ranks are forked off a process that has imported all this once: the imports cost more than most runs.
multiprocessing.set_forkserver_preload(["tests.workers.training.runs", "peft"])


def on_two_ranks(work, *arguments):
    """What `work(ranks, *arguments)` returns on rank 0 and on rank 1, each in a process of its own.

    Args:
        work: A function of a module; what it returns goes through pickle, so arrays and no tensors.
        arguments: Handed to it after the ranks, as pickle does.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        start_processes(
            _work_as_rank, (port, results, work, arguments), nprocs=2, start_method="forkserver"
        )
        return [results[rank] for rank in range(2)]


def _work_as_rank(rank, port, results, work, arguments):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    ranks = Ranks.join(CPU)
    results[rank] = work(ranks, *arguments)
    ranks.leave()
    os._exit(0)  # as the trainer: an interpreter that shuts down beside gloo threads may abort
