"""torch.compile with other backends than the one that generates code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: str | Callable[..., Any]) -> None:
    """Let torch.compile use a backend, without the options of the default one."""
    compile_ = torch.compile

    def with_backend(function: Any, *, dynamic: bool | None, options: Any = None) -> Any:
        del options
        return compile_(function, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", with_backend)
