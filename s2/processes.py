"""Worker processes: how each begins, and that it ends with its parent."""

import multiprocessing
import os
import signal
import threading


def begin_worker(threads: int) -> None:
    """The initializer of a started (not forked) worker, whose tokenizers take so many threads. It leaves interrupts to
    its parent, and ends when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
