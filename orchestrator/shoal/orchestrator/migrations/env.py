"""Alembic's environment: runs on the connection the database module passes in."""

from alembic import context

from shoal.orchestrator.store.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
