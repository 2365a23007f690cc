"""The gateway's process: edges and engines connect to it."""
