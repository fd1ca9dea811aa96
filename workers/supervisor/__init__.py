"""The supervisor: claims jobs, holds their lease, starts the trainer and speaks for it; imports no torch."""

from workers.supervisor.node import Node, build_node

__all__ = ["Node", "build_node"]
