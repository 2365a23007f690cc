"""The shipping decisions on virtual time."""
