"""Configurations, overrides and rows that nobody would write: `python -m tests.fuzz --examples 100000`."""
