"""Scorers of free answers, where a benchmark's items come from, and what a project requires."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

SCORERS = (
    "multiple_choice",
    "exact_match",
    "normalised_match",
    "token_f1",
    "bleu4",
    "rouge_l",
    "nll",
)
FIRST_SCORERS = ("multiple_choice", "exact_match", "nll")
CHECK = op.f("ck_benchmark_versions_scorer")


def upgrade() -> None:
    """Adds what is new; rows that are there keep their meaning."""
    _check_scorer(SCORERS)
    op.add_column("benchmark_versions", sa.Column("source", sa.Text(), nullable=True))
    op.add_column("benchmark_versions", sa.Column("subset", postgresql.JSONB(), nullable=True))
    op.add_column("benchmark_versions", sa.Column("subjects", postgresql.JSONB(), nullable=True))
    op.create_table(
        "required_benchmarks",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("benchmark_version_id", sa.Uuid(), nullable=False),
        sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False),
        sa.Column("limit", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_required_benchmarks_project_id_projects")
        ),
        sa.ForeignKeyConstraint(
            ["benchmark_version_id"],
            ["benchmark_versions.id"],
            name=op.f("fk_required_benchmarks_benchmark_version_id_benchmark_versions"),
        ),
        sa.PrimaryKeyConstraint(
            "project_id", "benchmark_version_id", name=op.f("pk_required_benchmarks")
        ),
    )


def downgrade() -> None:
    """Takes it away again; refused while a benchmark is scored in a new way."""
    op.drop_table("required_benchmarks")
    op.drop_column("benchmark_versions", "subjects")
    op.drop_column("benchmark_versions", "subset")
    op.drop_column("benchmark_versions", "source")
    _check_scorer(FIRST_SCORERS)


def _check_scorer(scorers: tuple[str, ...]) -> None:
    listed = ", ".join(f"'{scorer}'" for scorer in scorers)
    op.drop_constraint(CHECK, "benchmark_versions", type_="check")
    op.create_check_constraint(CHECK, "benchmark_versions", f"scorer IN ({listed})")
