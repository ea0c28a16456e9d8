"""Checks a machine before a long run: ``python -m sb3_a3c.doctor``."""
