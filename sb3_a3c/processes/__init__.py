"""Starts, watches, replaces and stops worker processes. Knows no reinforcement learning."""
