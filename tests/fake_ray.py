"""As much of Ray as `RaySampler` uses, with threads as actors that tests can kill and stop at chosen moments."""

import threading
import time
from types import SimpleNamespace


class RayActorError(Exception):
    pass


class GetTimeoutError(Exception):
    pass


class Result:
    """What a call returns: done once it has a value or an error."""

    def __init__(self):
        self.done, self.value, self.error = threading.Event(), None, None

    def finish(self, value=None, error=None):
        if not self.done.is_set():
            self.value, self.error = value, error
            self.done.set()


class Stream:
    """The results of a generator; the one after the last has the error StopIteration."""

    def __init__(self):
        self.results, self.at = [Result()], 0

    def finish(self, value=None, error=None):
        last = self.results[-1]
        if error is None:
            self.results.append(Result())
        last.finish(value, error)

    @property
    def done(self):
        return self.results[self.at].done

    def __next__(self):
        result = self.results[self.at]
        result.done.wait()
        if isinstance(result.error, StopIteration):
            raise StopIteration
        self.at += 1
        return result


class Actor:
    """A handle. While it is stopped its calls do not go on; when it is killed those without a result fail."""

    def __init__(self, made, *args):
        self._going, self._open, self._killed = threading.Event(), [], False
        self._going.set()
        self._made = made(*args)

    def stop(self):
        self._going.clear()

    def kill(self):
        self._killed = True
        for result in self._open:
            result.finish(error=RayActorError())

    def _call(self, name, args, result):
        self._open.append(result)
        if self._killed:
            self.kill()
        threading.Thread(target=self._run, args=(name, args, result), daemon=True).start()
        return result

    def _run(self, name, args, result):
        try:
            self._going.wait()
            value = getattr(self._made, name)(*args)
            if isinstance(result, Stream):
                for each in value:
                    self._going.wait()
                    if self._killed:
                        return
                    result.finish(each)
                result.finish(error=StopIteration())
            else:
                self._going.wait()
                result.finish(value)
        except Exception as error:
            result.finish(error=error)

    def __getattr__(self, name):
        return SimpleNamespace(
            remote=lambda *args: self._call(name, args, Result()),
            options=lambda num_returns: SimpleNamespace(remote=lambda *args: self._call(name, args, Stream())),
        )


class FakeRay:
    exceptions = SimpleNamespace(RayActorError=RayActorError, GetTimeoutError=GetTimeoutError)

    def remote(self, **options):
        return lambda cls: SimpleNamespace(remote=lambda *args: Actor(cls, *args))

    def put(self, value):
        return value

    def kill(self, actor):
        actor.kill()

    def get(self, result, timeout=None):
        if not result.done.wait(timeout):
            raise GetTimeoutError
        if result.error is not None:
            raise result.error
        return result.value

    def wait(self, calls, num_returns=1, timeout=None):
        assert calls and len({id(call) for call in calls}) == len(calls) >= num_returns
        end = time.monotonic() + timeout
        while (count := sum(call.done.is_set() for call in calls)) < num_returns and time.monotonic() < end:
            time.sleep(0.001)
        ready = [call for call in calls if call.done.is_set()][: max(num_returns, 0)] if count else []
        return ready, [call for call in calls if call not in ready]
