"""The output folder of a run: refused if it exists, unless told to continue or to replace."""

from pathlib import Path

from flexsparse.demo.errors import DemoError

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.json"
REPORT = "report.html"


def check_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Checks, before any work and without touching the disk, that a run may write to a folder.

    Args:
        folder: where the run writes.
        resume: continue the run that is there.
        force: replace the run that is there.

    Raises:
        DemoError: both flags; the folder exists and neither flag is given; nothing to resume; it is a file.
    """
    where = f"output folder {str(folder)!r}"
    if resume and force:
        raise DemoError("--resume and --force exclude each other: continue the run, or replace it")
    if folder.exists() and not folder.is_dir():
        raise DemoError(f"{where} is a file: pass another --name or --out")
    if resume and not folder.is_dir():
        raise DemoError(f"{where} does not exist, there is nothing to resume: leave out --resume")
    if folder.is_dir() and not (resume or force):
        raise DemoError(f"{where} exists: continue with --resume, replace it with --force, or pass another --name")


def open_folder(folder: Path, *, resume: bool, force: bool) -> Path | None:
    """Makes a checked output folder ready; with `force` the files of an old run go, all others stay.

    Returns:
        The checkpoint to continue from, or None to start afresh.

    Raises:
        DemoError: the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force:
            for name in (CHECKPOINT, METRICS, REPORT):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise DemoError(
            f"output folder {str(folder)!r} cannot be made ({error.strerror}): pass another --out"
        ) from error
    checkpoint = folder / CHECKPOINT
    return checkpoint if resume and checkpoint.is_file() else None
