"""torch.compile with other backends than the one that generates code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stgt.network import graph_attention


class Compilations:
    """A backend of torch.compile that runs what it gets, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        self.count += 1
        return module.forward


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: str | Callable[..., Any]) -> None:
    """Let torch.compile use a backend, without the options of the default one."""
    compile_ = torch.compile

    def with_backend(function: Any, *, dynamic: bool | None, options: Any = None) -> Any:
        del options
        return compile_(function, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", with_backend)
    # Not those that were compiled before with another backend, nor these afterwards.
    monkeypatch.setattr(
        graph_attention,
        "maybe_compiled",
        functools.cache(graph_attention.maybe_compiled.__wrapped__),
    )
