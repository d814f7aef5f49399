"""How do a training step's speed and peak memory change with batch, length, rank and depth?

    python bench/scaling.py --rounds 3     # 20 minutes on 2 cores; writes runs/scaling.*

SmolLM2-135M's shape with 12 layers and random weights, LoRA on q and v. Each point is a process of
its own: a warm-up step, two timed ones, the peak, and beside them the ideal, the matrix products of
the base alone (without A and B, the logits once). The picture shows medians over the rounds.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from lora import LoRAConfig, inject_lora
from train_math import (GiB, Parser, add_flag, batch_loss, collate, number, peak_memory, pick_dtype,
                        run_script, use_attention)

POINT = {"batch": 4, "length": 256, "r": 8, "layers": 12}
SWEEPS = {"batch": (1, 2, 4, 8, 16), "length": (64, 128, 256, 512), "r": (1, 8, 64, 256),
          "layers": (6, 12, 18, 24, 30)}


def parse_args():
    parser = Parser(description=__doc__)
    add_flag(parser, "--out", Path("runs/scaling"), "path of .jsonl and .png", type=Path)
    add_flag(parser, "--rounds", 1, "repetitions", **number(int, 1))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(batch, length, r, layers):
    """Run in a process of its own. Return tokens per second, the ideal's, and the peak in GiB."""
    device = torch.device("cpu")
    dtype, _ = pick_dtype("auto", device)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)).to(dtype)
    linears = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inject_lora(model, LoRAConfig(r=r))
    use_attention(model.train())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    prompt = length // 3  # as in GSM8K: a third is the question
    rows = [(torch.randint(49152, (length,)).tolist(), prompt) for _ in range(batch)]

    def step():
        loss = batch_loss(model, collate(rows, device))
        (loss / (batch * (length - prompt))).backward()
        optimizer.step()
        optimizer.zero_grad()

    def products():
        for d, k in linears:
            # Forward, and backward for the input's gradient. The head sees the targets alone.
            tokens = batch * (length - prompt if d == 49152 else length)
            x, w = torch.ones(tokens, k, dtype=dtype), torch.ones(d, k, dtype=dtype)
            (x @ w.T) @ w
        # Scores and values: two products forward, four in backward.
        q = torch.ones(batch * 3, 3 * length, 64, dtype=dtype)
        k = torch.ones(batch * 3, length, 64, dtype=dtype)
        for _ in range(3 * layers):
            (q @ k.mT) @ k

    def seconds(work, repeats):
        work()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats

    tokens = batch * length
    return {"tokens_per_s": tokens / seconds(step, 2), "peak_gib": peak_memory(device) / GiB,
            "ideal": tokens / seconds(products, 2), "dtype": str(dtype)}


def draw(points, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS), sharey="row")
    for (speed, memory), name in zip(axes.T, SWEEPS):
        chosen = [point for point in points if point["sweep"] == name]
        x = [point[name] for point in chosen]

        def medians(key):
            return [median(point[key]) for point in chosen]

        speed.plot(x, medians("tokens_per_s"), "o-", label="training step")
        speed.plot(x, medians("ideal"), "--", label="the base's matrix products alone")
        memory.plot(x, medians("peak_gib"), "o-", color="C2")
        for axis in (speed, memory):
            axis.set(xlabel={"r": "rank", "batch": "batch size"}.get(name, name))
    axes[0, 0].set(ylabel="tokens per second", ylim=(0, None))
    axes[0, 0].legend()
    axes[1, 0].set(ylabel="peak memory (GiB)", ylim=(0, None))
    figure.savefig(path, dpi=110)


def main(args):
    if args.point:
        return print(json.dumps(measure(**json.loads(args.point))))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    measured = ("tokens_per_s", "ideal", "peak_gib")
    points = [{"sweep": name, **POINT, name: value, **{key: [] for key in measured}}
              for name, values in SWEEPS.items() for value in values]
    for _ in range(args.rounds):
        for point in points:
            shape = {name: point[name] for name in POINT}
            command = [sys.executable, __file__, "--point", json.dumps(shape)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{shape} failed: {done.stderr[-500:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            point["dtype"] = result["dtype"]
            for key in measured:
                point[key].append(result[key])
            print(shape, result, flush=True)
    for point in points:
        share = median(a / b for a, b in zip(point["tokens_per_s"], point["ideal"]))
        speed = median(point["tokens_per_s"])
        print(f"{point['sweep']:7}{point[point['sweep']]:4}{speed:8.1f} tokens/s  "
              f"{share:.0%} of the base's products alone  {median(point['peak_gib']):.2f} GiB")
    args.out.with_suffix(".jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    try:
        draw(points, args.out.with_suffix(".png"))
    except ImportError:
        print("no picture: pip install matplotlib")


if __name__ == "__main__":
    run_script("scaling.py", main, parse_args)
