"""`ExclusiveScan`: running sums of counts on the device, in memory allocated beforehand."""

from __future__ import annotations

import warp as wp

from nrc.kernels import scan as ks
from nrc.launch import launch

CHUNK = int(ks.CHUNK)


class ExclusiveScan:
    """Scans up to `capacity` int32 values on `device`. A call allocates nothing and can be captured in a CUDA graph."""

    def __init__(self, capacity: int, device: wp.Device) -> None:
        self.capacity, self.device = capacity, device
        self._sums: list[wp.array] = []  # of chunks, of chunks of chunks, ...
        n = -(-capacity // CHUNK)
        while n > 1:
            self._sums.append(wp.zeros(n, dtype=int, device=device))
            n = -(-n // CHUNK)
        self._start = wp.zeros(1, dtype=int, device=device)
        self._no_total = wp.zeros(0, dtype=int, device=device)

    def __call__(self, n: int, values: wp.array, places: wp.array, total: wp.array | None = None) -> None:
        """places[i] = sum of the first i of `n` <= capacity values; `total`, one int, becomes their sum."""
        if n > self.capacity:
            raise ValueError(f"{n} values, but the scan was made for {self.capacity}")
        if n == 0:
            if total is not None:
                total.zero_()
            return
        levels = [(n, values, places)]  # the chunks' sums are scanned in place
        for sums in self._sums:
            if levels[-1][0] <= CHUNK:
                break
            n_values, source, _ = levels[-1]
            n_chunks = -(-n_values // CHUNK)
            launch(ks.sum_chunks, n_chunks, inputs=[n_values, source], outputs=[sums], device=self.device)
            levels.append((n_chunks, sums, sums))
        starts = self._start
        for n_values, source, target in reversed(levels):
            out_total = total if total is not None and target is places else self._no_total
            launch(
                ks.scan_chunks,
                -(-n_values // CHUNK),
                inputs=[n_values, source, starts],
                outputs=[target, out_total],
                device=self.device,
            )
            starts = target
