"""What to draft, how far, and when to send it. Pure."""
