"""The one exception that the demo raises for what its user can put right."""


class DemoError(Exception):
    """Bad input or a bad environment: one line that names the argument, its value and the remedy."""
