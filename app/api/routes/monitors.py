"""Monitors of deployed models: an alias, benchmarks with limits, who may act, and a schedule."""

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from app.api.dependencies import ModelsReader, ModelsWriter, SessionDep, WriterDep
from app.api.paging import After, Limit, parse_after
from app.api.schemas.base import Deleted, Page, build_page
from app.api.schemas.monitors import MonitorLookObject, MonitorObject, show_look, show_monitor
from app.domain.identifiers import parse_id
from app.domain.monitors import CreateMonitor, UpdateMonitor
from app.services import monitors

router = APIRouter(prefix="/v1/monitors", tags=["monitors"])

ID = "monitor_id"


@router.post("", response_model=MonitorObject)
def create_monitor(body: CreateMonitor, caller: ModelsWriter, writer: WriterDep) -> Response:
    """Watches what `model` (`name@alias`) points at, from now on and wherever it moves."""

    def work(session: Session) -> MonitorObject:
        row = monitors.create_monitor(session, caller.project_id, body)
        return show_monitor(monitors.show_monitor(session, row))

    return writer.run(caller, body, work)


@router.get("")
def list_monitors(
    session: SessionDep, caller: ModelsReader, after: After = None, limit: Limit = 20
) -> Page[MonitorObject]:
    """The project's monitors, newest first."""
    found, has_more = monitors.list_monitors(
        session, caller.project_id, after=parse_after("monitor", after), limit=limit
    )
    return build_page([show_monitor(shown) for shown in found], has_more=has_more)


@router.get("/{monitor_id}")
def retrieve_monitor(monitor_id: str, session: SessionDep, caller: ModelsReader) -> MonitorObject:
    """One monitor with its status."""
    key = parse_id("monitor", monitor_id, param=ID)
    return show_monitor(monitors.get_monitor(session, caller.project_id, key))


@router.patch("/{monitor_id}")
def update_monitor(
    monitor_id: str, body: UpdateMonitor, session: SessionDep, caller: ModelsWriter
) -> MonitorObject:
    """Changes what is given; null clears `schedule` and `stale_after_hours`."""
    key = parse_id("monitor", monitor_id, param=ID)
    row = monitors.update_monitor(session, caller.project_id, key, body)
    return show_monitor(monitors.show_monitor(session, row))


@router.delete("/{monitor_id}")
def delete_monitor(monitor_id: str, session: SessionDep, caller: ModelsWriter) -> Deleted:
    """Ends a monitor; its looks stay with the alias's history."""
    key = parse_id("monitor", monitor_id, param=ID)
    monitors.delete_monitor(session, caller.project_id, key)
    return Deleted(id=monitor_id, object="monitor.deleted")


@router.get("/{monitor_id}/looks")
def list_looks(
    monitor_id: str,
    session: SessionDep,
    caller: ModelsReader,
    after: After = None,
    limit: Limit = 20,
) -> Page[MonitorLookObject]:
    """What a monitor saw and what that led to, newest first."""
    found, has_more = monitors.list_looks(
        session,
        caller.project_id,
        parse_id("monitor", monitor_id, param=ID),
        after=parse_after("monitor_look", after),
        limit=limit,
    )
    return build_page([show_look(look, name) for look, name in found], has_more=has_more)
