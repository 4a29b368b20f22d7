"""The folders of a served model: one a version, each there whole or not."""

import pathlib
import re

from keras_ptloss._checks import fail


def check_is_new(directory: pathlib.Path, version: int) -> None:
    """Require a version that is not there yet."""
    if version in versions(directory):
        fail("version", f"a number that is not yet in {directory}", version)


def versions(directory: pathlib.Path) -> list[int]:
    """Return the versions that a server would find: 7, 0007, not 7.old."""
    if not directory.is_dir():
        return []
    return [
        int(entry.name)
        for entry in directory.iterdir()
        if re.fullmatch("[0-9]+", entry.name)
    ]


def publish(
    written: pathlib.Path, directory: pathlib.Path, version: int | None
) -> pathlib.Path:
    """Give the written folder its number, in one step."""
    while True:
        number = version or max(versions(directory), default=0) + 1
        check_is_new(directory, number)
        target = directory / str(number)
        try:
            # A folder that is there, made meanwhile by another export, is an
            # error here and stays as it is.
            return written.rename(target)
        except OSError:
            if not target.exists():
                raise
