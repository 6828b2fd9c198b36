"""The one exception that commands raise for what their user can put right."""


class RunError(Exception):
    """Bad input or a bad environment: one line that names the argument, its value and the remedy."""
