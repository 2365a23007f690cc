"""The int8 runtime for Llama-like drafts on a CPU."""
