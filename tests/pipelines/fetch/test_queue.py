"""The order in which URLs are handed out."""

from __future__ import annotations

import asyncio

from pipelines.fetch.queue import UrlQueue


def urls(host: str, count: int) -> list[tuple[str, str]]:
    return [(f"{host}{number}", f"https://{host}/{number}") for number in range(count)]


def test_urls_of_a_busy_host_do_not_keep_others_waiting() -> None:
    async def work() -> list[str]:
        queue, keys = UrlQueue(iter([*urls("busy", 300), *urls("fast", 300)]), per_host=4), []
        busy = [await queue.take() for _ in range(4)]  # these never get done
        assert all(one is not None and one[0].startswith("busy") for one in busy)
        for _ in range(300):
            taken = await queue.take()
            assert taken is not None
            keys.append(taken[0])
            queue.finish(taken[1])
        return keys

    keys = asyncio.run(asyncio.wait_for(work(), 10))
    assert keys == [key for key, _ in urls("fast", 300)]


def test_every_url_is_handed_out_once_and_no_host_has_too_many_at_work() -> None:
    todo = [*urls("a", 50), *urls("b", 7), *urls("c", 30), ("odd", "http://[::1")]
    taken: list[str] = []
    at_work, most = 0, 0

    async def lane(queue: UrlQueue) -> None:
        nonlocal at_work, most
        while (one := await queue.take()) is not None:
            taken.append(one[0])
            is_counted = one[0].startswith("a")
            at_work += is_counted
            most = max(most, at_work)
            await asyncio.sleep(0.001)
            at_work -= is_counted
            queue.finish(one[1])

    async def work() -> None:
        queue = UrlQueue(iter(todo), per_host=3)
        await asyncio.gather(*(lane(queue) for _ in range(16)))

    asyncio.run(asyncio.wait_for(work(), 10))
    assert sorted(taken) == sorted(key for key, _ in todo)
    assert most == 3


def test_an_empty_list_ends_all_lanes() -> None:
    async def work() -> list[object]:
        queue = UrlQueue(iter([]), per_host=1)
        return list(await asyncio.gather(*(queue.take() for _ in range(4))))

    assert asyncio.run(asyncio.wait_for(work(), 10)) == [None] * 4
