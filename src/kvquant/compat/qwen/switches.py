"""The three switches of Qwen's first models, for any model of transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ... import LayerFormats, explain, use_backend

__all__ = ["Switches", "apply_switches", "from_pretrained"]

Log = Callable[[str], None]
_REFERENCE = "_kvquant_reference"  # of a model: the hooks that keep it on the torch reference


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """What to run; each switch may also be an attribute of the model's config.

    Attributes:
        use_cache_quantization: Keys and values are cached in 8 bits, and attention reads them.
        use_cache_kernel: By kvquant's compiled kernels; False: by its torch reference, slowly.
        use_flash_attn: With a 16-bit cache: by the package flash-attn if it is installed, else by
            torch's fused attention. With the 8-bit cache it changes nothing: kvquant's attention
            is fused in any case. "auto" is False.
    """

    use_cache_quantization: bool = False
    use_cache_kernel: bool = True
    use_flash_attn: bool = False

    @classmethod
    def of(cls, config: Any, **given: Any) -> Switches:
        """The switches given, else those of the config, else the defaults.

        Raises:
            TypeError: A switch that is neither a bool nor None (nor "auto" for flash attention).
        """
        found = {}
        for name in (of.name for of in fields(cls)):
            value = given.get(name)
            if value is None:
                value = getattr(config, name, None)
            if name == "use_flash_attn" and value == "auto":
                value = False
            if value is None:
                continue
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True, False or None, got {value!r}")
            found[name] = value
        return cls(**found)

    def line(self, device: torch.device, head_dim: int, attention: str) -> str:
        """One line: what will run on ``device``, and which switch changes nothing.

        ``attention``: what a model with a 16-bit cache attends with.
        """
        if not self.use_cache_quantization:
            line = f"16-bit KV cache, attention '{attention}' (use_cache_quantization is off"
            if self.use_cache_kernel:
                line += "; use_cache_kernel belongs to it, and changes nothing alone"
            return f"{line})"
        line = "8-bit KV cache, attention on the 8-bit data by "
        if not self.use_cache_kernel:
            line += "the torch reference, which is SLOW (use_cache_kernel=False)"
        else:
            with use_backend("auto"):
                found = explain(device=device, head_dim=head_dim)
            if found.backend == "reference":
                line += (
                    f"the torch reference, which is SLOW: {found.reason}. "
                    "`kvquant doctor` says what to do"
                )
            else:
                line += f"{found.reason}"
        if self.use_flash_attn:
            line += "; use_flash_attn changes nothing, this attention is fused as it is"
        return line


def from_pretrained(
    name: Any,
    *args: Any,
    use_cache_quantization: bool | None = None,
    use_cache_kernel: bool | None = None,
    use_flash_attn: bool | str | None = None,
    format: LayerFormats | None = None,
    model_class: Any = None,
    log: Log = _say,
    **kwargs: Any,
) -> Any:
    """Load a model and apply the switches: see `Switches` and `apply_switches`.

    Args:
        name: As ``AutoModelForCausalLM.from_pretrained`` takes it, as for all other arguments.
        *args: For ``from_pretrained``.
        use_cache_quantization: None: as the model's config says, else off.
        use_cache_kernel: None: as the model's config says, else on.
        use_flash_attn: None: as the model's config says, else off.
        format: How rows are stored: a format or its name, or one per layer.
        model_class: Whose ``from_pretrained`` to call; ``AutoModelForCausalLM`` by default.
        log: Gets the line that says what will run; the standard error by default.
        **kwargs: For ``from_pretrained``: ``dtype``, ``device_map``, a ``quantization_config``
            for weights in 4 bits, and so on.

    Raises:
        TypeError: A switch of another type.
        ValueError: Another attention implementation than the switches ask for, a model that the
            8-bit cache does not serve.
    """
    if model_class is None:
        from transformers import AutoModelForCausalLM

        model_class = AutoModelForCausalLM
    given: dict[str, Any] = {
        "use_cache_quantization": use_cache_quantization,
        "use_cache_kernel": use_cache_kernel,
        "use_flash_attn": use_flash_attn,
    }
    Switches.of(None, **given)  # refuses before anything is loaded
    return apply_switches(
        model_class.from_pretrained(name, *args, **kwargs), **given, format=format, log=log
    )


def apply_switches(
    model: Any,
    *,
    use_cache_quantization: bool | None = None,
    use_cache_kernel: bool | None = None,
    use_flash_attn: bool | str | None = None,
    format: LayerFormats | None = None,
    log: Log = _say,
) -> Any:
    """Set a loaded model up as the switches say, in one line to ``log``; the config keeps them.

    With cache quantization, every ``generate`` and every pipeline of the model uses a new 8-bit
    cache (`kvquant.integrations.transformers.enable`); without, transformers' own. May be called
    again with other switches.

    Args:
        model: A model of transformers that can generate.
        use_cache_quantization: See `from_pretrained`, as for the others.
        use_cache_kernel: None: the config's.
        use_flash_attn: None: the config's.
        format: How rows are stored: a format or its name, or one per layer.
        log: Gets the line that says what will run.

    Returns:
        The model.

    Raises:
        TypeError: A switch of another type, something else than a model that can generate.
        ValueError: A model that the 8-bit cache, or the attention, does not serve.
    """
    from ...integrations.transformers import disable, enable

    switches = Switches.of(
        getattr(model, "config", None),
        use_cache_quantization=use_cache_quantization,
        use_cache_kernel=use_cache_kernel,
        use_flash_attn=use_flash_attn,
    )
    disable(model)
    for hook in vars(model).pop(_REFERENCE, ()):
        hook.remove()
    if switches.use_cache_quantization:
        enable(model, format=format)
        if not switches.use_cache_kernel:
            vars(model)[_REFERENCE] = _stay_on_reference(model)
    elif switches.use_flash_attn:
        model.set_attn_implementation(_flash_attention())
    for name, value in asdict(switches).items():
        setattr(model.config, name, value)
    text = model.config.get_text_config(decoder=True)
    attention = text._attn_implementation
    log(f"kvquant: {switches.line(model.device, _head_dim(text), attention)}")
    return model


def _flash_attention() -> str:
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def _head_dim(config: Any) -> int:
    """Channels of a head as stored, a multiple of 16."""
    dim = getattr(config, "head_dim", None)
    if not isinstance(dim, int):
        dim = config.hidden_size // config.num_attention_heads
    return dim + -dim % 16


def _stay_on_reference(model: torch.nn.Module) -> tuple[Any, ...]:
    """Hooks that run each forward of the model on the torch reference."""
    entered: list[AbstractContextManager[None]] = []

    def enter(*args: Any) -> None:
        entered.append(use_backend("reference"))
        entered[-1].__enter__()

    def leave(*args: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return (
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
    )
