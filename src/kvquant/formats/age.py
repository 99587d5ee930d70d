"""Formats by age: which tokens are young. See docs/by-age.md, and ``csrc/common/age.h``."""

from __future__ import annotations

__all__ = ["GROUP_TOKENS", "SPARE_TOKENS", "open_start", "read_from"]

GROUP_TOKENS = 256  # that grow old together, where none share a key mean
SPARE_TOKENS = 32  # new tokens that a call may write while others read what was open before


def open_start(group: int, length: int) -> int:
    """The first token of the group of a sequence's last one."""
    return max(0, length - 1) // group * group


def read_from(group: int, length: int, count: int) -> int:
    """From which token on attention of the last ``count`` of ``length`` reads young rows."""
    return open_start(group, length - count if count <= SPARE_TOKENS else length)
