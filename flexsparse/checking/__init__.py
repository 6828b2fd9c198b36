"""Whether attention is computed right on this machine: `flexsparse check`."""

from flexsparse.checking.run import Outcome, check

__all__ = ["Outcome", "check"]
