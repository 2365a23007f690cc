"""The one folder that knows vLLM. `docs/design.md` lists the hooks; `hooks.py` checks them when an engine starts."""
