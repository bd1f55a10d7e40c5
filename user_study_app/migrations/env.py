"""Runs the schema's migrations on the connection that `Storage` hands over."""

from alembic import context

from user_study_app.storage import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
