"""The only folder that imports vLLM. `docs/design.md` lists the hooks; `hooks.py` checks them when an engine starts."""
