"""What Retain is about, in plain Python and pydantic: specs, states, statistics, decisions."""
