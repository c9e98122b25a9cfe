"""Calls that Dynamo does not trace, but makes between two graphs. Importing this imports Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="losses of DTensors run between two graphs: compile without fullgraph=True"
)
def call_uncompiled(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls the function without tracing it. Its arguments may be DTensors."""
    return function(*args, **kwargs)
