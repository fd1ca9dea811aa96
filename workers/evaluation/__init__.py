"""Scoring a model on benchmark items and validation rows."""
