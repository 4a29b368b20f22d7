"""What a report says of the machine that it was made on."""

import datetime
import importlib.metadata
import os
import pathlib


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


def load_average(when):
    """Return the load average of the last minute, in words."""
    return f"load average {os.getloadavg()[0]:.1f} {when}"
