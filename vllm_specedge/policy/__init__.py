"""What to verify, what to wait for, and the estimates that both go by. Pure."""
