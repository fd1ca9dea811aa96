"""Indexes along which pages of results are read at any size of the table."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_evaluations_named": ["project_id", "benchmark", "seq"],
    "ix_evaluations_version": ["benchmark_version_id", "project_id", "seq"],
    "ix_evaluations_subject_named": ["subject_type", "subject_key", "benchmark", "seq"],
    "ix_evaluations_subject_seq": ["subject_type", "subject_key", "seq"],
}


def upgrade() -> None:
    for name, columns in INDEXES.items():
        op.create_index(name, "evaluations", columns, unique=False)


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, table_name="evaluations")
