"""Retain: fine-tunes language models without letting them forget. API, engine and control loops."""
