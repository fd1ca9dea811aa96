"""Registered models with versions and aliases, and monitors of what is deployed."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _time(name: str) -> sa.Column[datetime]:
    """A moment that is the database's present unless given."""
    now = sa.text("clock_timestamp()")
    return sa.Column(name, sa.DateTime(timezone=True), server_default=now, nullable=False)


def _record() -> tuple[sa.Column[Any], ...]:
    """The columns of every record, which come after its own."""
    return (
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        _time("created_at"),
    )


def upgrade() -> None:
    op.create_table(
        "registered_models",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column(
            "metadata", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True
        ),
        sa.Column("gate", sa.Text(), nullable=False),
        sa.Column("max_cumulative_drop", sa.Double(), nullable=True),
        sa.Column("version_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        _time("updated_at"),
        *_record(),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_registered_models_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_registered_models")),
        sa.UniqueConstraint(
            "project_id", "name", name=op.f("uq_registered_models_project_id_name")
        ),
        sa.UniqueConstraint("seq", name=op.f("uq_registered_models_seq")),
    )
    op.create_table(
        "registered_versions",
        sa.Column("registered_model_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("model_version_id", sa.Uuid(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        *_record(),
        sa.ForeignKeyConstraint(
            ["model_version_id"],
            ["model_versions.id"],
            name=op.f("fk_registered_versions_model_version_id_model_versions"),
        ),
        sa.ForeignKeyConstraint(
            ["registered_model_id"],
            ["registered_models.id"],
            name=op.f("fk_registered_versions_registered_model_id_registered_models"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_registered_versions")),
        sa.UniqueConstraint(
            "registered_model_id",
            "model_version_id",
            name=op.f("uq_registered_versions_registered_model_id_model_version_id"),
        ),
        sa.UniqueConstraint(
            "registered_model_id",
            "version",
            name=op.f("uq_registered_versions_registered_model_id_version"),
        ),
        sa.UniqueConstraint("seq", name=op.f("uq_registered_versions_seq")),
    )
    op.create_index(
        "ix_registered_versions_model_version_id",
        "registered_versions",
        ["model_version_id"],
        unique=False,
    )
    op.create_table(
        "aliases",
        sa.Column("registered_model_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Uuid(), nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        _time("moved_at"),
        *_record(),
        sa.ForeignKeyConstraint(
            ["registered_model_id"],
            ["registered_models.id"],
            name=op.f("fk_aliases_registered_model_id_registered_models"),
        ),
        sa.ForeignKeyConstraint(
            ["version_id"],
            ["registered_versions.id"],
            name=op.f("fk_aliases_version_id_registered_versions"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aliases")),
        sa.UniqueConstraint(
            "registered_model_id", "name", name=op.f("uq_aliases_registered_model_id_name")
        ),
        sa.UniqueConstraint("seq", name=op.f("uq_aliases_seq")),
    )
    op.create_index("ix_aliases_version_id", "aliases", ["version_id"], unique=False)
    op.create_table(
        "alias_changes",
        sa.Column("alias_id", sa.Uuid(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("from_version_id", sa.Uuid(), nullable=True),
        sa.Column("to_version_id", sa.Uuid(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("forced", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "details", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False
        ),
        sa.Column("compensation_job_id", sa.Uuid(), nullable=True),
        *_record(),
        sa.CheckConstraint(
            "NOT forced OR reason IS NOT NULL", name=op.f("ck_alias_changes_force_has_a_reason")
        ),
        sa.ForeignKeyConstraint(
            ["alias_id"], ["aliases.id"], name=op.f("fk_alias_changes_alias_id_aliases")
        ),
        sa.ForeignKeyConstraint(
            ["compensation_job_id"],
            ["jobs.id"],
            name=op.f("fk_alias_changes_compensation_job_id_jobs"),
        ),
        sa.ForeignKeyConstraint(
            ["from_version_id"],
            ["registered_versions.id"],
            name=op.f("fk_alias_changes_from_version_id_registered_versions"),
        ),
        sa.ForeignKeyConstraint(
            ["to_version_id"],
            ["registered_versions.id"],
            name=op.f("fk_alias_changes_to_version_id_registered_versions"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alias_changes")),
        sa.UniqueConstraint(
            "alias_id", "revision", name=op.f("uq_alias_changes_alias_id_revision")
        ),
        sa.UniqueConstraint("seq", name=op.f("uq_alias_changes_seq")),
    )
    op.create_table(
        "monitors",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("alias_id", sa.Uuid(), nullable=False),
        sa.Column(
            "settings", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False
        ),
        sa.Column("sources", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("next_evaluation_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("evaluation_job_id", sa.Uuid(), nullable=True),
        sa.Column("stale_after_hours", sa.Double(), nullable=True),
        sa.Column("last_result_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stale_since", sa.DateTime(timezone=True), nullable=True),
        _time("updated_at"),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        *_record(),
        sa.ForeignKeyConstraint(
            ["alias_id"], ["aliases.id"], name=op.f("fk_monitors_alias_id_aliases")
        ),
        sa.ForeignKeyConstraint(
            ["evaluation_job_id"], ["jobs.id"], name=op.f("fk_monitors_evaluation_job_id_jobs")
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_monitors_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_monitors")),
        sa.UniqueConstraint("seq", name=op.f("uq_monitors_seq")),
    )
    op.create_index(
        "ix_monitors_due",
        "monitors",
        ["next_evaluation_at"],
        unique=False,
        postgresql_where=sa.text("deleted_at IS NULL AND enabled"),
    )
    op.create_index("ix_monitors_project", "monitors", ["project_id", "seq"], unique=False)
    op.create_index(
        "uq_monitors_alias_id",
        "monitors",
        ["alias_id"],
        unique=True,
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "compensations",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("model_version_id", sa.Uuid(), nullable=False),
        sa.Column("monitor_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("lever", sa.Text(), nullable=True),
        sa.Column("change", sa.Text(), nullable=False),
        *_record(),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_compensations_job_id_jobs")),
        sa.ForeignKeyConstraint(
            ["model_version_id"],
            ["model_versions.id"],
            name=op.f("fk_compensations_model_version_id_model_versions"),
        ),
        sa.ForeignKeyConstraint(
            ["monitor_id"], ["monitors.id"], name=op.f("fk_compensations_monitor_id_monitors")
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_compensations_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_compensations")),
        sa.UniqueConstraint("job_id", name=op.f("uq_compensations_job_id")),
        sa.UniqueConstraint("model_version_id", name=op.f("uq_compensations_model_version_id")),
        sa.UniqueConstraint("seq", name=op.f("uq_compensations_seq")),
    )
    op.create_table(
        "monitor_looks",
        sa.Column("monitor_id", sa.Uuid(), nullable=False),
        sa.Column("alias_id", sa.Uuid(), nullable=False),
        sa.Column("model_version_id", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("evaluation_ids", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("look", sa.BigInteger(), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column(
            "reading", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False
        ),
        _time("measured_at"),
        sa.Column("alias_change_id", sa.Uuid(), nullable=True),
        sa.Column(
            "outcome", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False
        ),
        *_record(),
        sa.ForeignKeyConstraint(
            ["alias_change_id"],
            ["alias_changes.id"],
            name=op.f("fk_monitor_looks_alias_change_id_alias_changes"),
        ),
        sa.ForeignKeyConstraint(
            ["alias_id"], ["aliases.id"], name=op.f("fk_monitor_looks_alias_id_aliases")
        ),
        sa.ForeignKeyConstraint(
            ["model_version_id"],
            ["model_versions.id"],
            name=op.f("fk_monitor_looks_model_version_id_model_versions"),
        ),
        sa.ForeignKeyConstraint(
            ["monitor_id"], ["monitors.id"], name=op.f("fk_monitor_looks_monitor_id_monitors")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_monitor_looks")),
        sa.UniqueConstraint(
            "alias_id",
            "model_version_id",
            "digest",
            name=op.f("uq_monitor_looks_alias_id_model_version_id_digest"),
        ),
        sa.UniqueConstraint("seq", name=op.f("uq_monitor_looks_seq")),
    )
    op.create_index("ix_monitor_looks_alias", "monitor_looks", ["alias_id", "seq"], unique=False)
    op.create_index(
        op.f("ix_monitor_looks_monitor_id"), "monitor_looks", ["monitor_id"], unique=False
    )
    op.create_index(
        "ix_monitor_looks_version", "monitor_looks", ["model_version_id", "verdict"], unique=False
    )

    # What was deployed when, by whom and why is written once.
    op.execute(
        """
        CREATE FUNCTION refuse_rewriting_alias_changes() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'alias change % is written for good', OLD.id USING ERRCODE = 'check_violation';
        END $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER alias_changes_stay BEFORE DELETE OR UPDATE
        ON alias_changes FOR EACH ROW EXECUTE FUNCTION refuse_rewriting_alias_changes()
        """
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER alias_changes_stay ON alias_changes")
    op.execute("DROP FUNCTION refuse_rewriting_alias_changes")
    op.drop_index("ix_monitor_looks_version", table_name="monitor_looks")
    op.drop_index(op.f("ix_monitor_looks_monitor_id"), table_name="monitor_looks")
    op.drop_index("ix_monitor_looks_alias", table_name="monitor_looks")
    op.drop_table("monitor_looks")
    op.drop_table("compensations")
    op.drop_index(
        "uq_monitors_alias_id",
        table_name="monitors",
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.drop_index("ix_monitors_project", table_name="monitors")
    op.drop_index(
        "ix_monitors_due",
        table_name="monitors",
        postgresql_where=sa.text("deleted_at IS NULL AND enabled"),
    )
    op.drop_table("monitors")
    op.drop_table("alias_changes")
    op.drop_index("ix_aliases_version_id", table_name="aliases")
    op.drop_table("aliases")
    op.drop_index("ix_registered_versions_model_version_id", table_name="registered_versions")
    op.drop_table("registered_versions")
    op.drop_table("registered_models")
