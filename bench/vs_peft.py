"""Is a training step of train_math.py faster than PEFT's, and does it take less memory?

    python bench/vs_peft.py --model DIR --data gsm8k_train.jsonl --rounds 3 [-- FLAGS OF OURS]

Takes about five minutes a round on 2 cores. Needs PEFT: pip install peft
Each round runs three fresh processes in turn, so that a machine that drifts slows all three:
    ours        train_math.py with its defaults for everything that is not the work itself
    peft        get_peft_model and Trainer's defaults, but bf16 by autocast over a float32 base
    peft-tuned  base weights in bf16, batches by length, gradient checkpointing
Printed: unpadded tokens per second of the training steps (ours with clipping and the optimizer's
step, PEFT's without), the process's peak memory (on a GPU the allocator's), the mean loss, and the
ratios, as medians over the rounds. A mean loss that differs by 0.05 or more is reported as
different work. On a CPU without bf16 units, and with --dtype float32, all run in float32.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from train_math import GiB, Parser, add_flag, encode, number, peak_memory, read_rows, run_script


def parse_args():
    parser = Parser(description=__doc__)
    add, count = partial(add_flag, parser), number(int, 1)
    path = {"type": os.path.abspath, "required": True}  # ours runs in a folder of its own
    add("--model", None, "folder of the model", **path)
    add("--data", None, ".jsonl with question and answer", **path)
    add("--steps", 10, "steps of each process", **count)
    add("--batch", 8, "rows a step", **count)
    add("--rounds", 1, "repetitions", **count)
    add("--targets", ["q_proj", "v_proj"], "layers to adapt, or all-linear", nargs="+")
    add("--dtype", "auto", choices=["auto", "float32"])
    add("--out", None, "append a line per round to this .jsonl", type=os.path.abspath)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="behind --: flags for train_math.py")
    return parser.parse_args()


def pick_dtype(args):
    units = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cuda.is_available()
    return torch.bfloat16 if units and args.dtype == "auto" else torch.float32


def examples(args, tokenizer):
    """Return the rows that ours trains on, in the form that Trainer takes."""
    rows = read_rows(args.data, "train", args.batch * args.steps)
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "length": len(ids),
             "labels": [-100] * prompt + ids[prompt:]}
            for ids, prompt in encode(rows, tokenizer, 512)]


def run_peft(args):
    """Run in a process of its own. Print one line of JSON."""
    from peft import LoraConfig, get_peft_model
    from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer,
                              TrainingArguments)
    tuned, half, cuda = args.child == "peft-tuned", pick_dtype(args), torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = examples(args, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=half if tuned else torch.float32)
    targets = args.targets[0] if args.targets == ["all-linear"] else args.targets
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets,
                                             task_type="CAUSAL_LM"))
    if tuned:
        model.enable_input_require_grads()
    seconds = []

    class Timed(Trainer):
        def training_step(self, *args, **kwargs):
            start = time.perf_counter()
            result = super().training_step(*args, **kwargs)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            return result

    by_length = {"train_sampling_strategy": "group_by_length"} if tuned else {}
    options = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=args.batch, num_train_epochs=1,
        learning_rate=3e-4, bf16=not tuned and half == torch.bfloat16, use_cpu=not cuda,
        gradient_checkpointing=tuned, logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, seed=0, **by_length)
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    loss = Timed(model, options, collator, rows).train().training_loss
    print(json.dumps({"tokens_per_s": sum(row["length"] for row in rows) / sum(seconds),
                      "loss": loss, "peak_gib": peak_memory(model.device) / GiB}))


def run_ours(args):
    work = tempfile.mkdtemp()
    flags = (f"--nb-samples {args.batch * args.steps} --epochs 1 --batch-size {args.batch} "
             "--grad-accum 1 --dropout 0 --warmup-steps 0 --val-samples 0 --run-name bench "
             f"--dtype {str(pick_dtype(args))[6:]}")
    command = [sys.executable, str(ROOT / "train_math.py"), "--model", args.model, "--data",
               args.data, "--targets", *args.targets, *flags.split(), *args.flags]
    if subprocess.run(command, cwd=work, stdout=subprocess.DEVNULL).returncode:
        raise ValueError("train_math.py failed, see above")
    steps = [json.loads(line) for line in open(f"{work}/runs/bench/metrics.jsonl")]
    seconds = sum(step["tokens"] / step["tokens_per_s"] for step in steps)
    return {"tokens_per_s": sum(step["tokens"] for step in steps) / seconds,
            "loss": fmean(step["loss"] for step in steps),
            "peak_gib": steps[-1]["peak_memory_gib"]}


def run_child(kind):
    command = [sys.executable, __file__, "--child", kind, *sys.argv[1:]]
    env = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}  # torch's default, which our imports change
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise ValueError(f"{kind} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args):
    if importlib.util.find_spec("peft") is None:
        raise ValueError("PEFT is missing: pip install peft")
    if args.child:
        return run_peft(args)
    print(f"products in {pick_dtype(args)}", flush=True)
    rounds, kinds = [], ("peft", "peft-tuned")
    for n in range(1, args.rounds + 1):
        rounds.append({"ours": run_ours(args), **{kind: run_child(kind) for kind in kinds}})
        for name, result in rounds[-1].items():
            print(f"round {n}  {name:10}  {result['tokens_per_s']:7.1f} tokens/s  "
                  f"{result['peak_gib']:5.2f} GiB  loss {result['loss']:.4f}", flush=True)
        if args.out:
            setting = {"targets": args.targets, "steps": args.steps, "flags": args.flags,
                       "dtype": str(pick_dtype(args))[6:],
                       "huge_pages": os.environ["THP_MEM_ALLOC_ENABLE"]}  # of ours
            with open(args.out, "a") as file:
                file.write(json.dumps(setting | rounds[-1]) + "\n")
    for other in kinds:
        pairs = [(row["ours"], row[other]) for row in rounds]
        speed = median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)
        memory = median(a["peak_gib"] / b["peak_gib"] for a, b in pairs)
        same = all(abs(a["loss"] - b["loss"]) < 0.05 for a, b in pairs)
        print(f"ours / {other}: speed x{speed:.2f}, memory x{memory:.2f}"
              f"{'' if same else ', DIFFERENT WORK'}")


if __name__ == "__main__":
    run_script("vs_peft.py", main, parse_args)
