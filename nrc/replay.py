"""`Reservoir`: records of past frames, some of which a cache trains on in every round so as not to forget them."""

from __future__ import annotations

import warp as wp

from nrc.records import FIELDS, Records

ROOM = 8  # records kept, in rounds' worth
MEAN_AGE = 256  # of what is kept, in rounds


class Reservoir:
    """Room for records of past rounds and their targets, kept for `MEAN_AGE` rounds in the mean.

    Args:
        n_records: Records that a round trains on.
        device: Warp device.

    Attributes:
        room: Records it can hold.
        n_kept: Records of a round that it takes in at most.
        n_stored: (1,) int on the device, records it holds, at the front.
        records, targets: What it holds: targets are (room,) vec3 [W m^-2 sr^-1].
    """

    def __init__(self, n_records: int, device: wp.Device) -> None:
        self.room = ROOM * n_records
        self.n_kept = max(1, self.room // MEAN_AGE)
        self.records = Records(self.room, device)
        self.targets = wp.zeros(self.room, dtype=wp.vec3, device=device)
        self.n_stored = wp.zeros(1, dtype=int, device=device)

    def clear(self) -> None:
        """Forget all records."""
        for array in self.arrays().values():
            array.zero_()

    def arrays(self) -> dict[str, wp.array]:
        """The device arrays that rounds change, by name."""
        arrays = {name: getattr(self.records, name) for name in FIELDS}
        return arrays | {"targets": self.targets, "n_stored": self.n_stored}
