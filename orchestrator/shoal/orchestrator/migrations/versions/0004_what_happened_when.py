"""Leases by their end and events by their time: an update's figures look at what is new"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_leases_job_ended", "leases", ["job_id", "ended_ms"], unique=False)
    op.create_index("ix_events_job_type_at", "events", ["job_id", "type", "at_ms"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_events_job_type_at", "events")
    op.drop_index("ix_leases_job_ended", "leases")
