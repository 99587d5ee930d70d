"""The one place that looks at which vLLM is installed."""

from __future__ import annotations

import re

__all__ = ["CACHE_DTYPE", "SERVED", "cache_dtype", "check_version"]

#: The versions that are served, as (major, minor).
SERVED = ((0, 32), (0, 33))
#: What ``--kv-cache-dtype`` is called where vLLM admits names of plugins.
CACHE_DTYPE = "kvquant"
_BORROWED = "int8_per_token_head"  # one of vLLM's own names, where it does not


def check_version() -> tuple[int, int]:
    """The (major, minor) of the installed vLLM.

    Raises:
        ImportError: None, or one that is not served.
    """
    served = " and ".join(f"{major}.{minor}" for major, minor in SERVED)
    try:
        from vllm.version import __version__
    except ImportError as missing:
        raise ImportError(
            f"kvquant.integrations.vllm needs vLLM {served}, which is not installed: "
            "pip install 'kvquant[vllm]'"
        ) from missing
    major, minor = (int(part) for part in re.findall(r"\d+", __version__)[:2])
    if (major, minor) not in SERVED:
        age = "old" if (major, minor) < SERVED[0] else "new"
        raise ImportError(
            f"kvquant.integrations.vllm serves vLLM {served}; the installed {__version__} is too "
            f"{age}: pip install 'kvquant[vllm]'"
        )
    return major, minor


def cache_dtype() -> str:
    """What to pass as ``--kv-cache-dtype``: from 0.33 on "kvquant", before a name of vLLM's own.

    Raises:
        ImportError: No vLLM that is served.
    """
    return CACHE_DTYPE if check_version() >= (0, 33) else _BORROWED
