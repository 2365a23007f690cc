"""What to verify, what to wait for, and the estimates behind both. Pure."""
