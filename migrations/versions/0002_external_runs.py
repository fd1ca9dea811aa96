"""External runs as jobs without a lease, and decisions that can't be rewritten."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

KIND = "ck_jobs_jobkind"
LEASE = "ck_jobs_lease_goes_with_state"
LEASED = "worker_id IS NOT NULL AND lease_expires_at IS NOT NULL"


def upgrade() -> None:
    _replace_check(KIND, "kind IN ('fine_tuning', 'evaluation', 'export', 'external')")
    _replace_check(LEASE, f"(state IN ('running', 'pausing') AND kind <> 'external') = ({LEASED})")
    _replace_check(
        "ck_jobs_external_runs_are_never_queued",
        "kind <> 'external' OR state IN ('running', 'succeeded', 'failed', 'cancelled')",
        is_new=True,
    )
    op.alter_column("jobs", "base_model_id", existing_type=sa.Uuid(), nullable=True)
    _replace_check(
        "ck_jobs_only_external_runs_lack_a_base",
        "kind = 'external' OR base_model_id IS NOT NULL",
        is_new=True,
    )
    # What was decided, and on what, is written once; `state` and what went down may follow.
    op.execute(
        """
        CREATE FUNCTION refuse_rewriting_decisions() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'decision % is written for good', OLD.id USING ERRCODE = 'check_violation';
        END $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER decisions_stay BEFORE DELETE OR UPDATE OF
            job_id, branch, step, origin, look, action, code, reason, evidence, decision
        ON decisions FOR EACH ROW EXECUTE FUNCTION refuse_rewriting_decisions()
        """
    )


def downgrade() -> None:
    # Fails while there are external runs: the older schema has no place for them.
    op.execute("DROP TRIGGER decisions_stay ON decisions")
    op.execute("DROP FUNCTION refuse_rewriting_decisions")
    op.drop_constraint("ck_jobs_only_external_runs_lack_a_base", "jobs")
    op.alter_column("jobs", "base_model_id", existing_type=sa.Uuid(), nullable=False)
    op.drop_constraint("ck_jobs_external_runs_are_never_queued", "jobs")
    _replace_check(LEASE, f"(state IN ('running', 'pausing')) = ({LEASED})")
    _replace_check(KIND, "kind IN ('fine_tuning', 'evaluation', 'export')")


def _replace_check(name: str, condition: str, *, is_new: bool = False) -> None:
    if not is_new:
        op.drop_constraint(op.f(name), "jobs")
    op.create_check_constraint(op.f(name), "jobs", condition)
