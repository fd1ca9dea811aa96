"""Quotas of projects, indexes for a fair claim, rotated keys, and idempotency keys by route."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

QUOTAS = ("max_queued_jobs", "max_running_jobs", "max_storage_bytes")


def upgrade() -> None:
    for name in QUOTAS:
        op.add_column("projects", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("api_keys", sa.Column("rotated_from_id", sa.Uuid(), nullable=True))
    op.create_foreign_key(
        op.f("fk_api_keys_rotated_from_id_api_keys"),
        "api_keys",
        "api_keys",
        ["rotated_from_id"],
        ["id"],
    )
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        ["project_id", sa.text("priority DESC"), "seq"],
        unique=False,
        postgresql_where=sa.text("state IN ('queued', 'validating_files')"),
    )
    op.create_index(
        "ix_jobs_started",
        "jobs",
        ["project_id", "started_at"],
        unique=False,
        postgresql_where=sa.text("started_at IS NOT NULL"),
    )
    op.drop_constraint(op.f("pk_idempotency_keys"), "idempotency_keys", type_="primary")
    op.create_primary_key(
        op.f("pk_idempotency_keys"), "idempotency_keys", ["project_id", "route", "key"]
    )


def downgrade() -> None:
    op.execute(
        "DELETE FROM idempotency_keys a USING idempotency_keys b"
        " WHERE a.project_id = b.project_id AND a.key = b.key AND a.route > b.route"
    )
    op.drop_constraint(op.f("pk_idempotency_keys"), "idempotency_keys", type_="primary")
    op.create_primary_key(op.f("pk_idempotency_keys"), "idempotency_keys", ["project_id", "key"])
    op.drop_index("ix_jobs_started", table_name="jobs")
    op.drop_index("ix_jobs_waiting", table_name="jobs")
    op.drop_constraint(op.f("fk_api_keys_rotated_from_id_api_keys"), "api_keys", type_="foreignkey")
    op.drop_column("api_keys", "rotated_from_id")
    for name in reversed(QUOTAS):
        op.drop_column("projects", name)
