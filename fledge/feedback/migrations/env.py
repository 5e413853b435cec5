"""How Alembic runs the migrations: on the connection it is given, inside the caller's transaction."""

from __future__ import annotations

from alembic import context

from fledge.feedback.database import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()
