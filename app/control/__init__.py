"""Plain loops on Postgres: reconciler, outbox relay, webhook sender and monitor scheduler; `python -m app.control`."""
