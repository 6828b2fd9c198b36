"""The output folder of a run: refused if it exists, unless told to continue or to replace."""

from pathlib import Path

from flexsparse.training.errors import RunError
from flexsparse.training.files import check_path


def check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Checks, before any work and without touching the disk, that a run may write to a folder.

    Args:
        folder: where the run writes.
        resume: continue the run that is there.
        force: replace the run that is there.

    Raises:
        RunError: both flags; the folder exists and neither flag is given; nothing to resume; it is a file.
    """
    check_path("out", folder)
    where = f"output folder {str(folder)!r}"
    if resume and force:
        raise RunError("--resume and --force exclude each other: continue the run, or replace it")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{where} is a file: pass another --name or --out")
    if resume and not folder.is_dir():
        raise RunError(f"{where} does not exist, there is nothing to resume: leave out --resume")
    if folder.is_dir() and not (resume or force):
        raise RunError(f"{where} exists: continue with --resume, replace it with --force, or pass another --name")


def check_name(name: str) -> None:
    """Raise a `RunError` for a run's name that is no folder's."""
    check_path("name", name)
    if name in (".", "..") or Path(name).name != name:
        raise RunError(f"--name {name!r} is no folder name: pass one without slashes, and the place with --out")
