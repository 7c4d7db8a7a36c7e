"""CRC-32 of data that several threads see in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def combine(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two pieces in a row from their own.

    Args:
        first: CRC-32 of the first piece.
        second: CRC-32 of the second piece.
        length: bytes of the second piece.

    Source: crc32_combine of zlib: appending n bytes multiplies the CRC by x**(8 n) modulo the
        polynomial.
    """
    return _multiply(_power(8 * length), first) ^ second


def of_pieces(pieces: Iterable[tuple[int, int, int]], length: int) -> int | None:
    """Return the CRC-32 of ``length`` bytes from (begin, length, CRC-32) of pieces in any order.

    None where the pieces do not follow one another from the first byte to the last.
    """
    end, total = 0, 0
    for begin, size, crc in sorted(set(pieces)):
        if begin != end:
            return None
        total = combine(total, crc, size)
        end += size
    return total if end == length else None


def _multiply(a: int, b: int) -> int:
    """Return ``a * b`` in GF(2)[x] modulo the polynomial, bits reflected."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@cache
def _square(times: int) -> int:
    """Return ``x ** (2 ** times)``."""
    return _ONE >> 1 if times == 0 else _multiply(_square(times - 1), _square(times - 1))


@cache
def _power(exponent: int) -> int:
    result = _ONE
    for bit in range(exponent.bit_length()):
        if exponent >> bit & 1:
            result = _multiply(result, _square(bit))
    return result
