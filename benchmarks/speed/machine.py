"""What benchmarks share: the machine, a process's memory and time, a report."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time


def machine(packages, note):
    """Return a sentence on the processor, the versions and the day.

    Args:
        packages: names of distributions whose versions count.
        note: on other work, `load_average("at the end")` for example.
    """
    cpu = "unknown processor"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
    versions = [f"{n} {importlib.metadata.version(n)}" for n in packages]
    return (
        f"{cpu}, {os.cpu_count()} cores, {note}; {', '.join(versions)}; "
        f"{datetime.date.today()}."
    )


def resident(field):
    """Return a field of this process's `/proc/self/status` in MiB.

    `VmHWM` is the peak; `resource.getrusage` starts its own from what the
    parent had, since it counts the time between fork and exec.
    """
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measured(steps):
    """Return the seconds of an iterator's work, and the MiB its peak rises by.

    Args:
        steps: An iterator that prepares before its first step, untimed.
    """
    next(steps)
    before, began = resident("VmHWM"), time.perf_counter()
    for _ in steps:
        pass
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": resident("VmHWM") - before}


def in_a_process(script, options):
    """Run a script with options, in a process of its own; return its JSON.

    Args:
        script: Its path.
        options: `{"top_k": 16}` is `--top-k 16`; None is left out.
    """
    command = [sys.executable, script]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def written(*paths):
    """Return the bytes of files, and of all files in folders."""
    files = [f for p in paths for f in (p.rglob("*") if p.is_dir() else [p])]
    return sum(f.stat().st_size for f in files if f.is_file())


def publish(lines, output):
    """Print a report's lines, and append them to a file if there is one."""
    text = "\n".join([*lines, "", ""])
    print(text)
    if output:
        with output.open("a", encoding="utf-8") as file:
            file.write(text)


def load_average(when):
    """Return the load average of the last minute, in words."""
    return f"load average {os.getloadavg()[0]:.1f} {when}"
