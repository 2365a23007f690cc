"""The entry point `vllm.general_plugins`: makes `--speculative-config edge` mean this package.

vLLM calls `register` in every process, before it parses its command line (engine/arg_utils.py, add_cli_args). Two
functions of the front end are wrapped and nothing else; engines and workers get our classes by their dotted names.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from vllm_specedge.adapter.rewrite import METHOD, check_config, parse_value, rewrite
from vllm_specedge.errors import UserError


def register() -> None:
    """Wrap the front end's argument parsing, once. Cheap, and nothing is started."""
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None or hasattr(arg_utils.EngineArgs, "_specedge"):
        return
    engine_args = arg_utils.EngineArgs
    engine_args._specedge = True
    engine_args.add_cli_args = staticmethod(_with_edge(engine_args.add_cli_args))
    engine_args.create_engine_config = _rewriting(engine_args.create_engine_config)


def _with_edge(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(parser: Any) -> Any:
        parser = add_cli_args(parser)
        action = parser._option_string_actions["--speculative-config"]
        parse_json = action.type

        def parse(value: str) -> Any:
            try:
                return parse_value(value, parse_json)
            except UserError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        action.type = parse
        method = parser._option_string_actions.get("--spec-method")
        if method is not None and method.choices is not None:
            method.choices = [*method.choices, METHOD]
        return parser

    return wrapped


def _rewriting(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        usage = kwargs.get("usage_context", args[0] if args else None)
        try:
            is_edge = rewrite(self)
            config = create_engine_config(self, *args, **kwargs)
            if is_edge:
                from vllm_specedge.adapter import verification

                check_config(config)
                verification.admit()
        except UserError as error:
            if "SERVER" in getattr(usage, "name", ""):
                sys.exit(f"vllm-specedge: {error}")
            raise ValueError(str(error)) from None
        return config

    return wrapped
