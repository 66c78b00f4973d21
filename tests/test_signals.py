"""Ctrl-C and SIGTERM, sent to this very process or to a forked child."""

import os
import signal
import threading
import time

import pytest

from alignment.signals import GracefulStop, Stopped


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python runs handlers between two bytecodes


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 75)])
def test_the_first_signal_is_a_request(number, name, code):
    before = signal.getsignal(number)
    with GracefulStop() as stop:
        stop.check()
        assert (stop.requested, stop.exit_code) == (None, 0)
        send(number)
        assert (stop.requested, stop.exit_code) == (name, code)
        with pytest.raises(Stopped) as error:
            stop.check()
        assert (error.value.requested, error.value.exit_code) == (name, code)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert stop.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_after_sigterm_stops_at_once_and_repeated_sigterms_do_not():
    with GracefulStop() as stop:
        for _ in range(3):
            send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.requested == "SIGTERM"


def test_a_third_ctrl_c_ends_even_a_program_that_swallows_interrupts():
    pid = os.fork()
    if pid == 0:
        with GracefulStop():
            for _ in range(3):
                try:
                    send(signal.SIGINT)
                except KeyboardInterrupt:
                    continue
        os._exit(77)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT


def test_sigterm_after_ctrl_c_keeps_the_first_request():
    with GracefulStop() as stop:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.requested == "SIGINT"


def test_no_handlers_outside_the_main_thread():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def work():
        with GracefulStop() as stop:
            seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
            stop.request("SIGTERM")
            seen.append(stop.exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, 75]


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), GracefulStop():
        assert signal.getsignal(signal.SIGTERM) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
