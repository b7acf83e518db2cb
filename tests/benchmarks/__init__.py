"""Benchmarks: each is run as a module and ends on one line with a JSON object. They need no network."""
