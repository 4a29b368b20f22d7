"""A script that writes a store, and is killed again and again.

`python writer_to_kill.py KIND FOLDER STORES` forks, as imports take long: each
child makes `FOLDER/<number>/store` by `write` or by `from_array`, and is killed
by SIGKILL at a random moment, two for each store. Files are small, so that
kills come at every stage. Prints how many were killed before they had ended.
"""

import os
import random
import signal
import sys
import time

import numpy as np

from keras_ptloss.soft_labels import SoftLabels, journal

journal.FILE_BYTES = 30_000
ROWS = 4000
PROBABILITIES = np.random.default_rng(0).dirichlet(np.ones(10), ROWS)


def teacher(batch):
    """Answer, by the examples' numbers."""
    return PROBABILITIES[batch]


def run(kind, folder):
    """Make or complete the store."""
    path = os.path.join(folder, "store")
    if kind == "write":
        SoftLabels.write(teacher, np.arange(ROWS), path, verbose=0)
    else:
        SoftLabels.from_array(PROBABILITIES, path, inputs=np.arange(ROWS))


def kill(kind, folder, seed):
    """Kill two calls, one after the other; return how many had not ended."""
    draw = random.Random(seed)
    killed = 0
    for _ in range(2):
        child = os.fork()
        if not child:
            run(kind, folder)
            os._exit(0)
        time.sleep(draw.expovariate(10))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    return killed


if __name__ == "__main__":
    kind, folder, stores = sys.argv[1:]
    killed = 0
    for number in range(int(stores)):
        os.mkdir(os.path.join(folder, str(number)))
        killed += kill(kind, os.path.join(folder, str(number)), number)
    print(killed)
