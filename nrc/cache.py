"""`RadianceCache`: scattered radiance at surface points, learned online from noisy estimates (Müller et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import Any, Literal

import numpy as np
import warp as wp

from nrc.arrays import as_count, as_vectors, as_written_rows, owned_bytes
from nrc.config import parse_encoding, parse_network
from nrc.field import Field
from nrc.kernels import cache as kc
from nrc.kernels import query as kq
from nrc.kernels import replay as krp
from nrc.kernels import scan as ks
from nrc.launch import launch, prepare, resolve_device
from nrc.optimizer import restore
from nrc.records import Records, TrainingPaths
from nrc.replay import Reservoir
from nrc.scan import ExclusiveScan
from nrc.snapshot import SnapshotError, check_finite, load_tensors, save_tensors, take_tensor
from nrc.trainer import Trainer

SNAPSHOT_KIND = "nrc.cache"
MAX_REPLAY = 0.5  # share of the batches: beyond, less than half of them is about what is seen
LATER_SETTINGS = ("replay",)  # that older files lack; they stand for their defaults
BURN_IN_PASSES = 4  # times that a call of `train` goes through its batches after a cut


@dataclass(frozen=True)
class CacheConfig:
    """What the cache is made of.

    Attributes:
        encoding: Of positions: "hash" is the multiresolution hash grid (Müller et al. 2022), "frequency" 12 octaves of
            triangle waves (Müller et al. 2021).
        n_levels, n_features_per_level, log2_hashmap_size, base_resolution, per_level_scale: Hash grid, tiny-cuda-nn's
            names.
        n_neurons, n_hidden_layers: Network; None for the number of layers means 2 with "hash" and 5 with "frequency".
        learning_rate: Adam's.
        beta2: Adam's.
        ema_decay: Of the weights that answer rendering queries.
        batch_size, n_batches: Records per optimizer step, and steps per call of `train`. None for the batch size means
            2^14 on CUDA and 2^11 on a CPU.
        replay: Share of the batches that is drawn from records of past frames, so that places which no path reaches any
            more are not forgotten; 0 for none. Their targets are as old as they are: they slow adaptation to light
            that changes without a `cut`.
        radiance_scale: Radiance that the loss treats as 1 [W m^-2 sr^-1]; None estimates it from the first records.
        seed: Of the initial weights and the shuffle.
    """

    encoding: Literal["hash", "frequency"] = "hash"
    n_levels: int = 8
    n_features_per_level: int = 4
    log2_hashmap_size: int = 14
    base_resolution: int = 16
    per_level_scale: float = 2.0
    n_neurons: int = 64
    n_hidden_layers: int | None = None
    learning_rate: float = 1e-2
    beta2: float = 0.99
    ema_decay: float = 0.99
    batch_size: int | None = None
    n_batches: int = 4
    replay: float = 0.0
    radiance_scale: float | None = None
    seed: int = 1337

    def __post_init__(self) -> None:
        if self.encoding not in ("hash", "frequency"):
            raise ValueError(f"encoding must be 'hash' or 'frequency', got {self.encoding!r}")
        if (self.batch_size is not None and self.batch_size < 1) or self.n_batches < 1:
            raise ValueError("batch_size and n_batches must be at least 1")
        if not 0.0 <= self.replay <= MAX_REPLAY:
            raise ValueError(f"replay must lie in [0, {MAX_REPLAY}], got {self.replay}")
        if self.radiance_scale is not None and not self.radiance_scale > 0.0:
            raise ValueError(f"radiance_scale must be positive, got {self.radiance_scale}")

    def batch_size_on(self, device: wp.Device) -> int:
        """Records per optimizer step on `device`."""
        return self.batch_size or (2**11 if device.is_cpu else 2**14)

    def encoding_config(self) -> dict[str, Any]:
        """tiny-cuda-nn style encoding of the inputs described in `nrc.kernels.cache`."""
        position: dict[str, Any] = {"n_dims_to_encode": 3, "otype": "TriangleWave", "n_frequencies": 12}
        if self.encoding == "hash":
            position = {
                "n_dims_to_encode": 3,
                "otype": "HashGrid",
                "n_levels": self.n_levels,
                "n_features_per_level": self.n_features_per_level,
                "log2_hashmap_size": self.log2_hashmap_size,
                "base_resolution": self.base_resolution,
                "per_level_scale": self.per_level_scale,
            }
        return {
            "otype": "Composite",
            "nested": [
                position,
                {"n_dims_to_encode": 2, "otype": "OneBlob", "n_bins": 4, "wrap": True},
                {"n_dims_to_encode": 3, "otype": "OneBlob", "n_bins": 4, "wrap": False},
                {"n_dims_to_encode": 6, "otype": "Identity"},
            ],
        }

    def network_config(self) -> dict[str, Any]:
        """tiny-cuda-nn style network."""
        default = 2 if self.encoding == "hash" else 5
        layers = default if self.n_hidden_layers is None else self.n_hidden_layers
        return {
            "otype": "FullyFusedMLP",
            "activation": "ReLU",
            "output_activation": "None",
            "n_neurons": self.n_neurons,
            "n_hidden_layers": layers,
        }

    def optimizer_config(self) -> dict[str, Any]:
        """tiny-cuda-nn style optimizer."""
        adam = {
            "otype": "Adam",
            "learning_rate": self.learning_rate,
            "beta1": 0.9,
            "beta2": self.beta2,
            "epsilon": 1e-15,
            "l2_reg": 1e-6,
        }
        return {"otype": "Ema", "decay": self.ema_decay, "nested": adam}


def make_query(config: CacheConfig) -> wp.Function:
    """The cache as a function of one record, to call from a Warp kernel: one thread per record.

    query(view, position, wo, normal, roughness, diffuse, specular) -> vec3 radiance towards wo, where `view` is a
    `RadianceCache.device_view` of a cache with this configuration. The same function for the same encoding and network.
    """
    network = parse_network(config.network_config(), _encoding(config, 0).n_padded, 3)
    return kq.make_query(_encoding(config, network.n_params), network)


def _encoding(config: CacheConfig, first_param: int) -> Any:
    return parse_encoding(config.encoding_config(), int(kc.N_INPUTS), first_param)


class RadianceCache:
    """Learns L_s(x, wo): radiance scattered at x towards wo, direct light included, emission of x excluded.

    One training and one prediction call per frame (`docs/embedding.md`)::

        cache = RadianceCache(bounds, CacheConfig(), max_queries=65536, max_records=16384, device="cpu")
        records = Records.of(position=..., wo=..., normal=..., roughness=..., diffuse=..., specular=...)
        tails = cache.query_primary(suffix_ends)  # for self-training, from the weights being trained
        cache.train(records, targets)
        radiance = cache.query(queries)  # from the averaged weights

    Launches go to the device's current stream; no call but `stats`, `state`, `save` and those that restore reads back
    or synchronises, and after the first frame none allocates, so a frame can be captured in a CUDA graph. Calls share
    working memory: one thread, and one CUDA stream, at a time.

    Args:
        bounds: Lower and upper corner of the scene, (3,) each [scene units]. Ask and train inside only.
        config: What it is made of.
        max_queries: Records that one query may hold.
        max_records: Records that one training call may hold.
        device: Warp device.

    Attributes:
        bounds: As given.
        max_queries, max_records: Capacities; `reserve` makes room for more.
        batch_size: Records per optimizer step.
        n_training_records: Records that one call of `train` can use, beside those that are replayed.
        loss: (n_batches,) float on the device, mean loss of each batch of the last `train` that had records for it.
    """

    def __init__(
        self,
        bounds: tuple[np.ndarray, np.ndarray],
        config: CacheConfig = CacheConfig(),
        *,
        max_queries: int,
        max_records: int,
        device: Any = None,
    ) -> None:
        self.config, self.device = config, resolve_device(device)
        lower, upper = (np.asarray(corner, float) for corner in bounds)
        extent = float(np.max(upper - lower))
        if lower.shape != (3,) or upper.shape != (3,) or not np.isfinite([lower, upper]).all() or extent <= 0.0:
            raise ValueError(f"bounds must be two finite corners with positive extent, got {lower} and {upper}")
        # A cube around the box keeps cells cubic; the margin keeps surfaces on its faces inside.
        extent *= 1.01
        self.batch_size = config.batch_size_on(self.device)
        budget = self.batch_size * config.n_batches
        self._n_replay = int(config.replay * budget)
        self.n_training_records = budget - self._n_replay
        self.bounds = lower, upper
        self._box_lower = wp.vec3(*((lower + upper) / 2.0 - extent / 2.0))
        self._inverse_extent = 1.0 / extent
        device = self.device
        self.field = Field(
            int(kc.N_INPUTS), 3, config.encoding_config(), config.network_config(), seed=config.seed, device=device
        )
        self.trainer = Trainer(
            self.field, {"otype": "RelativeL2Luminance"}, config.optimizer_config(), batch_size=self.batch_size
        )
        self.max_queries = self.max_records = 0
        self._query_invalid = wp.zeros(0, dtype=int, device=device)
        self._record_invalid = wp.zeros(0, dtype=int, device=device)
        self._slices: dict[int, tuple[wp.array, wp.array]] = {}
        self.reserve(max_queries, max_records)
        self._n_valid = wp.zeros(1, dtype=int, device=device)
        self._round = wp.zeros(1, dtype=int, device=device)
        self._burn_in = 0  # calls of `train` that are still to go through their batches several times
        self._scale = wp.zeros(1, dtype=float, device=device)
        self._plan = wp.zeros(3, dtype=int, device=device)
        self._reservoir = Reservoir(budget if config.replay > 0.0 else 0, device)
        b, n = self.batch_size, config.n_batches
        x = wp.zeros((b * n, int(kc.N_INPUTS)), dtype=float, device=device)
        y = wp.zeros((b * n, 3), dtype=float, device=device)
        counts = wp.zeros((n, 1), dtype=int, device=device)
        self._x, self._y, self._counts = x, y, counts
        self.loss = wp.zeros(n, dtype=float, device=device)
        self._batches = [
            (x[i * b : (i + 1) * b], y[i * b : (i + 1) * b], counts[i], self.loss[i : i + 1]) for i in range(n)
        ]
        self.reset()

    def kernels(self) -> dict[str, wp.Kernel]:
        """Kernels to compile before the first call, by the name to announce."""
        own = {"radiance cache": kc.shuffle_records, "scan": ks.scan_chunks}
        if self._reservoir.room > 0:
            own["replay"] = krp.store_records
        return own | self.field.kernels() | self.trainer.kernels()

    def prepare(self) -> float:
        """Compile what queries and training need; seconds it took. Otherwise the first calls do, and say so."""
        return prepare(self.kernels(), self.device)

    def reserve(self, max_queries: int, max_records: int) -> None:
        """Make room for at least so many queries and training records; nothing that was learned or counted changes."""
        device = self.device
        if max_queries > self.max_queries:
            self.max_queries = max_queries
            self._slices.clear()
            self._query_x = wp.zeros((max_queries, int(kc.N_INPUTS)), dtype=float, device=device)
            self._query_y = wp.zeros((max_queries, 3), dtype=float, device=device)
            self._radiance = wp.zeros((max_queries, 3), dtype=float, device=device)
            self._primary_radiance = wp.zeros((max_queries, 3), dtype=float, device=device)
            self._query_invalid = _grown(self._query_invalid, max_queries)
        if max_records > self.max_records:
            self.max_records = max_records
            self._scan = ExclusiveScan(max_records, device)
            self._flag = wp.zeros(max_records, dtype=int, device=device)
            self._place = wp.zeros(max_records, dtype=int, device=device)
            self._record_invalid = _grown(self._record_invalid, max_records)

    def query(self, records: Records, count: Any = None, *, out: Any = None) -> wp.array:
        """Radiance [W m^-2 sr^-1] that leaves each record's point along wo, from the averaged (EMA) weights.

        Args:
            records: At most `max_queries`.
            count: How many of them to answer, an array of one int32 on the device; all by default.
            out: (records or more, 3) float32 of any library to write to, on the device.

        Returns:
            `out` as a Warp array; without it (max_queries, 3) float, valid until the next call of this method. Rows
            from `count` on keep what they held.

        Raises:
            ValueError: Too many records, or arrays of another shape, type or device.
        """
        return self._query(records, count, self.trainer.ema_params, self._radiance, out)

    def query_primary(self, records: Records, count: Any = None, *, out: Any = None) -> wp.array:
        """As `query`, from the weights being trained: the tails of self-training suffixes."""
        return self._query(records, count, self.field.params, self._primary_radiance, out)

    def device_view(self, *, average: bool = True) -> kq.CacheView:
        """The cache for the function that `make_query` returns, to pass to a kernel of one's own.

        With the averaged weights, which this call brings up to date on the device: call it again after each `train`.
        Otherwise with those being trained, for the tails of self-training suffixes.
        """
        view: Any = kq.CacheView()
        view.box_lower, view.inverse_extent, view.scale = self._box_lower, self._inverse_extent, self._scale
        view.params = self.trainer.ema_params if average else self.field.params
        return view

    def train_paths(self, paths: TrainingPaths) -> None:
        """Learn from a frame's training paths: ask for their tails, gather their targets, `train`.

        Needs room for `paths.n_paths` queries and for `paths.n_paths * paths.max_records` records.
        """
        paths.compact_tails()
        paths.gather_targets(self.query_primary(paths.tails, paths.n_tails))
        self.train(paths.records, paths.targets, paths.n_records)

    def train(self, records: Records, targets: Any, count: Any = None) -> None:
        """Learn from one frame: shuffle the records into batches and take one optimizer step on each.

        Records whose inputs or targets are not finite, or whose targets are negative, are dropped and counted. With no
        record left nothing changes. More records than the batches hold are dropped at random.

        Args:
            records: At most `max_records`.
            targets: (records or more, 3) rows or vec3 of any library: noisy estimates of the scattered radiance
                [W m^-2 sr^-1]. Read in place where they are float32 on the device, else copied.
            count: How many of them there are, an array of one int32 on the device; all by default.

        Raises:
            ValueError: Too many records, or arrays of another shape, type or device.
        """
        config = self.config
        self._check_records(records, self.max_records, "training records", "max_records")
        n = records.capacity
        targets = as_vectors("targets", targets, self.device)
        if targets.shape[0] < n:
            raise ValueError(f"{n} training records but {targets.shape[0]} targets")
        count = as_count(count, self.device)
        launch(
            kc.flag_valid_records,
            n,
            inputs=[records.view, targets, count],
            outputs=[self._flag, self._record_invalid],
            device=self.device,
        )
        self._scan(n, self._flag, self._place)
        stored = self._reservoir
        launch(
            kc.begin_training_round,
            1,
            inputs=[
                config.n_batches,
                self.batch_size,
                self._n_replay,
                stored.n_kept,
                stored.room,
                n,
                records.view,
                targets,
                self._flag,
                self._place,
                count,
            ],
            outputs=[self._scale, self._round, stored.n_stored, self._n_valid, self._plan, self._counts],
            device=self.device,
        )
        launch(
            kc.shuffle_records,
            n,
            inputs=[
                self._box_lower,
                self._inverse_extent,
                config.n_batches,
                self.batch_size,
                config.seed,
                records.view,
                targets,
                self._flag,
                self._place,
                count,
                self._n_valid,
                self._plan,
                self._round,
                self._scale,
            ],
            outputs=[self._x, self._y],
            device=self.device,
        )
        if stored.room > 0:
            self._replay(records, targets, count)
        for _ in range(BURN_IN_PASSES if self._burn_in > 0 else 1):
            for x, y, batch_count, loss in self._batches:
                wp.copy(loss, self.trainer.step(x, y, count=batch_count))
        self._burn_in = max(0, self._burn_in - 1)

    def _replay(self, records: Records, targets: wp.array, count: wp.array | None) -> None:
        """Deal stored records to the batches, then store some of the round's."""
        config, stored = self.config, self._reservoir
        launch(
            krp.deal_stored_records,
            self._n_replay,
            inputs=[
                self._box_lower,
                self._inverse_extent,
                config.n_batches,
                self.batch_size,
                config.seed,
                stored.records.view,
                stored.targets,
                self._plan,
                self._round,
                self._scale,
            ],
            outputs=[self._x, self._y],
            device=self.device,
        )
        launch(
            krp.store_records,
            records.capacity,
            inputs=[
                stored.n_kept,
                config.seed,
                records.view,
                targets,
                self._flag,
                self._place,
                count,
                self._n_valid,
                self._plan,
                self._round,
            ],
            outputs=[stored.records.view, stored.targets],
            device=self.device,
        )

    def cut(self, n_frames: int = 16, *, keep_records: bool = False) -> None:
        """Adapt fast: light, scene or view are no longer what they were. What was learned stays, unlike with `reset`.

        The averaged weights forget what was before the call, and the next `n_frames` calls of `train` go through their
        batches `BURN_IN_PASSES` times. A CUDA graph repeats the number of passes that it was captured with: capture
        one more for these frames, or take them without.

        Args:
            n_frames: Calls of `train`; 0 ends an earlier burn-in and restarts the average alone.
            keep_records: Whether records of past frames go on being replayed: right where the view alone has changed.

        Raises:
            ValueError: A negative number.
        """
        if n_frames < 0:
            raise ValueError(f"n_frames must not be negative, got {n_frames}")
        if not keep_records:
            self._reservoir.clear()
        self.trainer.optimizer.restart_average()
        self._burn_in = n_frames

    @property
    def burn_in(self) -> int:
        """Calls of `train` left of the burn-in after a `cut`."""
        return self._burn_in

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Device memory held, by what it is for.

        Keys: parameters (those being trained and their average), optimizer (moments, counters, gradients), network (of
        one batch and of queries), records (inputs and answers, by `max_queries` and `max_records`), total.
        """
        parameters = 2 * 4 * self.field.n_params
        optimizer = owned_bytes(self.trainer.optimizer, skip=(self.field,)) - parameters
        network = owned_bytes(self.field.passes)
        everything = owned_bytes(self)
        parts = {"parameters": parameters, "optimizer": optimizer, "network": network}
        return parts | {"records": everything - sum(parts.values()), "total": everything}

    def reset(self) -> None:
        """Forget everything: weights, moments, averages, the estimated radiance scale and all counters."""
        self.field.reset()
        self.trainer.optimizer.reset()
        self._scale.fill_(self.config.radiance_scale or 0.0)
        for counter in (self._round, self._n_valid, self._plan, self._counts):
            counter.zero_()
        self._query_invalid.zero_()
        self._record_invalid.zero_()
        self.loss.zero_()
        self._reservoir.clear()
        self._burn_in = 0

    def state(self) -> dict[str, np.ndarray]:
        """Everything `load_state` needs to go on as if nothing had happened: weights, moments, averages, counters."""
        state = {name: array.numpy().copy() for name, array in self._arrays().items()}
        return state | {"burn_in": np.array([self._burn_in], np.int32)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state` of a cache with the same configuration."""
        for name, array in self._arrays().items():
            array.assign(state[name])
        self._burn_in = int(state["burn_in"][0])

    def continue_from(self, other: RadianceCache) -> bool:
        """Take over what `other` learned, where it means the same here: encoding, network, unit of radiance and bounds.

        Returns:
            Whether it did; otherwise nothing changes.
        """
        mine, theirs = (
            (c.config.encoding_config(), c.config.network_config(), c.config.radiance_scale) for c in (self, other)
        )
        if mine != theirs or not np.array_equal(self.bounds, other.bounds):
            return False
        self.trainer.optimizer.continue_from(other.trainer.optimizer)
        wp.copy(self._scale, other._scale)
        wp.copy(self._round, other._round)
        self._burn_in = other._burn_in
        if self._reservoir.room == other._reservoir.room:
            for name, array in self._reservoir.arrays().items():
                wp.copy(array, other._reservoir.arrays()[name])
        return True

    def save(self, path: str | PathLike[str]) -> None:
        """Write configuration, bounds and `state` for `load`. Raises SnapshotError, also where they are not finite."""
        state = self.state()
        for name, values in state.items():
            if values.dtype.kind == "f":
                check_finite(path, name, values)
        config = {"config": asdict(self.config), "bounds": [corner.tolist() for corner in self.bounds]}
        save_tensors(path, state, config, kind=SNAPSHOT_KIND)

    @staticmethod
    def load(path: str | PathLike[str], *, max_queries: int, max_records: int, device: Any = None) -> RadianceCache:
        """The cache that `save` wrote, which goes on as if nothing had happened. Raises SnapshotError."""
        device = resolve_device(device)
        tensors, described = load_tensors(path, kind=SNAPSHOT_KIND)
        config = _config_of(path, described.get("config"))
        bounds = _bounds_of(path, described.get("bounds"))
        try:
            encoding = parse_encoding(config.encoding_config(), int(kc.N_INPUTS), 0)
            network = parse_network(config.network_config(), encoding.n_padded, 3)
            take_tensor(path, tensors, "trainer.params", (network.n_params + encoding.n_params,), np.float32)
            cache = RadianceCache(bounds, config, max_queries=max_queries, max_records=max_records, device=device)
        except SnapshotError:
            raise
        except (ValueError, TypeError, ArithmeticError, MemoryError, RuntimeError) as error:
            raise SnapshotError(f"{path}: config: {error}") from error
        scale = take_tensor(path, tensors, "scale", (1,), np.float32)
        if scale[0] < 0.0:
            raise SnapshotError(f"{path}: scale must not be negative, got {scale[0]}")
        burn_in = np.zeros(1, np.int32)  # in files from before there was one
        if "burn_in" in tensors:
            burn_in = take_tensor(path, tensors, "burn_in", (1,), np.int32)
        stored = cache._reservoir
        if stored.room > 0 and take_tensor(path, tensors, "replay.n_stored", (1,), np.int32)[0] > stored.room:
            raise SnapshotError(f"{path}: replay.n_stored is more than the {stored.room} that there is room for")
        if burn_in[0] < 0:
            raise SnapshotError(f"{path}: burn_in must not be negative, got {burn_in[0]}")
        restore(path, tensors, cache._arrays())
        cache._burn_in = int(burn_in[0])
        return cache

    def stats(self) -> dict[str, float]:
        """Counters read back from the device: a synchronisation point.

        Keys: records (of its own that the last `train` used), rounds, dropped_records, invalid_queries, skipped_steps,
        radiance_scale, loss (mean over the last `train`'s batches whose loss is finite).
        """
        losses = self.loss.numpy()
        losses = losses[np.isfinite(losses)]
        return {
            "records": int(self._plan.numpy()[kc.FRESH]),
            "rounds": int(self._round.numpy()[0]),
            "dropped_records": int(self._record_invalid.numpy().sum()),
            "invalid_queries": int(self._query_invalid.numpy().sum()),
            "skipped_steps": int(self.trainer.skipped_steps.numpy()[0]),
            "radiance_scale": float(self._scale.numpy()[0]),
            "loss": float(losses.mean()) if losses.size else 0.0,
        }

    def _arrays(self) -> dict[str, wp.array]:
        trainer = {f"trainer.{name}": array for name, array in self.trainer.optimizer.state_arrays().items()}
        replay = self._reservoir.arrays() if self._reservoir.room > 0 else {}
        stored = {f"replay.{name}": array for name, array in replay.items()}
        return {"scale": self._scale, "round": self._round, **stored, **trainer}

    def _query(self, records: Records, count: Any, params: wp.array, answers: wp.array, out: Any) -> wp.array:
        self._check_records(records, self.max_queries, "queries", "max_queries")
        n = records.capacity
        count = as_count(count, self.device)
        if out is not None:
            answers = as_written_rows("out", out, 3, self.device, n)
        if n == 0:
            return answers
        if n not in self._slices:
            self._slices[n] = self._query_x[:n], self._query_y[:n]
        x, y = self._slices[n]
        launch(
            kc.encode_records,
            n,
            inputs=[self._box_lower, self._inverse_extent, records.view, count],
            outputs=[x],
            device=self.device,
        )
        self.field.inference(x, y, params=params, count=count)
        launch(
            kc.decode_radiance,
            n,
            inputs=[records.view, count, y, self._scale],
            outputs=[answers, self._query_invalid],
            device=self.device,
        )
        return answers

    def _check_records(self, records: Records, room: int, what: str, name: str) -> None:
        if not isinstance(records, Records):
            raise ValueError(f"the {what} must be Records (not their view), got {type(records).__name__}")
        if records.capacity > room:
            raise ValueError(f"{records.capacity} {what}, but the cache was made for {room} ({name})")
        if records.device != self.device:
            raise ValueError(f"the {what} lie on {records.device}, the cache on {self.device}")


def _grown(counters: wp.array, n: int) -> wp.array:
    """Longer array of counters that starts with `counters`."""
    grown = wp.zeros(n, dtype=int, device=counters.device)
    wp.copy(grown, counters, count=counters.shape[0])
    return grown


def _config_of(path: str | PathLike[str], values: Any) -> CacheConfig:
    """The `CacheConfig` that a snapshot describes. Raises SnapshotError."""
    types: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "int | None": (int, type(None))}
    types |= {"float | None": (int, float, type(None))}
    names = {field.name: types.get(str(field.type), (str,)) for field in fields(CacheConfig)}
    if isinstance(values, dict):
        values = {name: value for name, value in asdict(CacheConfig()).items() if name in LATER_SETTINGS} | values
    if not isinstance(values, dict) or set(values) != set(names):
        raise SnapshotError(f"{path}: config must have {', '.join(names)}, got {values!r}")
    for name, allowed in names.items():
        value = values[name]
        if not isinstance(value, allowed) or isinstance(value, bool):
            raise SnapshotError(f"{path}: config: {name} must not be {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SnapshotError(f"{path}: config: {name} must be finite, got {value}")
    try:
        return CacheConfig(**values)
    except ValueError as error:
        raise SnapshotError(f"{path}: config: {error}") from error


def _bounds_of(path: str | PathLike[str], values: Any) -> tuple[np.ndarray, np.ndarray]:
    """The corners that a snapshot holds. Raises SnapshotError."""
    try:
        lower, upper = np.asarray(values, float)
        valid = lower.shape == (3,) and bool(np.isfinite([lower, upper]).all()) and float(np.max(upper - lower)) > 0.0
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise SnapshotError(f"{path}: bounds must be two finite corners with positive extent, got {values!r}")
    return lower, upper
