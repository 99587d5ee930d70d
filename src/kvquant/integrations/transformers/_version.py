"""The one place that looks at which transformers is installed, and that it has a torch."""

from __future__ import annotations

import re

import torch

__all__ = ["CACHE_ARGUMENT", "MINIMUM"]

MINIMUM = (5, 5)

_NEEDED = f"kvquant.integrations.transformers needs transformers {MINIMUM[0]}.{MINIMUM[1]} or newer"

try:
    import transformers
except ImportError as missing:
    raise ImportError(f"{_NEEDED}: pip install 'kvquant[transformers]'") from missing

_version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
if _version < MINIMUM:
    raise ImportError(
        f"{_NEEDED}, found {transformers.__version__}: pip install --upgrade transformers"
    )
if not transformers.utils.is_torch_available():  # it says why on stderr
    raise ImportError(
        f"transformers {transformers.__version__} does not work with torch {torch.__version__}: "
        "upgrade torch, or install an older transformers (torch 2.4: transformers 5.7)"
    )

#: What this transformers calls the cache in ``model(...)`` and ``model.generate(...)``: "cache"
#: from 5.24 on (the old name still works there and warns), "past_key_values" before.
CACHE_ARGUMENT = "cache" if _version >= (5, 24) else "past_key_values"
