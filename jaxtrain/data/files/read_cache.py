"""A cache in memory, bounded in bytes: blocks of remote files, decoded pieces of Parquet, decompressed segments."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

CACHE_BYTES = 208 << 20  # of all files of the process together


class Cache:
    """The most recently used values, up to `max_bytes` bytes of them. Safe to use from several threads."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._bytes = max_bytes, 0
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[Hashable, threading.Lock] = {}
        self._numbers = itertools.count()

    def number(self) -> int:
        """A number for the keys of one file, which no other file has."""
        return next(self._numbers)

    def get(self, key: Hashable, load: Callable[[], tuple[Any, int]]) -> Any:
        """The value of `key`. `load` returns it with its size in bytes; threads that ask for one key load it once."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            value = self.peek(key)
            if value is None:
                value, size = load()
                self.put(key, value, size)
        with self._lock:
            self._loading.pop(key, None)
        return value

    def peek(self, key: Hashable) -> Any:
        """The value of `key` if it is held, else None."""
        with self._lock:
            return self._held.get(key, (None,))[0]

    def put(self, key: Hashable, value: Any, size: int, *, if_room: bool = False) -> None:
        """Hold a value. The least recently used ones are dropped for it, unless it is held only `if_room` is left."""
        with self._lock:
            if key in self._held or (if_room and self._bytes + size > self._max_bytes):
                return
            self._held[key] = value, size
            self._bytes += size
            while self._bytes > self._max_bytes and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1][1]


CACHE = Cache(CACHE_BYTES)
