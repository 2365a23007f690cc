"""The gateway process, which edges and engines connect to."""
