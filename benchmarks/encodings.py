"""The encodings of Müller et al. 2022 (table 2) on anybody's data: fits of equal budget, as a table and JSON.

    python benchmarks/encodings.py image FILE --steps 1000 [--out encodings] [--json benchmarks/results/NAME.json]
    python benchmarks/encodings.py sdf MESH --seconds 60
    python benchmarks/encodings.py nerf FOLDER --steps 500 --encodings frequency dense-multi hash-19

`none` and `frequency` have NeRF's 8 x 256 network, the grids the task's own; `dense` is one level of 128 vertices a
side with 16 features, `dense-multi` 8 levels from 16 to 173 (in two dimensions as many entries), `hash-N` 16 levels
of tables of at most 2^N entries. Images also have `acorn`, the adaptive blocks of Martel et al. 2021, whose batch is
half the others' unless `--batch-size` says otherwise.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import nrc.launch
from nrc.files import write_atomically
from nrc.fit.run import fit
from nrc.fit.sweeps import table_markdown

ENCODINGS = ("none", "frequency", "dense", "dense-multi", "hash-14", "hash-19", "acorn")
COLUMNS = ("encoding", "n_params", "steps", "seconds", "batch_size", "psnr", "psnr_black", "ssim", "iou")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("image", "sdf", "nerf"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--steps", type=int, help="of each fit")
    parser.add_argument("--seconds", type=float, help="of each fit, training alone")
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, help="by default all that apply")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--downscale", type=int, help="of a NeRF's photographs")
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="quality on a fixed small sample")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=Path("encodings"), help="folder of the fits (encodings)")
    parser.add_argument("--json", type=Path, help="file to write the rows to, besides OUT/table.md")
    args = parser.parse_args()
    if args.steps is None and args.seconds is None:
        parser.error("--steps or --seconds is needed: the budget of each fit")
    device = nrc.launch.resolve_device(args.device)
    options = {name: getattr(args, name) for name in ("batch_size", "downscale") if getattr(args, name) is not None}
    options |= {"seed": args.seed, "device": device, "measure": args.measure}
    rows = []
    for encoding in args.encodings or [name for name in ENCODINGS if name != "acorn" or args.kind == "image"]:
        name, _, size = encoding.partition("-") if encoding.startswith("hash") else (encoding, "", "")
        grid = {"grid": {"log2_hashmap_size": int(size)}} if size else {}
        budget = {"steps": args.steps, "seconds": args.seconds}
        result = fit(args.kind, args.source, out=args.out / encoding, encoding=name, **grid, **budget, **options)
        if result["interrupted"]:
            break
        rows.append({column: result.get(column) for column in COLUMNS} | {"encoding": encoding})
        about = {
            "kind": args.kind,
            "source": args.source.name,
            "rows": rows,
            "seed": args.seed,
            "device": device.name if device.is_cuda else "cpu",
            "threads": nrc.launch.threads(),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "versions": {name: version(name) for name in ("nrc", "warp-lang", "numpy")},
        }
        table, text = table_markdown(rows, COLUMNS), json.dumps(about, indent=1) + "\n"
        print(table, flush=True)
        (args.out / "table.md").write_text(table)
        if args.json is not None:
            write_atomically(args.json, lambda path, text=text: path.write_text(text))


if __name__ == "__main__":
    main()
