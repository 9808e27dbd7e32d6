"""Pseudo-random permutations with O(1) access: which window comes k-th, without ever writing the order down.

A Feistel network permutes the smallest even-bit power of two that holds the domain; values that fall outside
the domain are sent through again until they fall inside ("cycle walking", Black and Rogaway 2002), which
keeps it a bijection. NumPy's generators may draw otherwise in another version (NEP 19); a resumed run must not.
"""

import hashlib

_MASK = (1 << 64) - 1
_ROUNDS = 6


class Permutation:
    """A bijection of range(size), a pure function of (key, size). The domain is below 4 * size, so a lookup
    takes fewer than four passes of the network on average.

    key: whatever should make permutations differ; its `repr` is hashed.
    """

    def __init__(self, size: int, key: object):
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """The element at `index`; raises IndexError outside range(size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} outside range({self.size})")
        bits, mask = self._half_bits, (1 << self._half_bits) - 1
        while True:
            left, right = index >> bits, index & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            index = left << bits | right
            if index < self.size:
                return index


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
