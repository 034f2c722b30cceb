"""What `nrc.integrations.torch` costs, beside `nrc.Field` called directly and the same function in plain PyTorch.

    python benchmarks/torch_module.py [--dims 2 3] [--batch 65536] [--seconds 20] [--threads 1] [--json FILE]

A hash grid of 16 levels and a 2 x 64 network, as in `nrc bench field`, in two and three dimensions. Three tasks:
`inference`; `gradient`, a forward and a backward by the parameters; `step`, the same with an optimizer, which is
torch's fused Adam over all parameters, or `nrc.Optimizer` over those that the batch touched. The contestants take
turns; figures are medians of samples per second, ratios the module's over theirs. On a CPU that others use, PyTorch's
threads wait for each other and the ratios to it mean nothing: give it `--threads 1`, which holds for all.
"""

import argparse
import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warp as wp

import nrc
import nrc.integrations.torch as tcnn
from nrc import bench_field as bench
from nrc.files import write_atomically
from nrc.launch import resolve_device, set_threads, threads

SAME = 1e-3  # largest difference of the outputs to the module's; half precision on CUDA
PRIMES = (1, 2654435761, 805459861)


class Direct:
    """`nrc.Field` and `nrc.Optimizer` on Warp arrays, with a gradient that is given."""

    def __init__(self, field: nrc.Field, x: torch.Tensor, y: torch.Tensor) -> None:
        self.field = field
        self.optimizer = nrc.Optimizer(field, bench._optimizer(), batch_size=len(x))
        self.x, self.dL_dy = wp.from_torch(x), wp.from_torch(y / y.numel())
        self.out = wp.zeros(y.shape, dtype=float, device=field.device)
        self.dL_dparams = wp.zeros(field.n_params, dtype=float, device=field.device)

    def inference(self, i: int) -> None:
        self.field.inference(self.x, self.out)

    def gradient(self, i: int) -> None:
        self.field.forward(self.x, self.out)
        self.dL_dparams.zero_()
        self.field.backward(self.x, self.dL_dy, dL_dparams=self.dL_dparams)

    def step(self, i: int) -> None:
        self.field.forward(self.x, self.out)
        self.optimizer.step(self.x, self.dL_dy)


class Trained:
    """A torch module, its loss and its optimizer."""

    def __init__(self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self.module, self.x, self.y = module, x, y
        adam = bench.ADAM
        self.adam = torch.optim.Adam(
            module.parameters(), adam["learning_rate"], (adam["beta1"], adam["beta2"]), adam["epsilon"], fused=True
        )

    def inference(self, i: int) -> None:
        with torch.inference_mode():
            self.out = self.module(self.x)

    def gradient(self, i: int) -> None:
        self.adam.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(self.module(self.x), self.y).backward()

    def step(self, i: int) -> None:
        self.gradient(i)
        self.adam.step()


class Plain(torch.nn.Module):
    """The module in PyTorch's own operations, those that were fastest in `nrc bench field`, with its parameters."""

    def __init__(self, field: nrc.Field, params: torch.Tensor) -> None:
        super().__init__()
        levels = field.encoding.grids[0].config.levels
        self.levels = [(n.scale, n.resolution, n.n_entries) for n in levels]
        widths = [bench.N_LEVELS * bench.N_FEATURES, bench.N_NEURONS, bench.N_NEURONS, bench.N_OUTPUTS]
        sizes = [n_in * n_out for n_in, n_out in pairwise(widths)] + [n * bench.N_FEATURES for _, _, n in self.levels]
        parts = params.detach().split(sizes)
        shapes = pairwise(widths)
        self.weights = torch.nn.ParameterList(
            part.view(shape).t().contiguous() for part, shape in zip(parts[:3], shapes, strict=True)
        )
        self.tables = torch.nn.ParameterList(part.view(-1, bench.N_FEATURES).clone() for part in parts[3:])

    def corners(self, columns: list[torch.Tensor], level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries and weights of the corners around each sample, both (corners, rows)."""
        scale, resolution, size = self.levels[level]
        positions = [column * scale + 0.5 for column in columns]
        cells = [position.floor() for position in positions]
        hashed = resolution ** len(columns) > size
        terms, factors = [], []
        for d, (position, cell) in enumerate(zip(positions, cells, strict=True)):
            stride = PRIMES[d] if hashed else resolution**d
            first = cell.to(torch.int64) * stride
            terms.append((first, first + stride))
            factors.append((1.0 - (position - cell), position - cell))
        entries, weights = [], []
        for term, factor in zip(product(*terms), product(*factors), strict=True):
            entry, weight = term[0], factor[0]
            for d in range(1, len(columns)):
                entry, weight = entry ^ term[d] if hashed else entry + term[d], weight * factor[d]
            entries.append(entry)
            weights.append(weight)
        stacked = torch.stack(entries)
        return stacked.bitwise_and_(size - 1) if hashed else stacked.remainder_(size), torch.stack(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = [column.contiguous() for column in x.unbind(1)]
        features = []
        for level, table in enumerate(self.tables):
            with torch.no_grad():
                entries, weights = self.corners(columns, level)
            values = table.gather(0, entries.view(-1, 1).expand(-1, bench.N_FEATURES))
            features.append(torch.einsum("kbf,kb->bf", values.view(*entries.shape, bench.N_FEATURES), weights))
        hidden = torch.cat(features, 1)
        for weight in list(self.weights)[:-1]:
            hidden = torch.relu(torch.nn.functional.linear(hidden, weight))
        return torch.nn.functional.linear(hidden, self.weights[-1])


def measure(
    n_dims: int, batch: int, log2_hashmap_size: int, seconds: float, rounds: int, device: Any
) -> dict[str, Any]:
    """Samples per second of every task and contestant in `n_dims` dimensions."""
    warp_device = resolve_device(device)
    place = wp.device_to_torch(warp_device)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((batch, n_dims), dtype=np.float32)).to(place)
    y = torch.from_numpy(rng.random((batch, bench.N_OUTPUTS), dtype=np.float32)).to(place)
    configs = bench._encoding(log2_hashmap_size), bench._network()
    module = tcnn.NetworkWithInputEncoding(n_dims, bench.N_OUTPUTS, *configs).to(place)
    field = nrc.Field(n_dims, bench.N_OUTPUTS, *configs, device=warp_device)
    ours, plain = Trained(module, x, y), Trained(Plain(field, module.params), x, y)
    contestants: dict[str, Any] = {"ours": ours, "field": Direct(field, x, y), "torch": plain}
    ours.inference(0)
    plain.inference(0)
    difference = (ours.out - plain.out).abs().max() / ours.out.abs().max()
    if not difference < SAME:
        raise RuntimeError(f"the module and PyTorch differ by {difference} of the largest output")

    def wait() -> None:
        if warp_device.is_cuda:
            wp.synchronize_device(warp_device)

    result: dict[str, Any] = {"difference": float(difference), "n_params": field.n_params}
    for task in ("inference", "gradient", "step"):
        calls = {name: (getattr(c, task), wait) for name, c in contestants.items()}
        figures = result[task] = bench._take_turns(calls, batch, seconds / (3 * rounds * len(calls)), rounds)
        print(
            f"{n_dims}D {task:9} {figures['samples_per_second'] / 1e6:.2f} M samples/s,"
            f" nrc.Field {figures['field'] / 1e6:.2f} M (ratio {figures['ratio_field']:.2f}),"
            f" PyTorch {figures['torch'] / 1e6:.2f} M (ratio {figures['ratio_torch']:.2f})",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", choices=(2, 3), default=(2, 3))
    parser.add_argument("--batch", type=int, default=65536)
    parser.add_argument("--log2-hashmap-size", type=int, default=19)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time for each number of dimensions (20)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of all contestants on the CPU (all cores)")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING  # no line per loaded module
    load = bench._load()
    set_threads(args.threads)
    if resolve_device(args.device).is_cpu:
        torch.set_num_threads(threads())
    figures = {
        f"{n}D": measure(n, args.batch, args.log2_hashmap_size, args.seconds, args.rounds, args.device)
        for n in args.dims
    }
    about = {
        **figures,
        "batch": args.batch,
        "encoding": bench._encoding(args.log2_hashmap_size),
        "network": bench._network(),
        "device": str(resolve_device(args.device)),
        "machine": bench._machine(),
        "threads": threads(),
        "load_before": load,
        "versions": {name: bench._version(name) for name in ("nrc", "warp-lang", "torch", "numpy")},
    }
    if args.json is not None:
        write_atomically(args.json, lambda path: path.write_text(json.dumps(about, indent=1) + "\n"))


if __name__ == "__main__":
    main()
