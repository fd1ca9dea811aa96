"""Webhooks: a gapless number for each job, waits that receivers ask for, and an index to share out the work by."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("webhook_count", sa.BigInteger(), server_default="0", nullable=False)
    )
    # Receivers keep the highest number of a job: those that were sent came from `event_count`.
    op.execute("UPDATE jobs SET webhook_count = event_count WHERE event_count > 0")
    op.add_column(
        "webhook_deliveries", sa.Column("scheduled_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.add_column(
        "webhook_deliveries", sa.Column("not_before", sa.DateTime(timezone=True), nullable=True)
    )
    op.drop_index("ix_webhook_deliveries_due", table_name="webhook_deliveries")
    op.create_index(
        "ix_webhook_deliveries_pending",
        "webhook_deliveries",
        ["endpoint_id", "next_try_at", "seq"],
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_index("ix_webhook_deliveries_endpoint", "webhook_deliveries", ["endpoint_id", "seq"])


def downgrade() -> None:
    op.drop_index("ix_webhook_deliveries_endpoint", table_name="webhook_deliveries")
    op.drop_index("ix_webhook_deliveries_pending", table_name="webhook_deliveries")
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["next_try_at"],
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.drop_column("webhook_deliveries", "not_before")
    op.drop_column("webhook_deliveries", "scheduled_at")
    op.drop_column("jobs", "webhook_count")
