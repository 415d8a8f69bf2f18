"""Teachers: larger models that a run learns from."""
