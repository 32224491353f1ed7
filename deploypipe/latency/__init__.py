"""Latency tables: what kernels cost by width, and what a model costs."""
