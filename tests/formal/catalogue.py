"""Every proof of the project."""

from . import addresses, arithmetic, axi, control, rounding, streams

PROOFS = {proof.name: proof for module in (rounding, arithmetic, streams, axi, addresses, control)
          for proof in module.PROOFS}
