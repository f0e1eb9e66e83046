"""A small, really trained video model, and the whole chain shown on it."""
