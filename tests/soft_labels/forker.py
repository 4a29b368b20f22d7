"""Writers in processes of their own, which tests kill."""

import os
import signal
import subprocess
import sys
import textwrap
import time

from stores import ENVIRONMENT

# One process imports the package; each line from stdin makes it fork a writer,
# whose pid it prints. So twenty writers cost one import. JAX is the backend
# that imports fastest; nothing is computed with it.
FORKER = textwrap.dedent(
    """
    import os, signal, sys, time
    import numpy as np

    def write(path, log, pause, crash_at, size):
        calls = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == crash_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call

        if crash_at:
            for name in ("fsync", "replace", "rename", "pwrite", "mkdir"):
                setattr(os, name, counted(getattr(os, name)))

        def answer(rows):
            time.sleep(pause)
            os.write(log_file, b"".join(b"%d " % row for row in rows))

        log_file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        write_store(path, answer, size)

    while line := sys.stdin.readline():
        path, log, pause, crash_at, size = line.split()
        pid = os.fork()
        if pid == 0:
            write(path, log, float(pause), int(crash_at), int(size))
            os._exit(0)
        print(pid, flush=True)
        # Not before it is asked to, so that the pid stays the writer's.
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    """
)


class Forker:
    """Starts writers, one at a time.

    Args:
        code: Defines `write_store(path, answer, size)`, whose teacher calls
            `answer` with the numbers of the rows that it is asked for.
    """

    def __init__(self, code):
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code) + FORKER],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, path, log, pause=0.0, crash_at=0, size=5):
        self.process.stdin.write(f"{path} {log} {pause} {crash_at} {size}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def killed_after(self, seconds, path, log, **options):
        """Start a writer and kill it; return how it ended, 0 if sooner."""
        pid = self.start(path, log, **options)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return self.wait()


def forking(code):
    """What a fixture yields: a `Forker`, which must end well."""
    forker = Forker(code)
    yield forker
    forker.process.communicate()
    assert forker.process.returncode == 0


def asked_rows(log):
    return [int(row) for row in log.read_text().split()] if log.exists() else []
