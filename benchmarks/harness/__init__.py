"""What the benchmarks share: servers, edges, a relay, load, and what is kept of it."""
