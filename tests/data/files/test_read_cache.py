import threading
import time

from jaxtrain.data.files.read_cache import Cache


def test_the_values_used_last_are_held():
    cache, loads = Cache(100), []

    def get(key):
        return cache.get(key, lambda: (loads.append(key) or key.upper(), 40))

    assert [get(key) for key in "abacab"] == list("ABACAB")
    assert loads == list("abcb")  # `c` made room by dropping `b`, which was used before `a`


def test_a_value_larger_than_the_cache_is_held_alone():
    cache = Cache(10)
    assert cache.get("a", lambda: (1, 5)) == 1 and cache.get("b", lambda: (2, 50)) == 2
    assert cache.peek("a") is None and cache.peek("b") == 2


def test_what_is_put_if_there_is_room_drops_nothing():
    cache = Cache(10)
    cache.put("a", 1, 6)
    cache.put("b", 2, 6, if_room=True)
    assert cache.peek("a") == 1 and cache.peek("b") is None


def test_threads_load_a_key_once():
    cache, loads = Cache(100), []

    def load():
        loads.append(1)
        time.sleep(0.05)
        return "value", 1

    threads = [threading.Thread(target=lambda: cache.get("key", load)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
