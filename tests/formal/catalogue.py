"""Every proof of the project."""

from . import arithmetic, rounding, streams

PROOFS = {proof.name: proof for module in (rounding, arithmetic, streams) for proof in module.PROOFS}
