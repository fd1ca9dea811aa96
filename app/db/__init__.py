"""Postgres: models, named queries and the one place that commits."""
