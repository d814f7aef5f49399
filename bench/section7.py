"""What did two adapters learn: which subspaces, which directions of W? (Hu et al. 2021, Sec. 7)

    python bench/section7.py runs/sst2/r8-s0 runs/sst2/r64-s1    # adapters of train_sst2.py

Printed: the similarity phi of A's subspaces (Eq. 4, Fig. 3 and 4), beside that of random matrices,
and how much each adapter amplifies directions of W (Table 7). In --out: compare-A-B.png, a map of
phi for the first, middle and last layer of each kind, the mean of all its layers, and random
matrices. Takes seconds for a MiniLM.
"""
import argparse
import math
import re
import sys
from pathlib import Path

import pandas  # comes with datasets
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from lora import d_by_k, lora_layers
from train_math import Parser, run_script
from train_sst2 import load_adapted


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("adapters", nargs=2, metavar="ADAPTER", help="folder that train_sst2.py saved")
    add("--model", help="Hub id or folder of the base (default: the adapters' own)")
    add("--out", default="runs/sst2", help="folder of the picture (default: runs/sst2)")
    return parser.parse_args(argv)


def load(args, folder):
    """Return the base with one of the adapters, on the CPU: not every device has an SVD."""
    return load_adapted(argparse.Namespace(
        adapter=folder, model=args.model, device="cpu", checkpoint_activations=False))


def subspace_similarity(first, second):
    """Return phi(A1, A2, i, j) of Eq. 4 for all i and j: A (r1, k) and (r2, k) -> (r1, r2).

    phi is ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j), U the right singular vectors of A: 1 if one
    subspace holds the other, max(i, j) / k by chance.
    """
    U1, U2 = (torch.linalg.svd(A, full_matrices=False).Vh.T for A in (first, second))  # (k, r)
    overlap = (U1.T @ U2).square().cumsum(0).cumsum(1)  # at (i, j): over the first i and j
    i = torch.arange(1, len(first) + 1)[:, None]
    j = torch.arange(1, len(second) + 1)
    return overlap / torch.minimum(i, j)


def amplification(layer):
    """Return Table 7: ||W||, ||dW||, ||U^T W V|| with the top r singular directions of dW, of W and
    of a random matrix, and the amplification factor ||dW|| / ||U^T W V|| with those of dW.
    """
    W = d_by_k(layer.weight, layer.base)
    dW, r = layer.delta(), len(layer.lora_A)
    projections = []
    for source in (dW, W, torch.randn_like(W)):
        U, _, Vh = torch.linalg.svd(source, full_matrices=False)
        projections.append((U[:, :r].T @ W @ Vh[:r].T).norm())
    return torch.stack([W.norm(), dW.norm(), *projections, dW.norm() / projections[0]])


def per_kind(kinds, measure):
    """Return {layer: measure(layer)} of each kind's first, middle and last, and the mean of all."""
    rows = {}
    for kind, layers in kinds.items():
        values = [measure(layer) for layer in layers]
        rows |= {layers[n]: values[n] for n in (0, len(layers) // 2, -1)}
        rows[f"mean of {len(layers)} {kind}"] = torch.stack(values).mean(0)
    return rows


def print_table(title, columns, rows):
    table = pandas.DataFrame(torch.stack([*rows.values()]).numpy(), [*rows], columns)
    print(f"\n{title}\n" + table.to_string(float_format="{:.2f}".format))


@torch.no_grad()
def main(args):
    """Print and draw phi (Fig. 3, 4) and amplification (Table 7) of two adapters of one base."""
    first, second = (dict(lora_layers(load(args, folder))) for folder in args.adapters)
    pairs = {name: (layer.lora_A, second[name].lora_A)
             for name, layer in first.items() if name in second}
    if not pairs:
        raise ValueError("the adapters share no layer")
    kinds = {}  # layers by name within a block: query, value
    for name in pairs:
        kinds.setdefault(re.split(r"\.\d+\.", name)[-1], []).append(name)

    torch.manual_seed(0)
    maps = per_kind(kinds, lambda name: subspace_similarity(*pairs[name]))
    for kind, names in kinds.items():
        A1, A2 = map(torch.randn_like, pairs[names[0]])
        maps[f"random {kind}; chance max(i, j) / {A1.shape[1]}"] = subspace_similarity(A1, A2)
    r1, r2 = next(iter(maps.values())).shape
    corners = {name: phi[[0, 0, -1], [0, -1, -1]] for name, phi in maps.items()}
    print_table("Similarity phi(i, j) (Eq. 4), i of {}, j of {}".format(*args.adapters),
                ["1, 1", f"1, {r2}", f"{r1}, {r2}"], corners)
    for folder, adapter in zip(args.adapters, (first, second)):
        print_table(f"Amplification (Table 7) of {folder}",
                    ["|W|", "|dW|", "|U'WV|: dW", "W", "random", "factor"],
                    per_kind(kinds, lambda name: amplification(adapter[name])))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return maps
    figure = Figure(figsize=(14, 10), layout="constrained")
    for place, (name, phi) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(math.ceil(len(maps) / 4), 4, place)
        image = axes.imshow(phi.numpy(), vmin=0, vmax=1, aspect="auto",
                            extent=(0.5, r2 + 0.5, r1 + 0.5, 0.5))
        short = re.sub(r"^.*?(?=\w+\.\d+\.)|;.*", "", name)  # layer.5.attention.self.query
        axes.set_title(short, fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="phi(i, j)")
    names = [Path(folder).name for folder in args.adapters]
    figure.suptitle("Similarity (Eq. 4): i down, of {}; j across, of {}".format(*names))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(args.out, f"compare-{'-'.join(names)}.png"))
    return maps


if __name__ == "__main__":
    run_script("section7.py", main, parse_args)
