"""Worker processes end when their parent does, in any way, and leave nothing behind."""

import gc
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, resource_tracker

# What a terminal or a launcher sends to all processes of a group at once.
_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def end_with_the_parent(worker: int, workers: int) -> None:
    """Makes this worker process end when its parent is gone, and not before.

    Signals of Ctrl-C, a closed terminal or a launcher go to the whole group, but only the
    parent handles them: it saves, for which it may still need a batch, and then ends the
    workers itself.

    The monitored pipe breaks however the parent ends, also by SIGKILL. (Linux can send a
    signal then, by PR_SET_PDEATHSIG, but treats the end of the thread that started the process
    as the end of the parent, and Grain starts workers in threads that end.)
    """
    for number in _OF_THE_GROUP:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:  # there is none where the function is called for itself
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)  # at once: the others of this process wait for the parent


def start_tracker() -> None:
    """Starts the process that cleans up shared memory, protected from signals.

    Python starts one before its first worker. It outlives the others, and removes what they
    left: so a signal to the whole group must not end it. Python makes it ignore Ctrl-C and
    SIGTERM; here the other two are blocked while it starts, which it inherits.
    """
    others = {signal.SIGHUP, signal.SIGQUIT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, others)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def free_shared_memory() -> None:
    """Frees what Grain's iterators, closed by now, still hold: batches that were not consumed.

    They are in reference cycles, some of which would stay until Python exits without a
    collection, and are freed by a thread of Grain's, for which this waits.
    """
    from grain._src.python.ipc import shared_memory_array

    gc.collect()
    pool = getattr(shared_memory_array.SharedMemoryArray, "_del_thread_pool", None)
    if pool is not None:
        pool.apply(int)  # does nothing, after what came before it
