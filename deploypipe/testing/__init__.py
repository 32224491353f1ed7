"""Contracts of plug-ins, for their authors: of algorithms and backends as functions, of runners as tests to inherit."""
