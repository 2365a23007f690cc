"""The wire protocol: frames, their order, vocabularies, counters and the fields of requests. Pure."""
