"""Use cases: one function each, inside the transaction of whoever calls it."""
