"""Mitigation strategies: a pure torch library."""
