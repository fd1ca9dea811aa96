"""Plain loops on Postgres: reconciler, outbox relay and webhook sender; `python -m app.control`."""
