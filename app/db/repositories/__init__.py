"""Named queries, one class per aggregate."""
