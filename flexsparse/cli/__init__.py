"""The command line: `flexsparse info`, `check`, `demo`, `finetune`, `inspect`, `plan`. Nothing in the package imports it."""

import sys


def main() -> None:
    """Runs the command line; a missing dependency of the extra `demo` is one line, not a traceback."""
    try:
        from flexsparse.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "flexsparse":
            raise
        print(
            f"error: the package {error.name!r} is missing: run `pip install 'flexsparse[demo]'`",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()
