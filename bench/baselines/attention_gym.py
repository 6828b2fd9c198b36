"""attention-gym's VSA: its block mask of given tiles, run by FlexAttention.

The package makes the mask (`attn_gym.masks.vsa.create_vsa_block_mask`) and leaves the attention to stock FlexAttention; its
selection stays in the lists, so a mask function is compiled in for partial tiles alone.
"""

from __future__ import annotations

from bench.baselines.flex import fastest
from bench.baselines.lists import lists_of
from bench.baselines.protocol import Attend, Problem, Unavailable, need, need_cuda, package


def prepare(problem: Problem, training: bool) -> Attend:
    """attention-gym's VSA on tiles of 64 or 128 slots."""
    name = "attention_gym"
    need_cuda(problem, name)
    need(problem, name, slots=(64, 128))
    vsa = package("attn_gym.masks.vsa", name, name)
    lists = lists_of(problem, name, columns=False)
    if lists.fixed is None:
        raise Unavailable(f"{name} takes as many tiles for every row, and this selection's rows differ")
    sizes = None if problem.layout.whole else lists.sizes
    mask = vsa.create_vsa_block_mask(
        lists.q2k, problem.layout.slots, problem.layout.num_tiles, variable_block_sizes=sizes
    )
    return fastest(problem, training, name, mask)
