"""Measured runs: what estimates are calibrated by."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "measured_runs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column("device_class", sa.Text(), nullable=False),
        sa.Column("measured", postgresql.JSONB(none_as_null=True), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["base_model_id"],
            ["base_models.id"],
            name=op.f("fk_measured_runs_base_model_id_base_models"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_measured_runs_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_measured_runs")),
        sa.UniqueConstraint("job_id", name=op.f("uq_measured_runs_job_id")),
        sa.UniqueConstraint("seq", name=op.f("uq_measured_runs_seq")),
    )
    op.create_index(
        op.f("ix_measured_runs_base_model_id"), "measured_runs", ["base_model_id"], unique=False
    )
    op.create_index(
        "ix_measured_runs_device_class", "measured_runs", ["device_class", "seq"], unique=False
    )


def downgrade() -> None:
    op.drop_table("measured_runs")
