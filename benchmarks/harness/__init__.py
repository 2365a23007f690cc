"""Shared by the benchmarks: servers, edges, a relay, load, and results."""
