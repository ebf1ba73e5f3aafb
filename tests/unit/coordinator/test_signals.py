"""Every way in which a signal to a training process must, or must not, be heard."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import asyncio, json, os, select, signal, subprocess, sys, threading, time
from spotspeed.coordinator.signals import SignalListener

TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2

def heard(listener, timeout_s=5.0):
    poller = select.poll()
    poller.register(listener.fileno(), select.POLLIN)
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        poller.poll(left_s * 1000)
        if numbers := listener.drain():
            return numbers
    return []

def hit(number, pid=None):
    os.kill(pid or os.getpid(), number)

def tell(value):
    print(json.dumps(value), flush=True)
"""


def run(body: str, *, returncode: int = 0) -> object:
    """What the last line that `body` tells is, in a fresh interpreter."""
    script = PREAMBLE + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == returncode, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_signal_is_heard_while_the_main_thread_is_in_native_code_that_holds_on() -> None:
    # hashlib.pbkdf2_hmac stays in C for about a second and runs no Python handler meanwhile.
    result = run("""
        import hashlib
        handled_s = []
        signal.signal(TERM, lambda *_: handled_s.append(time.monotonic()))
        listener = SignalListener([TERM])
        heard_s = []
        def listen():
            heard(listener, 30)
            heard_s.append(time.monotonic())
        thread = threading.Thread(target=listen); thread.start()
        sent = subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -TERM {os.getpid()}"])
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 4_000_000)
        left_s = time.monotonic()
        sent.wait(); thread.join()
        tell([left_s - heard_s[0], handled_s[0] - heard_s[0]])
    """)
    heard_before_return_s, heard_before_handler_s = result
    assert heard_before_return_s > 0.05
    assert heard_before_handler_s > 0.05


def test_a_burst_is_latched_and_heard_once() -> None:
    assert run("""
        listener = SignalListener([TERM, USR1])
        for _ in range(5000): hit(TERM)
        hit(USR1)
        tell([heard(listener), listener.drain()])
    """) == [[15, 10], []]


def test_the_handler_that_was_there_is_called_too() -> None:
    assert run("""
        calls = []
        signal.signal(TERM, lambda number, frame: calls.append(number))
        listener = SignalListener([TERM])
        hit(TERM)
        tell([heard(listener), calls])
    """) == [[15], [15]]


def test_the_default_action_does_not_end_the_process() -> None:
    assert run("""
        listener = SignalListener([TERM, signal.SIGINT])
        hit(TERM); hit(signal.SIGINT)
        tell(sorted(heard(listener)))
    """) == [2, 15]


def test_a_handler_installed_later_does_not_stop_the_hearing() -> None:
    assert run("""
        listener = SignalListener([TERM])
        calls = []
        chain = lambda number, frame: (calls.append(number), ours(number, frame))
        ours = signal.signal(TERM, chain)
        hit(TERM)
        tell([heard(listener), calls, listener.rearm(), signal.getsignal(TERM) is not ours])
    """) == [[15], [15], True, True]


def test_a_signal_that_was_ignored_before_stays_ignored_and_is_named() -> None:
    assert run("""
        signal.signal(USR1, signal.SIG_IGN)
        listener = SignalListener([TERM, USR1])
        hit(USR1)
        listener.rearm(); hit(USR1); hit(TERM)
        tell([heard(listener), list(listener.unheard), signal.getsignal(USR1) == signal.SIG_IGN])
    """) == [[15], [10], True]


@pytest.mark.parametrize("action", ["SIG_IGN", "SIG_DFL"])
def test_a_later_ignore_or_default_is_taken_back_at_the_next_rearm(action: str) -> None:
    assert run(f"""
        listener = SignalListener([TERM])
        signal.signal(TERM, signal.{action})
        intact = listener.rearm()
        hit(TERM)
        tell([intact, heard(listener), listener.rearm()])
    """) == [False, [15], True]


def test_asyncio_and_the_listener_both_hear_after_a_rearm() -> None:
    assert run("""
        listener = SignalListener([TERM])
        async def main():
            loop = asyncio.get_running_loop()
            called = asyncio.Event()
            loop.add_signal_handler(USR2, called.set)
            taken = listener.rearm()
            hit(TERM)
            first = heard(listener)
            hit(USR2)
            while not called.is_set():
                listener.drain()
                await asyncio.sleep(0)
            return taken, first
        taken, first = asyncio.run(main())
        intact = listener.rearm()
        hit(TERM)
        tell([taken, first, intact, heard(listener)])
    """) == [False, [15], False, [15]]


def test_after_asyncio_took_the_descriptor_the_python_handler_still_reports() -> None:
    assert run("""
        listener = SignalListener([TERM])
        async def main():
            asyncio.get_running_loop().add_signal_handler(USR2, lambda: None)
        asyncio.run(main())
        lost = signal.set_wakeup_fd(-1)
        hit(TERM)
        tell([lost, heard(listener)])
    """) == [-1, [15]]


def test_asyncio_run_alone_changes_nothing() -> None:
    assert run("""
        listener = SignalListener([TERM])
        async def main():
            await asyncio.sleep(0)
        asyncio.run(main())
        intact = listener.rearm()
        hit(TERM)
        tell([intact, heard(listener)])
    """) == [True, [15]]


def test_who_had_the_wakeup_descriptor_before_is_fed_and_gets_it_back() -> None:
    assert run("""
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(write_fd)
        listener = SignalListener([TERM])
        hit(TERM); hit(TERM)
        first = heard(listener)
        fed = list(os.read(read_fd, 100))
        listener.close()
        tell([first, fed, signal.set_wakeup_fd(-1) == write_fd])
    """) == [[15], [15, 15], True]


def test_a_descriptor_number_that_was_reused_is_not_written_to(tmp_path: object) -> None:
    assert run(f"""
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
        signal.set_wakeup_fd(write_fd)
        listener = SignalListener([TERM])
        os.close(write_fd)
        victim = os.open({str(tmp_path)!r} + "/victim", os.O_RDWR | os.O_CREAT)
        assert victim == write_fd
        hit(TERM)
        first = heard(listener)
        listener.close()
        tell([first, os.fstat(victim).st_size, signal.set_wakeup_fd(-1)])
    """) == [[15], 0, -1]


def test_a_signal_to_a_forked_child_does_not_wake_the_parent() -> None:
    assert run("""
        listener = SignalListener([TERM])
        ready_read, ready_write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready_write, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(ready_read, 1)
        hit(TERM, child)
        _, status = os.waitpid(child, 0)
        woken = heard(listener, 0.2)
        hit(TERM)
        tell([os.WTERMSIG(status), woken, heard(listener)])
    """) == [15, [], [15]]


def test_a_signal_right_after_the_fork_never_reaches_the_parent() -> None:
    assert run("""
        listener = SignalListener([USR1])
        ends = []
        for _ in range(50):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            hit(USR1, child)
            ends.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
        tell([set(ends) == {10}, heard(listener, 0.1)])
    """) == [True, []]


def test_a_signal_to_the_parent_during_many_forks_is_heard() -> None:
    assert (
        run("""
        listener = SignalListener([USR1])
        missed = 0
        for _ in range(30):
            killer = subprocess.Popen(["kill", "-USR1", str(os.getpid())])
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            killer.wait()
            missed += heard(listener) != [10]
        tell(missed)
    """)
        == 0
    )


def test_a_forked_child_can_listen_for_itself() -> None:
    assert run("""
        listener = SignalListener([TERM])
        child = os.fork()
        if child == 0:
            own = SignalListener([TERM])
            hit(TERM)
            os._exit(0 if heard(own) == [15] else 1)
        _, status = os.waitpid(child, 0)
        tell([os.waitstatus_to_exitcode(status), heard(listener, 0.1)])
    """) == [0, []]


def test_off_the_main_thread_nothing_is_heard_and_that_is_said() -> None:
    assert run("""
        made = []
        thread = threading.Thread(target=lambda: made.append(SignalListener([TERM])))
        thread.start(); thread.join()
        listener = made[0]
        tell([list(listener.unheard), "main thread" in listener.unheard[TERM],
              listener.drain(), listener.rearm(), signal.getsignal(TERM) == signal.SIG_DFL])
        listener.close()
    """) == [[15], True, [], True, True]


def test_close_restores_what_was_found_and_the_signal_kills_again() -> None:
    assert run(
        """
        def mine(number, frame): pass
        signal.signal(USR1, mine)
        listener = SignalListener([TERM, USR1])
        listener.close(); listener.close()
        tell([signal.getsignal(USR1) is mine, signal.set_wakeup_fd(-1)])
        hit(TERM)
    """,
        returncode=-15,
    ) == [True, -1]


def test_a_listener_closed_off_the_main_thread_does_not_swallow_sigterm() -> None:
    assert (
        run(
            """
        listener = SignalListener([TERM])
        thread = threading.Thread(target=listener.close)
        thread.start(); thread.join()
        tell("closed")
        hit(TERM)
        time.sleep(10)
    """,
            returncode=-15,
        )
        == "closed"
    )


def test_a_signal_heard_before_our_handler_was_wrapped_is_not_swallowed_after_close() -> None:
    assert (
        run(
            """
        listener = SignalListener([TERM])
        ours = signal.getsignal(TERM)
        signal.signal(TERM, lambda number, frame: ours(number, frame))
        listener.close()
        tell("closed")
        hit(TERM)
        time.sleep(10)
    """,
            returncode=-15,
        )
        == "closed"
    )


def test_two_listeners_hear_the_same_signal_and_close_in_any_order() -> None:
    assert run("""
        first, second = SignalListener([TERM, USR1]), SignalListener([TERM])
        hit(TERM)
        both = [heard(first), heard(second)]
        first.rearm(); second.rearm()
        first.close()
        hit(TERM)
        rest = heard(second)
        second.close()
        tell([both, rest, signal.getsignal(TERM) == signal.SIG_DFL, signal.set_wakeup_fd(-1)])
    """) == [[[15], [15]], [15], True, -1]


def test_a_native_handler_installed_later_is_noticed() -> None:
    assert run("""
        import ctypes, logging
        said = []
        class Catch(logging.Handler):
            def emit(self, record): said.append(record.getMessage())
        logging.getLogger("spotspeed").addHandler(Catch())
        listener = SignalListener([TERM])
        listener.rearm()
        quiet = list(said)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(TERM, ctypes.cast(libc.abs, ctypes.c_void_p))
        deadline_s = time.monotonic() + 10
        while not said and time.monotonic() < deadline_s:
            listener.rearm()
            time.sleep(0.1)
        tell([quiet, "SIGTERM" in said[0] and "native" in said[0]])
    """) == [[], True]


def test_rearming_is_cheap_enough_for_every_step() -> None:
    microseconds = run("""
        listener = SignalListener([TERM, USR1])
        costs = []
        for _ in range(200):
            begin = time.perf_counter()
            for _ in range(10): listener.rearm()
            costs.append((time.perf_counter() - begin) / 10)
        tell(sorted(costs)[100] * 1e6)
    """)
    assert isinstance(microseconds, float)
    assert microseconds < 50
