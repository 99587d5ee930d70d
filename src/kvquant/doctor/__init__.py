"""``kvquant doctor``: what is wrong on this machine, or with a model, and what to do about it."""

from .checks import Finding, State, examine, serves_arch
from .models import examine_call, examine_model

__all__ = ["Finding", "State", "examine", "examine_call", "examine_model", "serves_arch"]
