"""SST-2: how far apart are LoRA and full fine-tuning, in pairs of one seed?

    python bench/sst2_pairs.py runs/sst2/sst2.jsonl     # seconds; one rank and full, the same seeds

From low to high is the mean's 95% interval by Student's t over the seeds. It says how far other
seeds would move it on these validation sentences, not how far other sentences would.
"""
import math
import sys
from pathlib import Path

import pandas  # comes with datasets

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from train_math import Parser, loading, run_script

T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", help="sst2.jsonl of one rank and of full fine-tuning")
    return parser.parse_args()


def main(args):
    with loading("file", args.runs):
        runs = pandas.read_json(args.runs, lines=True)
        runs = runs.rename(columns={"loss": "val_loss"})  # its name in older files
        runs["kind"] = runs.r.isna().map({True: "full", False: "LoRA"})
        for key, unit, scale, digits in ("accuracy", "%", 100, 2), ("val_loss", "nats", 1, 3):
            pairs = scale * runs.pivot(index="seed", columns="kind", values=key).dropna()
            if len(pairs) not in T_975:
                raise ValueError("expected 2 to 10 seeds that LoRA and full fine-tuning share")
            pairs["LoRA minus full"] = pairs.LoRA - pairs.full
            mean, std = pairs.mean(), pairs.std()
            half = T_975[len(pairs)] * std / math.sqrt(len(pairs))
            table = pairs.T.assign(mean=mean, std=std, low=mean - half, high=mean + half)
            print(f"{key} ({unit})\n{table.to_string(float_format=f'{{:.{digits}f}}'.format)}")


if __name__ == "__main__":
    run_script("sst2_pairs.py", main, parse_args)
