"""Permits count what all calls hold, and what each client does."""

import pytest

from jaxtrain.serve.limits import Admission, Limits, Permits, RefusedError


def test_permits_are_given_back_and_count_for_each_client():
    admission = Admission(Limits(max_queue=5, max_client_queue=3, max_bodies=10))
    one, two = Permits(admission, "one"), Permits(admission, "two")
    one.acquire(3)
    for permits, count, status in ((one, 1, 429), (two, 3, 503)):
        with pytest.raises(RefusedError) as error:
            permits.acquire(count)
        assert error.value.status == status
    one.hold_bytes(10)
    with pytest.raises(RefusedError, match="too many long calls"):
        two.hold_bytes(1)
    one.release()
    two.hold_bytes(10)
    two.acquire(3)
    two.release()
    assert admission.samples == admission.body_bytes == 0 and not admission.samples_of
