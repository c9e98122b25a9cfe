"""Calls that compilers do not trace. Importing this module imports Dynamo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="the head over DTensors runs between graphs: compile without fullgraph=True"
)
def call_uncompiled(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)
