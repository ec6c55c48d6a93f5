import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from accelerate import Accelerator

from oprd.durability import stopping
from oprd.durability.stopping import CONTINUES, SIGNALS, Stopped, said_once


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_outside_of_a_held_block_a_signal_ends_it_at_once(accelerator):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught, SIGNALS.obeyed():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        pytest.fail("went on")
    assert caught.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert not SIGNALS.asked(accelerator)  # nobody obeys signals any more


def test_ctrl_c_ends_it_with_the_code_that_shells_expect(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    for launched, code in ((False, 130), (True, 0)):  # a launcher would take 130 for a failure
        monkeypatch.setenv("LOCAL_RANK", "0") if launched else monkeypatch.delenv("LOCAL_RANK", raising=False)
        with pytest.raises(Stopped, match="stopped by Ctrl-C") as caught, SIGNALS.obeyed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            pytest.fail("went on")
        assert caught.value.code == code
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_not_for_forked_workers_and_an_ignored_one_stays_ignored(accelerator):
    with SIGNALS.obeyed(), SIGNALS.held():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup leaves it
    try:
        with SIGNALS.obeyed(), SIGNALS.held():
            os.kill(os.getpid(), signal.SIGINT)
            assert not SIGNALS.asked(accelerator)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_in_a_held_block_it_is_noted(accelerator, number):
    with SIGNALS.obeyed(), SIGNALS.held():
        assert not SIGNALS.asked(accelerator)
        os.kill(os.getpid(), number)
        assert SIGNALS.asked(accelerator)
        assert SIGNALS.received == number.name
        os.kill(os.getpid(), number)  # the launcher's echo of the same request
    with SIGNALS.obeyed():
        assert not SIGNALS.asked(accelerator)  # the next run starts without


def test_without_obeyed_nothing_is_touched(accelerator):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with SIGNALS.held():
        assert not SIGNALS.asked(accelerator)


def test_somebody_elses_handler_of_usr1_stays(accelerator):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    try:
        with SIGNALS.obeyed(), SIGNALS.held():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert got == [1] and not SIGNALS.asked(accelerator)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_stopped_is_told_and_no_library_swallows_it(caplog):
    with caplog.at_level("WARNING"), pytest.raises(SystemExit) as caught, said_once():
        try:
            raise Stopped("stopped by SIGTERM at step 3")
        except Exception:
            pytest.fail("taken for a failure")
    assert caught.value.code == 0
    assert [record.getMessage() for record in caplog.records] == ["stopped by SIGTERM at step 3"]


def test_a_command_that_does_not_continue_does_not_promise_to(caplog):
    with caplog.at_level("WARNING"), pytest.raises(SystemExit), said_once("it begins anew"):
        raise Stopped(f"stopped by SIGTERM at step 3; {CONTINUES}")
    assert [record.getMessage() for record in caplog.records] == ["stopped by SIGTERM at step 3; it begins anew"]


def script(body):
    return [sys.executable, "-c", textwrap.dedent(body)]


def test_a_second_ctrl_c_ends_it_at_once():
    process = subprocess.Popen(
        script("""
        import signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        from oprd.durability.stopping import SIGNALS
        with SIGNALS.obeyed(), SIGNALS.held():
            print("ready", flush=True)
            while SIGNALS.received is None:
                time.sleep(0.01)
            print(SIGNALS.received, flush=True)
            time.sleep(60)
        """),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "Ctrl-C\n"
    process.send_signal(signal.SIGINT)  # no launcher passes it on, so this is the user again
    assert process.wait(10) == -signal.SIGINT


def test_a_second_request_ends_it_at_once():
    process = subprocess.Popen(
        script("""
        import time
        from oprd.durability.stopping import SIGNALS
        with SIGNALS.obeyed(), SIGNALS.held():
            print("ready", flush=True)
            for _ in range(600):
                time.sleep(0.1)
        """),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(stopping.ECHO_SECONDS + 0.5)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


def test_a_forked_worker_dies_as_it_would_have():
    with SIGNALS.obeyed(), SIGNALS.held():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_processes_agree_though_only_one_was_asked(tmp_path):
    """Two processes, the signal reaches one: both stop at the same step."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        textwrap.dedent("""
        import os, signal, sys
        from accelerate import Accelerator
        from oprd.durability.stopping import SIGNALS
        accelerator = Accelerator(cpu=True)
        with SIGNALS.obeyed(), SIGNALS.held():
            for step in range(1, 100):
                if step == 4 and accelerator.process_index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if SIGNALS.asked(accelerator):
                    break
        with open(f"{sys.argv[1]}/{accelerator.process_index}", "w") as file:
            file.write(f"{step} {SIGNALS.received}")
        accelerator.end_training()
        """)
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(worker), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4 SIGTERM", "4 SIGTERM"]
