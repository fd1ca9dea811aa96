"""The HTTP API: parses, calls one service, answers."""
