"""Writing files so that a kill or a full disk never destroys what was there; showing their names safely."""

import os
from pathlib import Path

from flexsparse.training.errors import RunError

_TEMPORARY = ".partial"
MAX_NAME, MAX_PATH = 255, 4096
"""Bytes that Linux takes, of one name and of a whole path."""


def check_path(option: str, given: str | Path) -> None:
    """Raise a `RunError` for a path that names nothing: an empty one (an unset variable), or one that is too long."""
    if not str(given):
        raise RunError(f"--{option} '' is empty: pass a path, or leave --{option} out")
    if len(os.fsencode(given)) >= MAX_PATH or any(len(os.fsencode(part)) > MAX_NAME for part in Path(given).parts):
        shown = printable(str(given)[:40])
        raise RunError(f"--{option} '{shown}...' has names of more than {MAX_NAME} bytes: pass a shorter path")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: a temporary file in the same folder, fsync, rename.

    Args:
        path: the file; replaced if it exists.
        data: its content.

    Raises:
        OSError: the write failed (a full disk, say); what `path` held before is untouched.
    """
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """`write_atomically` for what a resumed run writes again.

    Raises:
        RunError: it cannot be written.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        raise RunError(
            f"{str(path)!r} cannot be written ({error.strerror or error}): make room, then run again with --resume"
        ) from error


def printable(name: str) -> str:
    """A file's name for screens and pages: control characters and undecodable bytes are replaced."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files that an earlier, killed write of `path` left behind."""
    for leftover in path.parent.glob(f".{path.name}.*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
