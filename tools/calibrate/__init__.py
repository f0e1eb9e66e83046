"""Measures a model's attention while it generates, and writes the statistics that the compiler reads."""
