"""Waits that end on time: paced load must not be late by the event loop's own clock, which ticks in milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import os
import sys
import time
from collections.abc import Callable
from itertools import count

CLOCK_MONOTONIC = 1


class Pacer:
    """Wakes tasks of the running loop at moments of `time.perf_counter`.

    On Linux a timer of the kernel wakes them, some tenths of a millisecond late; elsewhere it is the loop's own, which
    may be a millisecond late. No task is woken early.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = count()
        self._timer = (_KernelTimer if sys.platform == "linux" else _LoopTimer)(self._loop, self._wake)

    async def until(self, due: float) -> None:
        """Wait until a moment; one that has passed does not wait."""
        left = due - time.perf_counter()
        if left > 0:
            future = self._loop.create_future()
            heapq.heappush(self._due, (due, next(self._numbers), future))
            if self._due[0][2] is future:
                self._timer.set(left)
            await future

    def close(self) -> None:
        """Wake nobody any more."""
        self._timer.close()

    def _wake(self) -> None:
        now = time.perf_counter()
        while self._due and self._due[0][0] <= now:
            future = heapq.heappop(self._due)[2]
            if not future.done():
                future.set_result(None)
        if self._due:
            self._timer.set(self._due[0][0] - now)


class _LoopTimer:
    """The loop's own; it may ring early, and more often than it was set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Ring after a time; the last one set counts."""
        self.close()
        self._handle = self._loop.call_later(seconds, self._ring)

    def close(self) -> None:
        """Ring no more."""
        if self._handle is not None:
            self._handle.cancel()


class _KernelTimer:
    """timerfd, which Python has from 3.13 on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._call("timerfd_create", CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        loop.add_reader(self._descriptor, self._on_readable)

    def set(self, seconds: float) -> None:
        """Ring after a time; the last one set counts."""
        nanoseconds = max(1, int(seconds * 1e9))  # 0 would stop it
        once = (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 1_000_000_000))
        self._call("timerfd_settime", self._descriptor, 0, once, None)

    def close(self) -> None:
        """Ring no more."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set anew since
            os.read(self._descriptor, 8)
        self._ring()

    def _call(self, name: str, *arguments: object) -> int:
        result = int(getattr(self._libc, name)(*arguments))
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")
        return result
