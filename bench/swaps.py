"""Many adapters over one base: how long does a swap take, and do answers and memory stay the same?

    python bench/swaps.py --model DIR

Saves adapters of ranks 1 to 16 with random weights and notes the logits of each. Then loads all of
them in turn, twice, and compares the logits. A swap is load_adapter: read, check, replace.
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter, strip_lora
from train_math import Parser, add_flag, load_model, number, pick_dtype, run_script


def parse_args():
    parser = Parser(description=__doc__)
    add_flag(parser, "--model", None, "folder of the model", required=True)
    add_flag(parser, "--adapters", 100, "how many", **number(int, 1))
    return parser.parse_args()


def resident():
    """MiB that the process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(args):
    device = torch.device("cpu")
    dtype, _ = pick_dtype("auto", device)
    model, tokenizer = load_model(args.model, dtype, device)
    ids = tokenizer("Question: How many are 3 and 4?\nAnswer:", return_tensors="pt").input_ids

    @torch.no_grad()
    def logits():
        return model(ids).logits[0, -1]

    with tempfile.TemporaryDirectory() as folder:
        answers = []
        for i in range(args.adapters):
            config = LoRAConfig(r=2**(i % 5))
            torch.manual_seed(i)
            inject_lora(model, config)
            for _, layer in lora_layers(model):
                torch.nn.init.normal_(layer.lora_B, std=0.02)
            save_adapter(model, f"{folder}/{i}")
            answers.append(logits())
            strip_lora(model)
        before, seconds, exact = resident(), [], 0
        for _ in range(2):
            for i, answer in enumerate(answers):
                start = time.perf_counter()
                load_adapter(model, f"{folder}/{i}")
                seconds.append(time.perf_counter() - start)
                exact += torch.equal(logits(), answer)
    different = len({tuple(answer[:8].tolist()) for answer in answers})
    print(f"{args.adapters} adapters, {different} different answers, {len(seconds)} swaps: median "
          f"{1000 * statistics.median(seconds):.0f} ms, longest {1000 * max(seconds):.0f} ms")
    print(f"logits equal to the bit: {exact} of {len(seconds)}; process {before:.0f} MiB before, "
          f"{resident():.0f} after")


if __name__ == "__main__":
    run_script("swaps.py", main, parse_args)
