"""The folder of a trained encoder: its files, and `trained.json`, which is written last and says what they are.

Light, for the build of a memory imports it.
"""

from __future__ import annotations

import json

from raexmc_ray.files import Folder

DONE = "trained.json"


def refuse_altered(encoder: Folder, fingerprint: str) -> None:
    """Raise ValueError where the encoder in this folder, of this fingerprint, is not the one that was trained."""
    if (encoder / DONE).size() is None:
        return  # another one, which nobody has described
    recorded = json.loads((encoder / DONE).read())["fingerprint"]
    if fingerprint != recorded:
        raise ValueError(
            f"{encoder / DONE}: the encoder beside it is not the one that was trained (its fingerprint is "
            f"{fingerprint[:16]}, not {recorded[:16]}): remove {encoder}, and `raexmc train` with the same recipe "
            "publishes it again from its checkpoint"
        )
