"""SST-2: LoRA against full fine-tuning, paired by seed, with a 95% interval of the difference.

    python bench/sst2_pairs.py runs/sst2/sst2.jsonl     # a file with both, and the same seeds

The interval (Student's t over the seeds) says how far other seeds would move the mean difference on
these validation sentences. It does not say how far other sentences would.
"""
import argparse
import json
import math
import statistics
from pathlib import Path

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def describe(key, lora, full, scale, unit, digits):
    seeds = sorted(lora.keys() & full.keys())
    values = [[scale * runs[seed][key] for seed in seeds] for runs in (lora, full)]
    for name, column in zip(("LoRA", "full"), values):
        listed = ", ".join(f"{value:.{digits}f}" for value in column)
        print(f"{key}, {name}: {statistics.fmean(column):.{digits}f}{unit}, standard deviation "
              f"{statistics.stdev(column):.{digits}f}, seeds {seeds}: {listed}")
    differences = [a - b for a, b in zip(*values)]
    mean = statistics.fmean(differences)
    half = T_975[len(seeds)] * statistics.stdev(differences) / math.sqrt(len(seeds))
    print(f"{key}, LoRA minus full: {mean:+.{digits}f}{unit}, 95% interval "
          f"{mean - half:+.{digits}f} to {mean + half:+.{digits}f}, {len(seeds)} pairs")


def main(args):
    lora, full = {}, {}
    for line in args.runs.read_text(encoding="utf8").splitlines():
        run = json.loads(line)
        run.setdefault("val_loss", run.get("loss"))  # its name in older files
        (full if run["r"] is None else lora)[run["seed"]] = run
    if len(lora.keys() & full.keys()) not in T_975:
        raise SystemExit("expected 2 to 10 seeds that both LoRA and full fine-tuning have")
    describe("accuracy", lora, full, 100, " points", 2)
    describe("val_loss", lora, full, 1, "", 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="sst2.jsonl of one rank and of full fine-tuning")
    main(parser.parse_args())
