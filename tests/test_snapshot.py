"""Snapshots: what goes in comes out, training goes on bit for bit, and no damaged file loads."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warp as wp
from safetensors.numpy import load_file, save_file

from nrc.field import Field
from nrc.snapshot import SnapshotError, load_tensors, save_tensors
from nrc.trainer import Trainer

GRID = {"otype": "HashGrid", "n_levels": 2, "log2_hashmap_size": 6, "base_resolution": 4, "per_level_scale": 1.5}
NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 1}
LOSS = {"otype": "L2"}
ADAM = {"otype": "Adam", "learning_rate": 1e-2}
AVERAGED = {
    "otype": "Ema",
    "decay": 0.9,
    "nested": {"otype": "ExponentialDecay", "decay_start": 2, "decay_interval": 2, "nested": ADAM},
}
BATCH = 64


def make_field(seed: int = 1, **changes) -> Field:
    """A small 2D field; `changes` replace constructor arguments."""
    arguments = {"n_input_dims": 2, "n_output_dims": 3, "encoding": GRID, "network": NETWORK, **changes}
    return Field(**arguments, seed=seed, device="cpu")


def make_trainer(field: Field, optimizer: dict = AVERAGED) -> Trainer:
    return Trainer(field, LOSS, optimizer, batch_size=BATCH)


def train(trainer: Trainer, steps: range) -> None:
    """Step i sees the batch of seed i."""
    for step in steps:
        rng = np.random.default_rng(step)
        x = wp.array(rng.random((BATCH, 2), dtype=np.float32), dtype=float, device="cpu")
        y = wp.array(rng.random((BATCH, 3), dtype=np.float32), dtype=float, device="cpu")
        trainer.step(x, y)


def state(trainer: Trainer) -> dict[str, bytes]:
    """Every bit that training changes, and the average that it reads."""
    arrays = {**trainer.optimizer.state_arrays(), "ema_params": trainer.ema_params}
    return {name: array.numpy().tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A snapshot with the state of a trainer after five steps."""
    path = tmp_path_factory.mktemp("snapshot") / "field.safetensors"
    field = make_field()
    trainer = make_trainer(field)
    train(trainer, range(5))
    trainer.save(path)
    return path


def refused(path: Path, *names: str) -> str:
    """The message with which `Field.load` refuses the file; it names the file and all of `names`."""
    with pytest.raises(SnapshotError) as error:
        Field.load(path, device="cpu")
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for name in names:
        assert name in message
    return message


# --- what comes back -------------------------------------------------------------------------------------------------


def test_field_round_trip_is_exact(tmp_path):
    """Configuration, seed and every bit of the parameters; the outputs too."""
    field = make_field(seed=7)
    path = tmp_path / "a.safetensors"
    field.save(path)
    loaded = Field.load(path, device="cpu")
    assert (loaded.n_input_dims, loaded.n_output_dims, loaded.seed) == (2, 3, 7)
    assert loaded.encoding_config == GRID and loaded.network_config == NETWORK
    assert loaded.params.numpy().tobytes() == field.params.numpy().tobytes()
    x = wp.array(np.random.default_rng(0).random((100, 2), dtype=np.float32), dtype=float, device="cpu")
    outputs = []
    for f in (field, loaded):
        out = wp.full((100, 3), np.nan, dtype=float, device="cpu")
        f.inference(x, out)
        outputs.append(out.numpy())
    assert np.isfinite(outputs[0]).all() and np.array_equal(*outputs)


def test_training_goes_on_bit_for_bit(trained):
    """Ten steps in one go equal five, a snapshot, and five more in a new trainer: weights, moments, counters."""
    whole = make_trainer(make_field())
    train(whole, range(10))
    field = Field.load(trained, device="cpu")
    resumed = make_trainer(field)
    resumed.load_state(trained)
    assert resumed.n_steps.numpy()[0] == 5
    train(resumed, range(5, 10))
    assert state(resumed) == state(whole)


def test_learning_rate_may_change_when_training_goes_on(trained):
    """A trainer with another rate and schedule takes the state."""
    trainer = make_trainer(make_field(), {"otype": "Ema", "decay": 0.9, "nested": ADAM | {"learning_rate": 1e-3}})
    trainer.load_state(trained)
    assert trainer.n_steps.numpy()[0] == 5


def test_other_programs_can_read_the_arrays(trained):
    """It is plain safetensors: fp32 parameters under `params`, metadata in JSON texts."""
    tensors = load_file(trained)
    assert tensors["params"].dtype == np.float32 and tensors["params"].shape == (make_field().n_params,)
    (n,) = struct.unpack("<Q", trained.read_bytes()[:8])
    metadata = json.loads(trained.read_bytes()[8 : 8 + n])["__metadata__"]
    assert metadata["format"] == "nrc.field" and metadata["version"] == "1"
    assert json.loads(metadata["encoding"]) == GRID and json.loads(metadata["n_output_dims"]) == 3


def test_tensors_keep_shape_and_type(tmp_path):
    """Types, empty and zero-dimensional arrays, strided ones, and nested configurations."""
    path = tmp_path / "t.safetensors"
    tensors = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "u": np.arange(5, dtype=np.uint32),
        "strided": np.arange(12).reshape(3, 4)[:, ::2],
        "nothing": np.empty((0, 3), np.float32),
        "scalar": np.array(3.5),
    }
    config = {"a": [1, {"b": None}], "ä": "ö", "c": 0.1}
    save_tensors(path, tensors, config, kind="test")
    loaded, loaded_config = load_tensors(path, kind="test")
    assert loaded_config == config and loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        assert np.array_equal(loaded[name], array)


# --- what does not ---------------------------------------------------------------------------------------------------


def test_a_thousand_damaged_files_are_refused(trained, tmp_path):
    """Cut anywhere, or with 1 to 8 bits flipped in header or tensors: a SnapshotError each time, and nothing else."""
    whole = trained.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    path = tmp_path / "damaged.safetensors"
    counts = {"cut": 0, "flipped in the header": 0, "flipped anywhere": 0}
    for i in range(1000):
        kind = list(counts)[i % 3]
        data = bytearray(whole)
        if kind == "cut":
            del data[rng.randrange(len(whole)) :]
        else:
            n_bits = 8 * (header if "header" in kind else len(whole))
            for bit in rng.sample(range(n_bits), rng.choice((1, 1, 2, 8))):
                data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match=r"damaged\.safetensors: "):
            Field.load(path, device="cpu")
        counts[kind] += 1
    print(f"damaged files refused: {counts}")
    assert sum(counts.values()) == 1000


def test_every_bit_of_one_weight_is_covered(trained, tmp_path):
    """A flipped bit of the last weight, however small, is found by the checksum."""
    path = tmp_path / "w.safetensors"
    whole = trained.read_bytes()
    for bit in range(32):
        data = bytearray(whole)
        data[len(data) - 4 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        refused(path, "sha256")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        struct.pack("<Q", 2**63) + b"{}",  # header lengths beyond memory, beyond the file, beyond 64 bits
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}" * 50,
        struct.pack("<Q", 80_000) + b"[" * 80_000,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 57) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e9]}} ',
        struct.pack("<Q", 80) + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}'.ljust(80),
    ],
)
def test_files_that_are_no_safetensors_are_refused(tmp_path, content):
    """Other formats, lengths that promise gigabytes, bottomless nesting, offsets out of range."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    """The operating system's reason."""
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "nrc.render", "version": "1"}])
def test_foreign_safetensors_are_refused(tmp_path, metadata):
    """Files of other programs, or of another kind of ours."""
    path = tmp_path / "foreign.safetensors"
    save_file({"params": np.zeros(10, np.float32)}, path, metadata=metadata)
    refused(path, "format", "nrc.field")


def test_later_version_is_refused(trained, tmp_path):
    """The message says which version this program reads."""
    path = tmp_path / "v.safetensors"
    save_file(load_file(trained), path, metadata={"format": "nrc.field", "version": "2"})
    refused(path, "version", "'2'", "1")


CONFIG = {"n_input_dims": 2, "n_output_dims": 3, "encoding": GRID, "network": NETWORK, "seed": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_input_dims", 3),
        ("n_input_dims", 0),
        ("n_input_dims", 10**15),
        ("n_input_dims", 2.0),
        ("n_output_dims", True),
        ("n_output_dims", 17),
        ("n_output_dims", None),
        ("seed", "1"),
        ("encoding", GRID | {"n_levels": 3}),
        ("encoding", GRID | {"otype": "Telepathy"}),
        ("encoding", GRID | {"n_layers": 3}),
        ("encoding", {"otype": "Composite", "nested": 5}),
        ("encoding", {"otype": "Composite", "nested": ["HashGrid"]}),
        ("encoding", {"otype": "Composite", "nested": [{"n_dims_to_encode": []}]}),
        ("encoding", [GRID]),
        ("network", NETWORK | {"n_neurons": 32}),
        ("network", NETWORK | {"n_neurons": "many"}),
        ("network", None),
    ],
)
def test_configuration_that_does_not_fit_is_refused(tmp_path, name, value):
    """A valid file whose configuration is unknown, of the wrong type, or needs another number of parameters."""
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"params": make_field().params.numpy()}, CONFIG | {name: value}, kind="nrc.field")
    message = refused(path)
    assert name in message or "params" in message


@pytest.mark.parametrize("name", list(CONFIG))
def test_missing_configuration_is_refused(tmp_path, name):
    """The message names the field."""
    path = tmp_path / "m.safetensors"
    config = {key: value for key, value in CONFIG.items() if key != name}
    save_tensors(path, {"params": make_field().params.numpy()}, config, kind="nrc.field")
    refused(path, name)


def test_wrong_parameters_are_refused(tmp_path):
    """Missing, too few, of another type, not finite."""
    path = tmp_path / "p.safetensors"
    params = make_field().params.numpy()
    broken = params.copy()
    broken[3] = np.nan
    broken[5] = np.inf
    for tensors, named in (
        ({}, "params"),
        ({"weights": params}, "params is missing"),
        ({"params": params[:-8]}, f"[{params.size}]"),
        ({"params": params.reshape(2, -1)}, f"[{params.size}]"),
        ({"params": params.astype(np.float64)}, "float64"),
        ({"params": broken}, "2 of"),
    ):
        save_tensors(path, tensors, CONFIG, kind="nrc.field")
        refused(path, named)


@pytest.mark.parametrize(
    ("field", "optimizer", "named"),
    [
        (CONFIG | {"n_output_dims": 4}, AVERAGED, "n_output_dims"),
        (CONFIG | {"encoding": GRID | {"n_levels": 3}}, AVERAGED, "encoding"),
        (CONFIG | {"network": NETWORK | {"activation": "None"}}, AVERAGED, "network"),
        (CONFIG, AVERAGED | {"decay": 0.95}, "optimizer"),
        (CONFIG, ADAM, "optimizer"),
    ],
)
def test_state_of_another_trainer_is_refused(trained, field, optimizer, named):
    """Another field or average: the message names what differs, and the trainer stays as it was."""
    field = {name: value for name, value in field.items() if name != "seed"}
    trainer = make_trainer(make_field(**field), optimizer)
    before = state(trainer)
    with pytest.raises(SnapshotError, match=rf"field\.safetensors: {named}"):
        trainer.load_state(trained)
    assert state(trainer) == before


def test_state_that_does_not_fit_is_refused(trained, tmp_path):
    """No state in the file, an array missing or of another shape: refused before anything is restored."""
    trainer = make_trainer(make_field(seed=3))
    before = state(trainer)
    path = tmp_path / "s.safetensors"
    make_field().save(path)
    with pytest.raises(SnapshotError, match="optimizer"):
        trainer.load_state(path)
    tensors, config = load_tensors(trained, kind="nrc.field")
    stored = [name for name in tensors if name.startswith("optimizer.")]
    assert stored
    for name in stored:
        for changed in (None, np.zeros(3, tensors[name].dtype), tensors[name].astype(np.float64)):
            if changed is None and name == "optimizer.average_start":
                continue  # older files have none
            others = {key: value for key, value in tensors.items() if key != name}
            save_tensors(path, others if changed is None else others | {name: changed}, config, kind="nrc.field")
            with pytest.raises(SnapshotError, match=name):
                trainer.load_state(path)
    assert state(trainer) == before


# --- writing ---------------------------------------------------------------------------------------------------------


def test_refused_save_leaves_the_older_file(tmp_path):
    """Parameters that are not finite, a value outside JSON: the older file stays."""
    path = tmp_path / "a.safetensors"
    field = make_field()
    field.save(path)
    before = path.read_bytes()
    other = make_field()
    other.encoding_config = GRID | {"n_levels": np.int64(2)}
    with pytest.raises(SnapshotError, match="encoding"):
        other.save(path)
    params = field.params.numpy().copy()
    params[-1] = np.inf
    field.params.assign(params)
    with pytest.raises(SnapshotError, match=r"params: 1 of"):
        field.save(path)
    for name in ("format", "sha256"):
        with pytest.raises(SnapshotError, match=name):
            save_tensors(path, {}, {name: 1}, kind="nrc.field")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_unwritable_path_is_refused(tmp_path):
    """The message names the folder that is missing."""
    with pytest.raises(SnapshotError, match=r"no folder .*nowhere"):
        make_field().save(tmp_path / "nowhere" / "a.safetensors")


INTERRUPTED = """
import sys
import nrc.snapshot
from tests.test_snapshot import make_field

def half(arrays, temporary, metadata):
    complete(arrays, temporary, metadata=metadata)
    data = temporary.read_bytes()
    with open(temporary, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        print("half", flush=True)
        sys.stdin.read()

complete, nrc.snapshot.save_file = nrc.snapshot.save_file, half
make_field(seed=2).save(sys.argv[1])
"""


def test_killed_while_writing_leaves_the_older_file(tmp_path):
    """kill -9 with half of the file written: the older snapshot still loads, and saving works again."""
    path = tmp_path / "a.safetensors"
    make_field(seed=1).save(path)
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        for line in process.stdout:
            if line.strip() == "half":
                break
    finally:
        process.kill()
        process.wait(timeout=60)
        process.stdin.close()
        process.stdout.close()
    assert process.returncode == -9
    assert any(other.stat().st_size > 0 for other in tmp_path.iterdir() if other != path)  # it was under way
    assert Field.load(path, device="cpu").seed == 1
    make_field(seed=3).save(path)
    assert Field.load(path, device="cpu").seed == 3


def test_state_with_impossible_counts_is_refused(trained, tmp_path):
    """Counters below zero, stamps beyond the steps taken, moments that are no numbers: none may index anything."""
    tensors, config = load_tensors(trained, kind="nrc.field")
    path = tmp_path / "s.safetensors"
    for name, value in (("counters", -5), ("stamps", 2**30), ("moments", np.nan), ("average", np.inf)):
        changed = tensors["optimizer." + name].copy()
        changed.ravel()[-1 if name != "counters" else 2] = value
        save_tensors(path, tensors | {"optimizer." + name: changed}, config, kind="nrc.field")
        trainer = make_trainer(make_field(seed=3))
        before = state(trainer)
        with pytest.raises(SnapshotError, match=f"optimizer.{name}|{name}"):
            trainer.load_state(path)
        assert state(trainer) == before


def test_spelling_of_the_configuration_does_not_matter(trained):
    """A trainer whose field is written differently but is the same goes on."""
    grid = {**GRID, "otype": "hashgrid", "n_features_per_level": 2}
    trainer = make_trainer(make_field(encoding=grid, network=NETWORK | {"activation": "relu"}))
    trainer.load_state(trained)
    assert trainer.n_steps.numpy()[0] == 5
