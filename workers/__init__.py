"""What runs beside a GPU: the worker that claims and supervises, and the trainer it starts."""
