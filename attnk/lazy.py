"""Names of attnk that are imported when they are asked for."""

import importlib
from typing import Any

# the module that has them, or themselves
LAZY = {
    "capture": "attnk.inspect.capture",
    "count_parameters": "attnk.models",
    "fold": "attnk.rewrite.fold",
    "insert": "attnk.rewrite.insert",
    "lint": "attnk.inspect.lint",
    "models": "attnk.models",
    "remove": "attnk.rewrite.insert",
}


def __getattr__(name: str) -> Any:
    """What ``attnk.<name>`` is, called by ``attnk`` for names it does not have (PEP 562)."""
    if name not in LAZY:
        raise AttributeError(f"module 'attnk' has no attribute {name!r}")
    module = importlib.import_module(LAZY[name])
    return module if LAZY[name] == f"attnk.{name}" else getattr(module, name)
