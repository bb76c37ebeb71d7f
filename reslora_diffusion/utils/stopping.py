"""Being stopped although a launcher stands between this process and whoever asks.

`accelerate launch` starts the program as a process of its own. Told to stop, it ends without telling that process,
which would train on unattended. A process of a launcher therefore watches whether its parent is still there, and asks
itself to stop, as SIGTERM would, once it is not.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping

WATCH_EVERY = 0.5  # seconds
BY_A_LAUNCHER = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")  # in the environment of what they start
asked_to_stop = threading.Event()  # set by the first signal; a launcher that ends after it says nothing new


def started_by_a_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    return any(name in environment for name in BY_A_LAUNCHER)


def watch_parent() -> threading.Thread | None:
    """Ask this process to stop once the launcher that started it has ended.

    Returns the thread that watches; None where no launcher started this process. A program that was started from a
    shell goes on when the shell ends, as `nohup` wants it.
    """
    if os.name == "nt" or not started_by_a_launcher():
        return None
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_EVERY)
        if not asked_to_stop.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, name="watches the launcher", daemon=True)
    thread.start()
    return thread
