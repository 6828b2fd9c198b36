"""Device functions that choose tiles: how many each row wants, and which are the best, without a sort.

Scores become int32 keys of the same order. A row's threshold is found by bisection on the bits of the key, and so is
the last of the ties at the threshold: counts of a comparison are all that is needed, and each is exact.

Shape letters: B batch, H query heads, N query tiles, M KV tiles, W words of a bitmask row.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # the key of what must not be chosen; -inf has a higher one
HIGHEST = tl.constexpr(2**31 - 1)  # the key of NaN


@triton.jit
def to_key(scores, allowed):
    """Order-preserving int32 keys: NaN highest, -0.0 as 0.0, what is not allowed lowest."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(scores != scores, HIGHEST, key)
    return tl.where(allowed, key, LOWEST)


@triton.jit
def from_key(key):
    """The scores of keys; NaN for what is not allowed."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def bisect_keys(key, weight, target):
    """The largest threshold (int32, one a row) for which the weights of keys at or above it sum to the target."""
    threshold = tl.full([key.shape[0]], LOWEST, tl.int32)
    for i in range(32):
        # the first bit is the sign: flipping it goes from the lowest key to 0; later bits are still unset
        candidate = threshold ^ (tl.full([], 1, tl.int32) << (31 - i))
        reached = tl.sum(tl.where(key >= candidate[:, None], weight, 0), 1) >= target
        threshold = tl.where(reached, candidate, threshold)
    return threshold


@triton.jit
def tiles_above_statistic(values, allowed, allowed_count, z):
    """How many values exceed mean + std * z of their row; all of them where z is -inf."""
    total = tl.maximum(allowed_count, 1).to(tl.float32)
    mean = tl.sum(tl.where(allowed, values, 0.0), 1) / total
    apart = values - mean[:, None]
    variance = tl.sum(tl.where(allowed, apart * apart, 0.0), 1) / total
    threshold = mean + tl.sqrt_rn(variance) * z
    count = tl.sum(((values > threshold[:, None]) & allowed).to(tl.int32), 1)
    return tl.where(z == float("-inf"), allowed_count, count)


@triton.jit
def tiles_for_mass(key, weight, allowed_count, mass):
    """Size of the smallest set of the highest weights (not normalised) that holds the mass."""
    sum_weight = tl.sum(weight, 1)
    target = mass * sum_weight
    threshold = bisect_keys(key, weight, target)
    above = key > threshold[:, None]
    equal = key == threshold[:, None]
    sum_above = tl.sum(tl.where(above, weight, 0.0), 1)
    tie = tl.max(tl.where(equal, weight, 0.0), 1)
    ties = tl.sum(equal.to(tl.int32), 1)
    some = (target - sum_above) / tl.where(tie > 0, tie, 1.0)
    needed = tl.minimum(tl.maximum(tl.ceil(tl.minimum(some, 65536.0)).to(tl.int32), 1), ties)
    count = tl.sum(above.to(tl.int32), 1) + tl.where(tie > 0, needed, ties)
    count = tl.where(sum_weight == sum_weight, count, 0)  # NaN in the row: its softmax says nothing
    return tl.where(mass >= 1, allowed_count, count)


@triton.jit
def count_wanted(key, value, allowed_count, RULE: tl.constexpr):
    """What the rule wants in each row, before bounds: int32 ``[rows]``."""
    if RULE == "top_k":
        count = value.to(tl.int32)
    elif RULE == "all":
        count = allowed_count
    else:
        allowed = key > LOWEST
        scores = from_key(key)
        if RULE == "normal":
            count = tiles_above_statistic(scores, allowed, allowed_count, value.to(tl.float32))
        else:
            highest = tl.max(tl.where(allowed, scores, float("-inf")), 1)
            # softmax up to a factor: both rules below are the same for any
            weight = tl.where(allowed, tl.exp(scores - highest[:, None]), 0.0)
            if RULE == "probability":
                count = tiles_above_statistic(weight, allowed, allowed_count, value.to(tl.float32))
            else:
                count = tiles_for_mass(key, weight, allowed_count, value.to(tl.float32))
    return count


@triton.jit
def keep_highest(key, kept):
    """Bool ``[rows, M]``: exactly ``kept`` of each row, the highest keys, ties to the lowest index."""
    column = tl.arange(0, key.shape[1])[None, :]
    threshold = bisect_keys(key, 1, kept)
    above = key > threshold[:, None]
    equal = key == threshold[:, None]
    missing = kept - tl.sum(above.to(tl.int32), 1)
    end = tl.full([key.shape[0]], 2 * key.shape[1], tl.int32)
    if tl.max(tl.sum(equal.to(tl.int32), 1) - missing, 0) > 0:
        # some row has more ties than it may take: the largest `end` before which there are not too many
        end = tl.zeros([key.shape[0]], tl.int32)
        step = tl.full([], key.shape[1], tl.int32)
        while step > 0:
            ties = tl.sum((equal & (column < (end + step)[:, None])).to(tl.int32), 1)
            end = tl.where(ties <= missing, end + step, end)
            step = step >> 1
    return above | (equal & (column < end[:, None]))


@triton.jit
def choose(key, value, row, valid, bits, counts, wanted, M, words, min_tiles, capacity, RULE: tl.constexpr):
    """Choose the tiles of a few rows and write the results.

    Args:
        key: int32 ``[rows, M padded to a power of two]``, the lowest key past M.
        value: ``[rows]`` the rule's parameter.
        row: int64 ``[rows]`` index of the row among all ``B * H * N``; valid: whether to write it.
    """
    M_BLOCK: tl.constexpr = key.shape[1]
    allowed_count = tl.sum((key > LOWEST).to(tl.int32), 1)
    count = tl.maximum(count_wanted(key, value, allowed_count, RULE), min_tiles)
    count = tl.minimum(tl.minimum(count, M), allowed_count)
    kept = tl.minimum(count, capacity)
    keep = keep_highest(key, kept)
    shifted = tl.reshape(keep.to(tl.int32), [key.shape[0], M_BLOCK // 32, 32]) << tl.arange(0, 32)[None, None, :]
    word = tl.arange(0, M_BLOCK // 32)
    tl.store(
        bits + row[:, None] * words + word[None, :],
        tl.sum(shifted, 2),
        mask=valid[:, None] & (word < words)[None, :],
    )
    tl.store(counts + row, kept, mask=valid)
    tl.store(wanted + row, count, mask=valid)


@triton.jit
def load_value(value, b, h, n, valid, stride_b, stride_h, stride_n, IN_MEMORY: tl.constexpr):
    """The rule's parameter of each row, from memory or the same number for all: ``[rows]``."""
    if IN_MEMORY:
        number = tl.load(value + b * stride_b + h * stride_h + n * stride_n, mask=valid, other=1)
    else:
        number = value + tl.zeros_like(n)
    return number
