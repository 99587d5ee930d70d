"""What a cached row looks like: bits, rotation, running mean, and the bytes they take."""

from __future__ import annotations

from dataclasses import dataclass

from ..arguments import check_flag, check_integer

__all__ = ["CacheFormat", "check_format", "rotation_length"]


def rotation_length(head_dim: int) -> int:
    """Length of the Hadamard blocks: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """How rows of keys and values are stored.

    A row ``x`` of ``head_dim`` channels is kept as uint8 codes ``q`` and two float16 numbers::

        x ~ R.T @ (scale * q + offset + mean)

    Args:
        bits: Bits of a code. 8 is implemented.
        key_rotation: Rotate keys by an orthonormal Hadamard matrix along ``head_dim``
            (QuaRot, SpinQuant), block-diagonal where ``head_dim`` is no power of two.
        key_mean: Tokens of a sequence that share one running key mean (a power of two from 16 to
            2**30), or None for no mean. The mean of a group is taken from the group before it.
        value_rotation: Rotate values the same way.

    Every element comes back within half a ``scale``, in the basis that it is stored in. A channel
    that the rotation, or taking the mean off, leads beyond float16's 65504 counts as 65504. A row
    with an element beyond 65504, or one that is not finite, comes back as NaN.

    Raises:
        TypeError: An option of another type.
        ValueError: An option outside the range above.
    """

    bits: int = 8
    key_rotation: bool = True
    key_mean: int | None = 256
    value_rotation: bool = False

    def __post_init__(self) -> None:
        if check_integer("bits", self.bits) != 8:
            raise ValueError(f"bits: expected 8, got {self.bits!r}")
        check_flag("key_rotation", self.key_rotation)
        check_flag("value_rotation", self.value_rotation)
        if self.key_mean is not None:
            group = check_integer("key_mean", self.key_mean)
            if not 16 <= group <= 2**30 or group & (group - 1):
                raise ValueError(
                    f"key_mean: expected None or a power of two from 16 to 2**30, got {group}"
                )
            object.__setattr__(self, "key_mean", group)

    @classmethod
    def plain(cls) -> CacheFormat:
        """A scale and an offset a token and head and nothing else: Qwen's per-token form."""
        return cls(key_rotation=False, key_mean=None, value_rotation=False)

    @property
    def is_plain(self) -> bool:
        """Whether ``x = scale * q + offset`` holds without a rotation or a mean."""
        return not (self.key_rotation or self.value_rotation) and self.key_mean is None

    @property
    def mean_group(self) -> int:
        """Tokens that share a key mean, 0 without one: the kernels' encoding."""
        return self.key_mean or 0

    def k_rotation(self, head_dim: int) -> int:
        """Length of the keys' Hadamard blocks, 1 without a rotation."""
        return rotation_length(head_dim) if self.key_rotation else 1

    def v_rotation(self, head_dim: int) -> int:
        """Length of the values' Hadamard blocks, 1 without a rotation."""
        return rotation_length(head_dim) if self.value_rotation else 1

    def row_bytes(self, k_dim: int, v_dim: int) -> int:
        """Bytes of one token of one head, key and value, means apart."""
        return k_dim + 4 + v_dim + 4

    def mean_slots(self, block_size: int) -> int:
        """Mean vectors a block of ``block_size`` tokens holds, 0 without a mean."""
        return -(-block_size // self.key_mean) if self.key_mean else 0


def check_format(format: CacheFormat) -> CacheFormat:
    """The format, if it is one."""
    if not isinstance(format, CacheFormat):
        raise TypeError(f"format: expected a CacheFormat, got {format!r}")
    return format
