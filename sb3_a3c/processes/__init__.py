"""Starts, watches, replaces and stops processes that run any function. Knows no reinforcement learning."""
