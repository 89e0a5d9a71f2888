"""Shares of limits."""

from __future__ import annotations

import pytest

from pipelines.fetch.config import FetchConfig
from pipelines.fetch.limits import share
from stgt.errors import SettingError


@pytest.mark.parametrize(("limit", "parts"), [(8, 1), (8, 3), (64, 7), (5, 5)])
def test_shares_add_up_to_the_limit_and_nobody_has_none(limit: int, parts: int) -> None:
    shares = [share(limit, part, parts) for part in range(parts)]
    assert sum(shares) == limit
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


def config(**settings: object) -> FetchConfig:
    return FetchConfig(annotations=("list.txt",), output="videos", **settings)  # type: ignore[arg-type]


def test_more_workers_than_connections_to_a_host_are_refused() -> None:
    with pytest.raises(SettingError, match=r"num_workers = 9: must not exceed .* \(8\)"):
        config(num_workers=9)
    assert config(num_workers=9, connections_per_host=9).most_workers == 9


@pytest.mark.parametrize(
    "settings",
    [
        {"annotations": ()}, {"connections": 0}, {"requests_per_s": 0.0}, {"bytes_per_s": -1.0},
        {"bytes_per_s": float("nan")}, {"idle_s": 0.0}, {"max_redirects": -1}, {"attempts": 0},
        {"user_agent": "a\nHost: b"}, {"max_bytes": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        FetchConfig(**{"annotations": ("list.txt",), "output": "videos", **settings})  # type: ignore[arg-type]
