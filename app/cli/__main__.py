"""`python -m app.cli`: the same as `retain`."""

from app.cli import main

main()
