"""Commands for people, on top of compiler and runtime."""
