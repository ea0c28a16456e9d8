"""Starts, watches, replaces and stops worker processes. It knows no reinforcement learning."""
