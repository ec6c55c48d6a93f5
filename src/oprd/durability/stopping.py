"""SIGTERM and Ctrl-C as requests: what is under way is finished and saved, and the process ends (code 0; 130 on Ctrl-C)."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

# SLURM's --signal=USR1@120 comes this way; SIGTERM is what everybody else sends before SIGKILL.
OBEYED = ("SIGTERM", "SIGUSR1", "SIGINT")
CONTINUES = "the same command continues"  # the end of a message of `Stopped`
TOLD = {"SIGINT": "Ctrl-C"}
INTERRUPTED = 130  # as shells have it, so that a loop around the command ends too
ECHO_SECONDS = 3.0  # a launcher and its workers often get one signal each, and the launcher passes its own on


class Stopped(SystemExit):
    """A signal has been obeyed and nothing is lost. Left alone, the process ends with exit code 0, or 130 on Ctrl-C. (Processes
    of a launcher end with 0: it would take anything else for a failure.)

    Not an ``Exception``, so that no library takes it for a failure of its own.
    """

    def __init__(self, message: str) -> None:
        is_interrupted = SIGNALS.received == TOLD["SIGINT"] and not _is_launched()
        super().__init__(INTERRUPTED if is_interrupted else 0)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Signals:
    """What has been asked of this process. While `held`, a signal is only noted; otherwise it raises `Stopped` at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at, self._depth, self._process = 0.0, 0, None

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Handlers in place. Off the main thread, where Python allows none, nothing changes."""
        if threading.current_thread() is not threading.main_thread() or self._process is not None:
            yield
            return
        self.received, self._depth, self._process = None, 0, os.getpid()
        before = {}
        for name in OBEYED:
            number = getattr(signal, name, None)
            # Somebody else's SIGUSR1 (a profiler's, a debugger's) stays theirs; a SIGINT that nohup ignores stays ignored.
            nobodys = (signal.SIG_DFL, signal.default_int_handler)
            if number is not None and (name == "SIGTERM" or signal.getsignal(number) in nobodys):
                before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
            self._process = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals of this block are seen at its own points, with `asked`."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def held_among(self, processes: int) -> AbstractContextManager:
        """`held`, if there are others: one that ended by itself would leave them waiting."""
        return self.held() if processes > 1 else nullcontext()

    def _on_signal(self, number: int, _) -> None:
        if number == signal.SIGINT and os.getpid() != self._process:
            return  # a terminal sends it to forked workers too, and what is under way needs them
        is_echo = self.received is not None and time.monotonic() - self._at < ECHO_SECONDS
        is_echo &= number != signal.SIGINT or _is_launched()  # nobody passes on what a terminal sends to all
        if os.getpid() != self._process or (self.received is not None and not is_echo):
            signal.signal(number, signal.SIG_DFL)  # a forked worker, or a second request: at once
            os.kill(os.getpid(), number)
            return
        if is_echo:
            return
        name = signal.Signals(number).name
        self.received, self._at = TOLD.get(name, name), time.monotonic()
        if not self._depth:
            raise Stopped(f"stopped by {self.received} with nothing to save; {CONTINUES}")
        logger.info(f"{self.received}: finishing what is under way; a second one stops at once.")

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process has been asked to stop. Every process must call it; all get the same answer."""
        if self._process is None:
            return False
        asked = any_process(self.received is not None, accelerator)
        if asked and self.received is None:  # its own signal may still be on its way
            self.received, self._at = "SIGTERM", time.monotonic()
        return asked


def _is_launched() -> bool:
    return "LOCAL_RANK" in os.environ


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether it is true on any process. Every process must call it."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor([float(flag)], device=accelerator.device), reduction="sum").item())


@contextmanager
def said_once(afterwards: str = CONTINUES) -> Iterator[None]:
    """Tell the user what `Stopped` means, where it leaves a command; ``afterwards`` in place of "the same command continues"."""
    try:
        yield
    except Stopped as stopped:
        logger.warning(str(stopped).replace(CONTINUES, afterwards))
        raise


SIGNALS = Signals()
