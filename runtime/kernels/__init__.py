"""Triton kernels, launched by the backends."""
