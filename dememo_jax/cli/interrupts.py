"""Ctrl-C: the process ends at once with one sentence, whatever it is at."""

import os
import signal
import sys
import threading
from typing import Any


def end_at_once(code: int, sentence: str) -> None:
    """From now on SIGINT writes the sentence to the standard error and ends this process with the code.

    Nothing is unwound: a run folder is whole whenever its process dies, while an exception leaves a compiled program
    only when that ends, and then tears down threads that are still at work. A thread waits for the signal, since the main
    one may be inside a compiled program for seconds. Nothing happens where SIGINT is ignored, as under `nohup`, and in other
    threads than the main one.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        return

    def leave(*_: Any) -> None:
        try:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
            os.write(2, sentence.encode())
        except (OSError, ValueError, AttributeError):
            pass  # closed: nobody listens
        finally:
            os._exit(code)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, leave)  # should a library take the pipe's place, the main thread leaves when it can
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(reading, 1)[0] != signal.SIGINT:
            pass
        leave()

    threading.Thread(target=wait, name="interrupts", daemon=True).start()
