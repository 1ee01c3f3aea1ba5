"""The signals by which a cluster tells a job that it has to go: noted when they come, and answered after a step."""

import signal
import threading

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class _Asked:
    """What this process was asked by a signal, which belongs to no training in it."""

    signal = 0


def _ask(number, frame):
    _Asked.signal = number


class Signals:
    """Whether a training listens, and what it has heard."""

    def __init__(self):
        self._listening = False

    @property
    def asked(self):
        """The number of the signal that has come, or 0."""
        return _Asked.signal

    def listen(self):
        """From now on SIGTERM and SIGUSR1 do not end the process; where signals cannot be had, nothing happens."""
        if not self._listening and threading.current_thread() is threading.main_thread():
            self._listening = True
            for number in _SIGNALS:
                if signal.getsignal(number) == signal.SIG_DFL:  # else somebody has other plans for it
                    signal.signal(number, _ask)

    def forget(self):
        """What was asked is being done."""
        _Asked.signal = 0

    def leave(self):
        """Signals have their old meaning again, also one that came and was not answered."""
        if self._listening:
            self._listening = False
            for number in _SIGNALS:
                if signal.getsignal(number) == _ask:
                    signal.signal(number, signal.SIG_DFL)
            asked = self.asked
            self.forget()
            if asked:
                signal.raise_signal(asked)
