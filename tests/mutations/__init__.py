"""Faults of the kind that people make, each with the tests that have to notice it (`tests/mutants.py` tries them)."""

from . import attention, base, data, eval, hopper, integrations, model, training, triton
from .mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *attention.MUTANTS, *triton.MUTANTS, *model.MUTANTS, *data.MUTANTS, *training.MUTANTS, *base.MUTANTS,
    *eval.MUTANTS, *integrations.MUTANTS, *hopper.MUTANTS,
)  # fmt: skip

__all__ = ["MUTANTS", "Mutant"]
