"""Pages of records, newest first."""

from typing import Any, TypeVar

from sqlalchemy import Select

from app.db.base import Record

Query = TypeVar("Query", bound=Select[*tuple[Any, ...]])


def newest_first(query: Query, table: type[Record], *, after: Record | None, limit: int) -> Query:
    """The newest rows of a query, or those that come after one row of the table."""
    if after is not None:
        query = query.where(table.seq < after.seq)
    return query.order_by(table.seq.desc()).limit(limit)
