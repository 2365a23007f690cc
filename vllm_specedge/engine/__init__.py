"""The engine's side of drafting: proposal trees, the step, the link to the gateway and its process."""
