"""One typed configuration per mitigation strategy."""
