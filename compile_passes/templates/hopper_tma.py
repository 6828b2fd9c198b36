"""Copies between memory and shared memory (TMA), by the names that this version of Gluon has for them.

Triton 3.8 renamed both, and 3.9 refuses the names that 3.6 and 3.7 know.
"""

from triton.experimental.gluon.language.nvidia.hopper import tma

copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
