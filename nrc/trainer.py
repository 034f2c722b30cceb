"""`Trainer`: loss, backpropagation and optimizer for a `Field`, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import Any

import warp as wp

from .arrays import as_count, as_rows, as_values
from .config import parse_loss
from .field import SNAPSHOT_KIND, Field, check_same_field
from .kernels.loss import check_loss
from .optimizer import Optimizer, restore
from .snapshot import SnapshotError, check_finite, load_tensors, save_tensors

OPTIMIZER_PREFIX = "optimizer."  # of the names of the state's arrays in a snapshot
# Settings of an optimizer that may change when training goes on; the others are what its state means.
RATE_SETTINGS = ("learning_rate", "decay_base", "decay_start", "decay_interval", "decay_end")


class Trainer:
    """Fits `field.params` by stochastic gradient descent.

    Args:
        field: The field to train.
        loss: Dictionary with `otype` of a loss.
        optimizer: Dictionary with `otype` Adam or SGD, possibly nested in Ema and ExponentialDecay.
        batch_size: Largest number of rows of a step: then no step allocates. By default working memory grows with the
            largest batch so far.

    Attributes:
        field: The field, whose `params` each step changes.
        optimizer: Its `Optimizer`, which has the state: `reset` forgets it.

    Raises:
        ValueError: Unknown otype, key or value; the message lists what is allowed.
    """

    def __init__(
        self, field: Field, loss: Mapping[str, Any], optimizer: Mapping[str, Any], *, batch_size: int | None = None
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.field = field
        self.batch_size = batch_size
        self.loss_otype = parse_loss(loss)
        check_loss(self.loss_otype, field.n_output_dims)
        self.optimizer = Optimizer(field, optimizer, batch_size=batch_size)

    @property
    def ema_params(self) -> wp.array:
        """The debiased moving average of the parameters as of the last step; the parameters themselves without an EMA.

        Reading it brings the array up to date on the device (and is captured in a CUDA graph as such).
        """
        return self.optimizer.ema_params

    @property
    def n_steps(self) -> wp.array:
        """Optimizer steps taken, one int32 on the device."""
        return self.optimizer.n_steps

    @property
    def skipped_steps(self) -> wp.array:
        """Steps skipped for a non-finite gradient, one int32 on the device."""
        return self.optimizer.skipped_steps

    def step(self, x: Any, y: Any, *, pdf: Any = None, count: Any = None) -> wp.array:
        """Take one optimizer step on the mean loss over rows x outputs.

        Without rows nothing changes, the loss included; with a gradient of the network that is not finite the step is
        skipped and counted in `skipped_steps`, and a table entry whose gradient overflows is left alone. The rows and
        their capacity decide the result: neither earlier batch sizes nor, on the CPU, the number of threads.

        Args:
            x: (rows, n_input_dims) inputs, in [0, 1].
            y: (rows, n_output_dims) targets.
            pdf: (rows,) positive density that each row was drawn with, which divides its part of the loss.
            count: Number of rows to use, an int32 array of length 1 on the device; all rows by default.

        Returns:
            The loss before the step, a float32 array of length 1 on the device, overwritten by the next step.

        Raises:
            ValueError: Wrong shape, type or device.
        """
        field = self.field
        x = as_rows("x", x, field.n_input_dims, field.device)
        n_rows = x.shape[0]
        y = as_rows("y", y, field.n_output_dims, field.device, n_rows)
        count = as_count(count, field.device)
        if pdf is not None:
            pdf = as_values("pdf", pdf, n_rows, field.device)
        if self.batch_size is not None and n_rows > self.batch_size:
            raise ValueError(f"x has {n_rows} rows, batch_size is {self.batch_size}")
        gradients = field.passes.backpropagate(
            field.params, x, y, count, loss=self.loss_otype, pdf=pdf, input_gradient=False
        )
        return self.optimizer.apply(gradients, x, n_rows, count)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the field as `Field.save` does, which `Field.load` reads, and all that training needs to go on."""
        tensors = {OPTIMIZER_PREFIX + name: array.numpy() for name, array in self.optimizer.state_arrays().items()}
        tensors["params"] = tensors.pop(OPTIMIZER_PREFIX + "params")
        check_finite(path, "params", tensors["params"])
        config = self.field.config() | {"optimizer": asdict(self.optimizer.config)}
        save_tensors(path, tensors, config, kind=SNAPSHOT_KIND)

    def load_state(self, path: str | PathLike[str]) -> None:
        """Restore parameters, moments, averages and counters, so that training goes on as if uninterrupted.

        Field and optimizer must be those of the snapshot, but for the seed, the learning rate and its schedule, which
        stay the trainer's; so does the loss. Raises SnapshotError, and then leaves everything as it was.
        """
        tensors, config = load_tensors(path, kind=SNAPSHOT_KIND)
        if "optimizer" not in config:
            raise SnapshotError(f"{path}: optimizer: the snapshot holds a field alone, no state of a trainer")
        check_same_field(path, config, self.field)
        theirs, mine = config["optimizer"], asdict(self.optimizer.config)
        if not isinstance(theirs, dict) or set(theirs) != set(mine):
            raise SnapshotError(f"{path}: optimizer must have {', '.join(mine)}, got {theirs!r}")
        for name in mine:
            if name not in RATE_SETTINGS and theirs[name] != mine[name]:
                raise SnapshotError(
                    f"{path}: optimizer: {name} is {theirs[name]} in the file, {mine[name]} in the trainer"
                )
        arrays = self.optimizer.state_arrays()
        restore(path, tensors, {OPTIMIZER_PREFIX * (name != "params") + name: a for name, a in arrays.items()})

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels by name, for `nrc.launch.prepare`."""
        return self.field.passes.training_kernels(self.loss_otype) | self.optimizer.kernels()
