"""Errands of the engine thread: a result or an error reaches the one who asked, unless that one has given up."""

from __future__ import annotations

import pytest

from unetc.errors import BatcherStopped
from unetc.runtime.batching.orders import Errand


def test_the_result_reaches_the_one_who_asked() -> None:
    errand = Errand(lambda: 7)
    errand.run()
    assert errand.future.result(0) == 7


def test_an_error_reaches_the_one_who_asked_and_not_the_engine_thread() -> None:
    error = ValueError("no such image")

    def work() -> None:
        raise error

    errand = Errand(work)
    errand.run()
    assert errand.future.exception(0) is error


def test_an_errand_that_was_given_up_is_not_run() -> None:
    ran: list[int] = []
    errand = Errand(lambda: ran.append(1))
    assert errand.future.cancel()
    errand.run()
    assert ran == []
    assert errand.future.cancelled()


def test_an_errand_that_was_given_up_does_not_fail() -> None:
    errand = Errand(lambda: 7)
    assert errand.future.cancel()
    errand.fail(BatcherStopped("the engine thread has ended."))
    assert errand.future.cancelled()


def test_an_errand_that_waits_at_the_end_fails() -> None:
    errand = Errand(lambda: 7)
    stopped = BatcherStopped("the engine thread has ended.")
    errand.fail(stopped)
    with pytest.raises(BatcherStopped) as raised:
        errand.future.result(0)
    assert raised.value is stopped
