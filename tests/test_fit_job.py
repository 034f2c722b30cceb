"""The loop that offline fits share: budgets, metrics, checkpoints that survive `kill -9`, and resuming bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warp as wp

from nrc.field import Field
from nrc.fit import FitError
from nrc.fit.job import TASK_STEPS, FitJob, steps_of
from nrc.fit.settings import make_config
from nrc.optimizer import restore
from nrc.snapshot import SnapshotError, load_tensors, save_tensors
from nrc.trainer import Trainer

CPU = "cpu"


class WaveTask:
    """The smallest honest task: sines over the unit square."""

    kind = "image"
    warnings = ()
    samples_per_step = 256

    def __init__(self, seed: int = 3, pause: float = 0.0) -> None:
        self.device = wp.get_device(CPU)
        self.config = make_config(
            "image", n_input_dims=2, finest=64, device=self.device, grid={"log2_hashmap_size": 10, "n_levels": 4}
        )
        self.field = Field(2, 1, self.config.encoding, self.config.network, device=CPU)
        self.trainer = Trainer(self.field, self.config.loss, self.config.optimizer)
        self.n_params, self.seed, self.n_steps, self.pause = self.field.n_params, seed, 0, pause
        self.n_evaluated = 0

    def identity(self):
        return {"config": self.config.as_dict(), "seed": self.seed}

    def batch(self, step):
        x = np.random.default_rng([self.seed, step]).random((256, 2), dtype=np.float32)
        return x, np.sin(9.0 * x.sum(axis=1, keepdims=True))

    def step(self):
        time.sleep(self.pause)
        loss = self.trainer.step(*self.batch(self.n_steps))
        self.n_steps += 1
        return loss

    def progress(self):
        x, y = self.batch(1 << 30)
        return {"psnr": float(-10.0 * np.log10(np.mean((self.field.inference(x).numpy() - y) ** 2)))}

    def evaluate(self):
        self.n_evaluated += 1
        return self.progress()

    def state(self):
        arrays = {name: array.numpy() for name, array in self.trainer.optimizer.state_arrays().items()}
        return arrays | {TASK_STEPS: np.array([self.n_steps])}

    def load_state(self, path, state):
        restore(path, state, self.trainer.optimizer.state_arrays())
        self.n_steps = steps_of(path, state)

    def save(self, path, training):
        self.training = training
        self.field.save(path)

    def pictures(self, folder):
        return {}

    def kernels(self):
        return self.trainer.kernels()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_leaves_metrics_curve_snapshot_and_result(tmp_path):
    """A run of 40 steps writes what its folder should hold, and its figures agree with each other."""
    task = WaveTask()
    job = FitJob(task, tmp_path / "new" / "run")
    job.run(steps=40, seconds=None, progress=False)
    result = job.finish()
    assert task.n_steps == 40 and task.training == {
        "seconds": job.seconds,
        "steps": 40,
        "n_params": task.n_params,
    }
    lines = lines_of(job.out / "metrics.jsonl")
    assert lines[-1]["step"] == 40 and lines[-1]["psnr"] == result["psnr"] == task.progress()["psnr"]
    assert json.loads((job.out / "result.json").read_text()) == result
    assert result["steps"] == 40 and result["n_params"] == task.field.n_params
    np.testing.assert_array_equal(Field.load(job.snapshot, CPU).params.numpy(), task.field.params.numpy())
    assert (job.out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Twenty steps, then twenty more in a new process' objects, give the bits of forty."""
    whole = WaveTask()
    FitJob(whole, tmp_path / "whole").run(steps=40, seconds=None, progress=False)
    FitJob(WaveTask(), tmp_path / "halves").run(steps=20, seconds=None, progress=False)
    task = WaveTask()
    job = FitJob(task, tmp_path / "halves")
    job.resume()
    assert task.n_steps == 20 and job.seconds > 0.0
    job.run(steps=40, seconds=None, progress=False)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(task.state()[name], array, err_msg=name)
    assert [line["step"] for line in lines_of(job.out / "metrics.jsonl")][-2:] == [20, 40]


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path):
    """Lines that a killed run wrote after its last checkpoint do not stay in the file of the resumed one."""
    FitJob(WaveTask(), tmp_path).run(steps=10, seconds=None, progress=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "seconds": 1.0}\n{"step": 2')
    job = FitJob(WaveTask(), tmp_path)
    job.resume()
    job.run(steps=12, seconds=None, progress=False)
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [10, 12]


def test_seconds_end_a_run_and_count_what_was_before(tmp_path):
    """`seconds` is training time in all: a resumed run that has spent it takes no step."""
    job = FitJob(WaveTask(pause=0.01), tmp_path)
    job.run(steps=None, seconds=0.2, progress=False)
    assert 0.2 <= job.seconds < 1.0
    again = FitJob(WaveTask(), tmp_path)
    again.resume()
    before = again.task.n_steps
    again.run(steps=None, seconds=0.2, progress=False)
    assert again.task.n_steps == before > 1
    assert again.finish()["steps"] == before


def test_values_that_are_not_finite_are_null(tmp_path, monkeypatch):
    """A loss that diverges or an error of exactly zero ends no run: JSON, checkpoint and curve take them as null."""
    task = WaveTask()
    monkeypatch.setattr(task, "progress", lambda: {"psnr": float("inf")})
    monkeypatch.setattr(task, "batch", lambda step: (np.full((256, 2), 0.5), np.full((256, 1), np.nan)))
    job = FitJob(task, tmp_path)
    job.run(steps=3, seconds=None, progress=False)
    assert job.finish()["psnr"] is None and json.loads((tmp_path / "result.json").read_text())["loss"] is None
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["loss"] is None
    assert np.isfinite(task.field.params.numpy()).all()
    again = FitJob(WaveTask(), tmp_path)
    again.resume()
    again.run(steps=4, seconds=None, progress=False)
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("entry", [None, 3, "x", {"a": 1}, [1], [{}], [{"step": 1, "seconds": "x", "loss": 0.5}]])
@pytest.mark.parametrize("name", ["metrics", "seconds", "identity"])
def test_crafted_checkpoint_is_refused(tmp_path, name, entry):
    """Entries of the wrong type, in a file whose digest is right, are one error that names the file."""
    if (name, entry) == ("seconds", 3):
        entry = -3.0
    job = FitJob(WaveTask(), tmp_path)
    config = {"identity": job.identity, "seconds": 1.0, "metrics": []} | {name: entry}
    save_tensors(job.checkpoint, job.task.state(), config, kind="nrc.fit")
    with pytest.raises(FitError, match=r"checkpoint\.safetensors"):
        job.resume()


def test_state_with_impossible_counts_is_refused():
    """Counts that would make the moving average read outside of its table are refused, and nothing is changed."""
    task = WaveTask()
    for _ in range(3):
        task.step()
    arrays = task.trainer.optimizer.state_arrays()
    before = {name: array.numpy().copy() for name, array in arrays.items()}
    for name, values in (
        ("counters", -np.ones_like(before["counters"])),
        ("stamps", np.full_like(before["stamps"], 4)),
        ("params", np.full_like(before["params"], np.nan)),
        ("moments", before["moments"][:-1]),
    ):
        with pytest.raises(SnapshotError, match=f"c: {name}"):
            restore("c", before | {name: values}, arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array.numpy(), before[name], err_msg=name)
    for n_steps in (-1, 1 << 40):
        with pytest.raises(SnapshotError, match=f"{n_steps}"):
            steps_of("c", {TASK_STEPS: np.array([n_steps])})


@pytest.mark.parametrize("damage", ["missing", "cut", "other seed", "other kind", "no seconds"])
def test_wrong_checkpoint_is_refused(tmp_path, damage):
    """A checkpoint that is absent, damaged or of another run is one clear line naming the file and what differs."""
    job = FitJob(WaveTask(), tmp_path)
    expected = "no checkpoint to resume from"
    if damage != "missing":
        job.run(steps=2, seconds=None, progress=False)
    if damage == "cut":
        job.checkpoint.write_bytes(job.checkpoint.read_bytes()[:-100])
        expected = "not a readable safetensors file"
    elif damage == "other seed":
        job, expected = FitJob(WaveTask(seed=4), tmp_path), r"another run: seed \(3 there, 4 here\)"
    elif damage == "other kind":
        job.task.field.save(job.checkpoint)
        expected = "expected 'nrc.fit'"
    elif damage == "no seconds":
        save_tensors(job.checkpoint, job.task.state(), {"identity": job.identity, "metrics": []}, kind="nrc.fit")
        expected = "incomplete"
    with pytest.raises(FitError, match=expected) as caught:
        job.resume()
    assert str(job.checkpoint) in str(caught.value) and "\n" not in str(caught.value)


def test_run_needs_a_budget_and_a_folder(tmp_path):
    """Without an end, or with a folder that cannot be made, nothing starts."""
    with pytest.raises(FitError, match="number of steps or of seconds"):
        FitJob(WaveTask(), tmp_path).run(steps=None, seconds=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(FitError, match="cannot make this folder"):
        FitJob(WaveTask(), tmp_path / "file" / "run")


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import warp as wp
wp.config.log_level = wp.LOG_WARNING
from test_fit_job import FitJob, WaveTask
job = FitJob(WaveTask(pause=0.005), Path({out!r}), checkpoint_seconds=0.05)
job.run(steps=100000, seconds=None, progress=False)
print(job.finish()["interrupted"], job.task.n_evaluated)
"""


def start(out: Path) -> subprocess.Popen[str]:
    program = PROGRAM.format(tests=str(Path(__file__).parent), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120.0
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    return process


def test_killed_run_resumes_from_a_whole_checkpoint(tmp_path):
    """After `kill -9` while checkpoints are being written all the time, the run goes on to the uninterrupted bits."""
    process = start(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    job = FitJob(WaveTask(), tmp_path)
    job.resume()
    killed_at = job.task.n_steps
    assert killed_at > 0
    job.run(steps=killed_at + 5, seconds=None, progress=False)
    whole = WaveTask()
    for _ in range(killed_at + 5):
        whole.step()
    for name, array in whole.state().items():
        np.testing.assert_array_equal(job.task.state()[name], array, err_msg=name)


def test_interrupt_saves_and_skips_the_measuring(tmp_path):
    """Ctrl-C ends the run after its step with checkpoint and snapshot, and without a long evaluation."""
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].split() == ["True", "0"]
    _, config = load_tensors(tmp_path / "checkpoint.safetensors", kind="nrc.fit")
    assert config["metrics"][-1]["step"] > 0
    assert Field.load(tmp_path / "snapshot.safetensors", CPU).n_params == WaveTask().n_params
    assert json.loads((tmp_path / "result.json").read_text())["psnr"] == config["metrics"][-1]["psnr"]


def test_snapshot_kinds_are_told_apart(tmp_path):
    """`load_tensors` takes one of several kinds, and names them all when it is none."""
    path = tmp_path / "field.safetensors"
    WaveTask().field.save(path)
    assert "params" in load_tensors(path, kind=("nrc.nerf", "nrc.field"))[0]
    with pytest.raises(SnapshotError, match="expected 'a' or 'b'"):
        load_tensors(path, kind=("a", "b"))
