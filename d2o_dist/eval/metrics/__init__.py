"""Metrics of generated text, each checked in tests against a reference package or published values."""
