"""Postgres and Redis from the virtual environment, and the processes of `retain up`."""

from app.embedded.directory import DataDirectoryInUse, Endpoints
from app.embedded.processes import ServerFailed
from app.embedded.services import EmbeddedServices, operator_database

__all__ = [
    "DataDirectoryInUse",
    "EmbeddedServices",
    "Endpoints",
    "ServerFailed",
    "operator_database",
]
