"""Measure a latency table on its target."""
