"""The error of graphs; here, as what is below the passes raises it too."""


class RewriteError(RuntimeError):
    """A graph whose attention cannot be made sparse as asked; the message says what was seen and the remedy."""
