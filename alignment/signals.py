"""Stopping well: the step that is under way is abandoned or completed, never half saved."""

import signal
import threading
from types import FrameType
from typing import Any, Literal, Self, TypeAlias

StopSignal: TypeAlias = Literal["SIGINT", "SIGTERM"]
EXIT_CODES: dict[StopSignal, int] = {"SIGINT": 130, "SIGTERM": 75}
"""130 is the shell's code for Ctrl-C. 75 (``EX_TEMPFAIL``) tells a scheduler that the same command would go on."""


class Stopped(Exception):
    """Raised by :meth:`GracefulStop.check` once a stop was asked for: save the last completed step and leave."""

    def __init__(self, requested: StopSignal) -> None:
        super().__init__(f"stopped by {requested}")
        self.requested: StopSignal = requested
        self.exit_code = EXIT_CODES[requested]


class GracefulStop:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop sees at its next :meth:`check`.

    A Ctrl-C after that raises ``KeyboardInterrupt`` where the program stands, and one more kills it even where no
    Python code runs. Further SIGTERMs change nothing: schedulers repeat them. Leaving the context puts the earlier
    handlers back.

    Only a process's main thread can handle signals. Elsewhere nothing is installed, and whoever owns the main thread
    may call :meth:`request`.
    """

    def __init__(self) -> None:
        self.requested: StopSignal | None = None
        self._before: dict[StopSignal, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in EXIT_CODES:
                self._before[name] = signal.signal(signal.Signals[name], self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            name, handler = self._before.popitem()
            # None: installed by C code, which Python can neither call nor put back.
            signal.signal(signal.Signals[name], signal.SIG_DFL if handler is None else handler)

    def request(self, name: StopSignal) -> None:
        """Asks for a stop as that signal would; the first request decides the exit code."""
        self.requested = self.requested or name

    def check(self) -> None:
        """Raises :class:`Stopped` if a stop was asked for."""
        if self.requested is not None:
            raise Stopped(self.requested)

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 0, 130 (Ctrl-C) or 75 (SIGTERM)."""
        return EXIT_CODES[self.requested] if self.requested else 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.request("SIGINT" if number == signal.SIGINT else "SIGTERM")
