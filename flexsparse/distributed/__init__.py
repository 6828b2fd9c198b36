"""More than one GPU, on torch's own distributed: sequence parallelism around sparse attention.

DDP and FSDP2 need nothing of this: wrap the model, then shard it (`docs/distributed.md`).
"""

from flexsparse.distributed.models import ulysses
from flexsparse.distributed.parallel import SequenceParallel, ulysses_attention
from flexsparse.distributed.traffic import Traffic, traffic

__all__ = ["SequenceParallel", "Traffic", "traffic", "ulysses", "ulysses_attention"]
