"""What a cached row looks like: its codes, rotation, group mean, and the bytes they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..arguments import check_flag, check_integer
from .affine import AffineRows
from .age import GROUP_TOKENS, SPARE_TOKENS, open_start, read_from
from .int4 import Int4
from .int8 import Int8
from .row import RowFormat, rotation_length

__all__ = [
    "GROUP_TOKENS",
    "ROW_FORMATS",
    "SPARE_TOKENS",
    "CacheFormat",
    "LayerFormats",
    "RowFormat",
    "check_format",
    "open_start",
    "read_from",
    "rotation_length",
]

ROW_FORMATS: dict[str, type[RowFormat]] = {of.name: of for of in (Int8, Int4)}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFormat:
    """How rows of keys and values are stored.

    A row ``x`` of ``head_dim`` channels is kept as integer codes ``q`` and two float16 numbers::

        x ~ R.T @ (scale * q + offset + mean)

    Args:
        key: Row format of the keys: "int8", a byte a code, or "int4", two codes in a byte.
        value: Row format of the values, likewise.
        key_rotation: Rotate keys by an orthonormal Hadamard matrix along ``head_dim``
            (QuaRot, SpinQuant), block-diagonal where ``head_dim`` is no power of two.
        key_mean: Tokens of a sequence that share one running key mean (a power of two from 16 to
            2**30), or None for no mean. The mean of a group is taken from the group before it.
        value_rotation: Rotate values the same way; None: if they have fewer than 8 bits.
        by_age: Keep a sequence's first group of tokens and its newest ones as "int8" rows; what
            ``key`` and ``value`` say is for the others. A group is those that share a key mean (at
            most 4096), or 256. In `QuantizedKVCache`; not for rows of 8 bits alone.

    Every element comes back within half a ``scale``, in the basis that it is stored in. A channel
    that the rotation, or taking the mean off, leads beyond float16's 65504 counts as 65504. A row
    with an element beyond 65504, or one that is not finite, comes back as NaN.

    Raises:
        TypeError: An option of another type.
        ValueError: An option outside the range above.
    """

    key: str = "int8"
    value: str = "int8"
    key_rotation: bool = True
    key_mean: int | None = 256
    value_rotation: bool | None = None
    by_age: bool = False

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            _check_row_format(name, getattr(self, name))
        check_flag("key_rotation", self.key_rotation)
        if self.value_rotation is None:
            object.__setattr__(self, "value_rotation", ROW_FORMATS[self.value].bits < 8)
        check_flag("value_rotation", self.value_rotation)
        if self.key_mean is not None:
            group = check_integer("key_mean", self.key_mean)
            if not 16 <= group <= 2**30 or group & (group - 1):
                raise ValueError(
                    f"key_mean: expected None or a power of two from 16 to 2**30, got {group}"
                )
            object.__setattr__(self, "key_mean", group)
        check_flag("by_age", self.by_age)
        if self.by_age:
            if not _can_age(self.key, self.value):
                both = " and ".join(dict.fromkeys((self.key, self.value)))
                raise ValueError(f"by_age: expected False for keys and values in {both}, got True")
            if self.age_group > 4096:
                raise ValueError(
                    f"by_age: expected a key_mean of at most 4096, got {self.key_mean}"
                )

    @classmethod
    def plain(cls) -> CacheFormat:
        """A scale and an offset a token and head and nothing else: Qwen's per-token form."""
        return cls(key_rotation=False, key_mean=None, value_rotation=False)

    @classmethod
    def named(cls, name: str) -> CacheFormat:
        """A format by what it is usually called.

        Args:
            name: "int8", "plain", "k8v4" (keys in 8 bits, values in 4) or "k4v4".

        Raises:
            TypeError: No string.
            ValueError: Another name.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {name!r}")
        return _named("name", name)

    @classmethod
    def of_layers(cls, format: LayerFormats | None, num_layers: int) -> tuple[CacheFormat, ...]:
        """The format of each layer, from what caches take.

        Args:
            format: A format or its name, of every layer; or a sequence of them, one per layer.
                None: ``CacheFormat()``.
            num_layers: Layers of the model.

        Raises:
            TypeError: Neither of these.
            ValueError: A name that is none; another number of formats than layers.
        """
        if format is None:
            return (cls(),) * num_layers
        if isinstance(format, (CacheFormat, str)):
            return (_format_or_name("format", format),) * num_layers
        if not isinstance(format, Sequence):
            raise TypeError(
                "format: expected a CacheFormat, the name of one, or a sequence of them, one per "
                f"layer, got {format!r}"
            )
        if len(format) != num_layers:
            raise ValueError(
                f"format: expected one for each of {num_layers} layers, got {len(format)}"
            )
        return tuple(_format_or_name(f"format[{i}]", x) for i, x in enumerate(format))

    @property
    def name(self) -> str | None:
        """What `named` calls it; None: nothing."""
        return next((name for name, format in _NAMED.items() if format == self), None)

    @property
    def is_plain(self) -> bool:
        """Whether ``x = scale * q + offset`` holds in 8 bits, without a rotation or a mean."""
        return self == CacheFormat.plain()

    @property
    def mean_group(self) -> int:
        """Tokens that share a key mean, 0 without one: the kernels' encoding."""
        return self.key_mean or 0

    @property
    def age_group(self) -> int:
        """Tokens of a group that grows old together."""
        return self.key_mean or GROUP_TOKENS

    @property
    def young_tokens(self) -> int:
        """Rows of a sequence's young slab: the first group, and a ring for the newest tokens."""
        return 2 * self.age_group + SPARE_TOKENS

    @property
    def young(self) -> CacheFormat:
        """The format of a slab of young rows; the means are in the blocks."""
        return CacheFormat(
            key_rotation=self.key_rotation, key_mean=None, value_rotation=self.value_rotation
        )

    def young_bytes(self, head_dim: int, v_head_dim: int) -> int:
        """Bytes of a sequence's and head's young slab: `Sequences.young`."""
        return self.young.slab_bytes(head_dim, v_head_dim, self.young_tokens)

    @property
    def rows(self) -> tuple[RowFormat, RowFormat]:
        """The row formats of the keys and of the values."""
        return ROW_FORMATS[self.key](self.key_rotation), ROW_FORMATS[self.value](
            bool(self.value_rotation)
        )

    def row_bytes(self, head_dim: int, v_head_dim: int) -> int:
        """Bytes of one token of one head, key and value, means apart."""
        return sum(
            rows.code_bytes(dim) + rows.params_bytes(dim)
            for rows, dim in zip(self.rows, (head_dim, v_head_dim), strict=True)
        )

    def mean_slots(self, block_size: int) -> int:
        """Mean vectors a block of ``block_size`` tokens holds, 0 without a mean."""
        return -(-block_size // self.key_mean) if self.key_mean else 0

    def slab_bytes(self, head_dim: int, v_head_dim: int, block_size: int) -> int:
        """Bytes of a block and head with its means, as `CacheView.slab` lays them out."""
        means = 2 * head_dim * self.mean_slots(block_size)
        return block_size * self.row_bytes(head_dim, v_head_dim) + means


LayerFormats: TypeAlias = CacheFormat | str | Sequence[CacheFormat | str]


def check_format(format: CacheFormat) -> CacheFormat:
    """The format, if it is one."""
    if not isinstance(format, CacheFormat):
        raise TypeError(f"format: expected a CacheFormat, got {format!r}")
    return format


def _format_or_name(label: str, x: Any) -> CacheFormat:
    """A format, by itself or by its name."""
    if isinstance(x, str):
        return _named(label, x)
    if not isinstance(x, CacheFormat):
        raise TypeError(f"{label}: expected a CacheFormat or the name of one, got {x!r}")
    return x


def _named(label: str, name: str) -> CacheFormat:
    if name not in _NAMED:
        raise ValueError(f"{label}: expected one of {', '.join(_NAMED)}, got {name!r}")
    return _NAMED[name]


def _check_row_format(name: str, x: Any) -> None:
    """The name of a row format."""
    if not isinstance(x, str):
        raise TypeError(f"{name}: expected the name of a row format, got {x!r}")
    if x not in ROW_FORMATS:
        raise ValueError(f"{name}: expected one of {', '.join(ROW_FORMATS)}, got {x!r}")


def _can_age(key: str, value: str) -> bool:
    """Whether young int8 rows can become such rows, and some of them smaller ones."""
    formats = [ROW_FORMATS[x] for x in (key, value)]
    return all(issubclass(of, AffineRows) for of in formats) and any(of.bits < 8 for of in formats)


_NAMED = {
    "int8": CacheFormat(),
    "plain": CacheFormat.plain(),
    "k8v4": CacheFormat(value="int4", by_age=True),
    "k4v4": CacheFormat(key="int4", value="int4", by_age=True),
}
