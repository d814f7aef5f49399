"""Do the claims of LoRA Without Regret (Schulman et al. 2025) hold for a small encoder on SST-2?

    python bench/regret.py --model minilm-l6 --data sst2        # 85 runs on a CPU: hours
    python bench/regret.py --lines results/sst2-regret.jsonl    # table and picture: seconds

A run of train_sst2.py takes 10,000 training sentences, one epoch; the judge is the loss on the last
2,000, not trained on. The validation split is never read. Learning rates go in factors of two, six
at least (four with batches of 256), and on until the best, for seed 0, lies at no edge. Then come
seeds 1 and 2 at the best, and at its neighbours (with batches of 256 at the best alone).
Processes with different --only can share the work: all append to --lines.

Printed: the best rate of each setting, and the differences that the published claims are about,
paired by seed, with Student's 95% interval over three seeds. Drawn: loss against learning rate.
"""
import json
import math
import os
import sys
from pathlib import Path

import pandas  # comes with datasets

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_sst2
from train_math import Parser, loading, run_script

ATTENTION = ["query", "key", "value", "attention.output.dense"]
# "output.dense" alone would end attention's too.
MLP = ["intermediate.dense", *(f"{layer}.output.dense" for layer in range(6))]
# Rank (None: full fine-tuning) and targets. Attention's and the MLP's budgets are equal.
SETTINGS = {"all linear, r=1": (1, ["all-linear"]), "all linear, r=8": (8, ["all-linear"]),
            "all linear, r=64": (64, ["all-linear"]), "attention, r=10": (10, ATTENTION),
            "MLP, r=8": (8, MLP), "full": (None, None)}
LARGE = ("all linear, r=8", "full")  # also with batches of 256
T_975 = 4.303  # Student's t with three values


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", help="folder of MiniLM-L6")
    add("--data", help="folder with SST-2's train.jsonl")
    add("--out", default="runs/regret", help="folder of runs and picture (default: runs/regret)")
    add("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING",
        help="settings to run (default: all)")
    add("--lines", type=Path, help="finished runs (default: regret.jsonl in --out)")
    args = parser.parse_args()
    args.lines = args.lines or Path(args.out, "regret.jsonl")
    if bool(args.model) != bool(args.data):
        parser.error("give both --model and --data, or neither")
    return args


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_data(source, folder):
    """Write the last 2,000 training sentences as validation, and the others as train."""
    lines = Path(source, "train.jsonl").read_text(encoding="utf8").splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", lines[:-2000]), ("validation", lines[-2000:])):
        own = folder / f"{split}.{os.getpid()}"  # another process may be reading the file
        own.write_text("".join(part), encoding="utf8")
        own.replace(folder / f"{split}.jsonl")


def run(args, setting, power, seed, batch=32):
    """Return the held-out loss at learning rate 2**power, from --lines or by a new run."""
    key = {"setting": setting, "lr_power": power, "seed": seed, "batch_size": batch}
    for line in read_lines(args.lines):
        if key.items() <= line.items():
            return line["val_loss"]
    (r, targets), rate = SETTINGS[setting], str(2.0**power)
    flags = ["--ranks", str(r), "--targets", *targets, "--lr", rate] if r else \
        ["--ranks", "--full-finetune", "--full-lr", rate]
    name = f"{setting.replace(' ', '-')}-{power}-{seed}-{batch}"
    line, = train_sst2.main(train_sst2.parse_args([
        "--model", args.model, "--data", f"{args.out}/data", "--out", f"{args.out}/{name}",
        "--nb-samples", "10000", "--epochs", "1", "--batch-size", str(batch),
        "--dtype", "float32", "--seeds", str(seed), *flags]))
    kept = ("val_loss", "accuracy", "n", "trainable", "train_loss", "dtype")
    with open(args.lines, "a") as file:
        file.write(json.dumps({**key, **{name: line[name] for name in kept}}) + "\n")
    return line["val_loss"]


def sweep(args, setting, powers, batch=32):
    """Return the learning rate, as a power of 2, that is best for seed 0 and lies at no edge."""
    losses = {power: run(args, setting, power, 0, batch) for power in powers}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)):
        power = best + (1 if best == max(losses) else -1)
        losses[power] = run(args, setting, power, 0, batch)
    return best


def make_runs(args):
    best = {}  # by setting and batch size
    for setting in args.only:
        powers = range(-16, -10) if setting == "full" else range(-12, -6)
        best[setting, 32] = sweep(args, setting, powers)
    for setting in set(LARGE) & set(args.only):
        power = best[setting, 32]
        best[setting, 256] = sweep(args, setting, range(power, power + 4), 256)
    for (setting, batch), power in best.items():
        for seed in (1, 2):
            run(args, setting, power, seed, batch)
    for setting in args.only:
        for neighbour in (-1, 1):
            for seed in (1, 2):
                run(args, setting, best[setting, 32] + neighbour, seed)


def interval(values, sign=""):
    """Return the mean of the seeds' values, and of three half a 95% interval."""
    mean = f"{values.mean():{sign}.4f}"
    if len(values) < 3:
        return f"{mean} (seeds: {len(values)})"
    return f"{mean} +/- {T_975 * values.std() / math.sqrt(3):.4f}"


def report(table, picture):
    """Print the best rates and the differences, and draw the curves."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    table["setting"] = pandas.Categorical(table.setting, [*SETTINGS])  # in this order
    best = {}  # (setting, batch): losses by seed, at the best learning rate
    for (batch, setting), runs in table.groupby(["batch_size", "setting"], observed=True):
        losses = runs.pivot(index="seed", columns="lr_power", values="val_loss")
        whole = losses.dropna(axis=1)  # rates that all seeds so far have seen
        power = whole.mean().idxmin()
        if len(whole) == 3:
            best[setting, batch] = whole[power]
        accuracy = runs[runs.lr_power == power].accuracy.mean()
        print(f"{setting:16s} batch {batch:3d} {runs.trainable.iloc[0]:10,} weights, best at 2^"
              f"{power} = {2.0**power:.1e}: loss {interval(whole[power])}, accuracy {accuracy:.1%}")
        if batch == 32:
            line, = axes.plot(2.0**losses.columns, losses.mean(), label=setting)
            axes.plot(2.0**runs.lr_power, runs.val_loss, ".", color=line.get_color(), alpha=0.5)
            axes.plot(2.0**power, losses[power].mean(), "o", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set(xlabel="learning rate", ylabel="loss on 2,000 held-out sentences (nats; cut at 0.5)",
             ylim=(0.25, 0.5), title="MiniLM-L6, 10,000 sentences of SST-2, one epoch, batch 32\n"
             "lines: mean of the seeds run; small dots: the runs; large dots: the best rate")
    axes.legend()
    axes.figure.savefig(picture, dpi=120)

    pairs = [("attention, r=10", "MLP, r=8"), ("MLP, r=8", "all linear, r=8"),
             ("all linear, r=1", "all linear, r=64"),
             *((f"all linear, r={r}", "full") for r in (1, 8, 64))]
    pairs = [((first, 32), (second, 32)) for first, second in pairs]
    pairs += [((name, 256), (name, 32)) for name in LARGE]
    for first, second in pairs:
        if best.keys() >= {first, second}:
            difference = interval(best[first] - best[second], "+")
            print("{}, batch {} minus {}, batch {}: {}".format(*first, *second, difference))
    cost = [best[name, 256] - best[name, 32] for name in LARGE if (name, 256) in best]
    if len(cost) == 2:
        print(f"what the large batch costs, r=8 minus full: {interval(cost[0] - cost[1], '+')}")


def main(args):
    if args.model:
        write_data(args.data, Path(args.out, "data"))
        make_runs(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with loading("--lines", args.lines):
        lines = read_lines(args.lines)
        if not lines:
            raise ValueError("no runs yet, give --model and --data to make them")
        report(pandas.DataFrame(lines), Path(args.out, f"{args.lines.stem}.png"))


if __name__ == "__main__":
    run_script("regret.py", main, parse_args)
