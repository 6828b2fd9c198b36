"""What stands before a number: a contender's results against float64 on some heads, poisoned memory underneath."""

from __future__ import annotations

from bench.suite.contender import Contender
from flexsparse.checking.tolerance import complaint, poison, rms

MOST_RELATIVE = 0.02
"""RMS error over RMS that others' kernels and a whole attention may have: half precision makes under 0.01, a lost tile 0.1."""
MOST_FLOAT32 = 1e-3
MOST_TWICE = 0.2
"""What twice the error of a reference may allow at most: ten layers make 1 to 2 %, a gradient that is not there 100 %."""


def verdict(contender: Contender) -> tuple[dict[str, float], str | None]:
    """Relative errors by name, and what is wrong, None where nothing is.

    Our own kernels are held to `complaint`: twice the error of float32 rounded to the same dtype. Others
    (which round more in between) to `MOST_RELATIVE`, or to twice the reference's error where that is more: a whole model's.
    """
    assert contender.results is not None and contender.expected is not None
    expected = contender.expected()
    found = contender.results()
    sizes = [(x.shape, x.dtype, x.device) for x in found.values()]
    del found
    for shape, dtype, device in sizes:
        poison(shape, dtype, device)
    found = contender.results()
    errors: dict[str, float] = {}
    wrong = None
    for name, exact in expected.exact.items():
        if name not in found:
            return errors, f"gives no {name}"
        whole, reference = found[name], expected.reference[name]
        own = expected.take(whole)
        if own.shape != exact.shape:
            return errors, f"{name} is {tuple(own.shape)}, not {tuple(exact.shape)}"
        size = rms(exact)
        errors[name] = rms(own.double() - exact) / size if size else rms(own.double())
        limit = MOST_FLOAT32 if own.dtype.itemsize >= 4 else MOST_RELATIVE
        if not bool(own.isfinite().all()):
            wrong = wrong or f"{name} has values that are not finite"
        elif contender.strict:
            said = complaint(own, reference, exact)
            wrong = wrong or (f"{name} {said}" if said else None)
        else:
            allowed = 2 * rms(reference.double() - exact) / size if size else 0.0
            limit = max(limit, min(allowed, MOST_TWICE))  # what is no number allows nothing
            if not errors[name] <= limit:
                wrong = wrong or f"{name} has relative error {errors[name]:.2e}, more than {limit:.3g}"
    return errors, wrong
