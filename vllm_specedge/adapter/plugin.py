"""The entry point `vllm.general_plugins`: makes `--speculative-config edge` mean this package.

vLLM calls `register` in every process, before it parses its command line (engine/arg_utils.py, add_cli_args). Only two
functions of the front end are wrapped; engines and workers get our classes by their dotted names. If plugins are loaded
before that module (`vllm.plugins.load_general_plugins`), it is wrapped when it is imported. It is not imported for this
purpose, which would take each worker a second.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vllm_specedge.adapter.config_rewrite import (
    METHOD,
    SCHEDULER,
    check_config,
    is_v2,
    parse_value,
    rewrite,
    unreached,
    use_v1,
)
from vllm_specedge.adapter.hooks import V1, V2
from vllm_specedge.adapter.hybrids import drop_prefix_caching
from vllm_specedge.adapter.request_log import hide_ours
from vllm_specedge.errors import UserError

logger = logging.getLogger("vllm.specedge.plugin")

ARG_UTILS = "vllm.engine.arg_utils"


def register() -> None:
    """Wrap the front end's argument parsing, once. This is cheap and starts nothing."""
    arg_utils = sys.modules.get(ARG_UTILS)
    if arg_utils is not None:
        _wrap(getattr(arg_utils, "EngineArgs", None))
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Finds one module through the other finders, and wraps it as soon as it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != ARG_UTILS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            _wrap(getattr(module, "EngineArgs", None))

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(engine_args: Any) -> None:
    if engine_args is None or hasattr(engine_args, "_specedge"):
        return
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


def _warn_if_unreached(config: Any) -> None:
    sentence = unreached(config)
    if sentence is not None:
        logger.warning("%s", sentence)


def _finish(config: Any) -> None:
    """Complete the config according to the runner and the scheduling that vLLM has chosen."""
    from vllm_specedge.adapter.worker import verification

    verification.admit(config.speculative_config, V2 if config.use_v2_model_runner else V1)
    if not config.scheduler_config.async_scheduling:
        config.scheduler_config.scheduler_cls = SCHEDULER


def _rewriting(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        usage = kwargs.get("usage_context", args[0] if args else None)
        try:
            is_edge, is_caching = rewrite(self), bool(self.enable_prefix_caching)  # vLLM writes its default there
            config = create_engine_config(self, *args, **kwargs)
            if is_edge and is_v2(self) and not config.use_v2_model_runner:
                use_v1(self, "vLLM's V2 model runner does not take this configuration")
                config = create_engine_config(self, *args, **kwargs)
            if is_edge:
                hide_ours()
                check_config(config)
                if drop_prefix_caching(self, config, is_caching):
                    config = create_engine_config(self, *args, **kwargs)
                _warn_if_unreached(config)
                _finish(config)
        except UserError as error:
            if "SERVER" in getattr(usage, "name", ""):
                sys.exit(f"vllm-specedge: {error}")
            raise ValueError(str(error)) from None
        return config

    return wrapped
