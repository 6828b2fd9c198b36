"""Bugs to plant, one at a time, and the tests that have to notice. Each replaces text that occurs exactly once."""

from tests.mutations.catalogue.attention import ATTENTION
from tests.mutations.catalogue.life_cycle import LIFE_CYCLE
from tests.mutations.catalogue.long_runs import LONG_RUNS
from tests.mutations.catalogue.models import MODELS
from tests.mutations.catalogue.mutation import Mutation
from tests.mutations.catalogue.ops import OPS
from tests.mutations.catalogue.passes import PASSES
from tests.mutations.catalogue.real_sizes import REAL_SIZES
from tests.mutations.catalogue.templates import TEMPLATES
from tests.mutations.catalogue.training import TRAINING
from tests.mutations.catalogue.where_tokens_lie import WHERE_TOKENS_LIE

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS: tuple[Mutation, ...] = (
    *ATTENTION,
    *OPS,
    *PASSES,
    *TEMPLATES,
    *MODELS,
    *LONG_RUNS,
    *REAL_SIZES,
    *WHERE_TOKENS_LIE,
    *LIFE_CYCLE,
    *TRAINING,
)
