"""Does the default experiment run on a CUDA GPU under --vram 4, and what does it take?

    python bench/gpu.py --data gsm8k_train.jsonl

Needs a CUDA GPU, all of it for a true speed. The model has TinyLlama-1.1B's shape and random
weights. Printed:
    training    20 steps of train_math.py's defaults, in each precision: the peak predicted from the
                largest batch and the run's, tokens/s, the loss, steps skipped by the loss scaling
    resuming    from the checkpoint before the last: is the adapter the same to the bit
    scoring     base, adapter and merged export of 32 problems, by eval_gsm8k.py
    merging     merged logits against W0 + s B A unmerged, and whether unmerge gives every bit back
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from lora import LoRAConfig, inject_lora, lora_layers, merge_lora, unmerge_lora
from train_math import Parser, add_flag, load_model, run_script

SETTINGS = ["--dtype float16", "--dtype float16 --checkpoint-activations", "--dtype bfloat16",
            "--dtype float16 --nf4", "--dtype float16 --nf4 --targets all-linear --r 16",
            "--dtype bfloat16 --nf4 --targets all-linear --r 16 --checkpoint-activations"]


def parse_args():
    parser = Parser(description=__doc__)
    add_flag(parser, "--data", None, ".jsonl of GSM8K", required=True, type=os.path.abspath)
    add_flag(parser, "--work", Path("runs/gpu"), "new folder for what is made", type=Path)
    return parser.parse_args()


def make_model(folder, texts):
    """Write a Llama of TinyLlama's shape, and a byte-level tokenizer of 2,000 pieces."""
    from memory import SHAPES
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(texts, vocab_size=2000, special_tokens=["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, bos_token="<s>",
                            eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(
            **SHAPES["TinyLlama-1.1B"], bos_token_id=0, eos_token_id=1))
    model.to(torch.bfloat16).save_pretrained(folder)


def run(script, flags, work):
    """Run one of the scripts in `work`; return what it printed."""
    done = subprocess.run([sys.executable, str(ROOT / script), *flags.split()], cwd=work,
                          capture_output=True, text=True)
    if done.returncode:
        print(f"FAILED: {script} {flags}\n{done.stderr[-1500:]}", flush=True)
    return done.stdout


def run_training(flags, name, args):
    return run("train_math.py", f"--model model --data {args.data} --nb-samples 160 --epochs 1 "
               f"--vram 4 --run-name {name} {flags}", args.work)


def train(flags, name, args):
    """Train; print the predicted peak, the peak and what the log says."""
    printed = run_training(flags, name, args)
    found = re.search(r"(\S+) peak\n.*peak memory (.*) GiB\.", printed, re.DOTALL)
    if not found:
        return
    predicted, peak = map(float, found.groups())
    kept = re.search(r"activations (kept|recomputed)", printed)[1]
    log = [json.loads(line) for line in open(args.work / f"runs/{name}/metrics.jsonl")]
    log = [line for line in log if "loss" in line]  # step 0 has a held-out loss alone
    later = log[5:]  # the first steps load kernels
    seconds = sum(line["tokens"] / line["tokens_per_s"] for line in later)
    speed = sum(line["tokens"] for line in later) / seconds
    skipped = sum(line["skipped"] for line in log)
    print(f"{flags:84} {kept:10} predicted {predicted:.2f}, run {peak:.2f} GiB "
          f"({predicted / peak - 1:+.0%}), {speed:,.0f} tokens/s, loss {log[0]['loss']:.3f} to "
          f"{log[-1]['loss']:.3f}, {skipped} skipped", flush=True)


def resume(flags, name, args):
    """Take the last checkpoint away, resume from the one before, and compare the two."""
    last = args.work / f"checkpoints/{name}/step_000020"
    aside = last.rename(last.parent / "before")
    printed = run_training(f"{flags} --resume", name, args)
    start = re.search("starting from (.*)", printed)[1]
    from safetensors.torch import load_file
    first, second = (load_file(path / "adapter_model.safetensors") for path in (aside, last))
    apart = max(float((first[key] - second[key]).abs().max()) for key in first)
    print(f"resumed from {start}, {flags}: adapters differ by at most {apart:.1e}", flush=True)


def score(flags, name, args):
    """Score base and adapter on 32 problems, export the merged model, and score it too."""
    problems = f"--data {args.data} --nb-samples 32 --max-new-tokens 32 {flags}"
    adapter = f"--model model --adapter checkpoints/{name}/step_000020"
    printed = run("eval_gsm8k.py", f"{adapter} {problems} --out scores-{name}", args.work)
    run("eval_gsm8k.py", f"{adapter} --save-merged merged-{name} {flags}", args.work)
    printed += run("eval_gsm8k.py", f"--model merged-{name} {problems} --out scores-merged-{name}",
                   args.work)
    done = [line.partition(":")[0] for line in printed.splitlines() if "of 32" in line]
    print(f"scored, {flags}: {', '.join(done)}", flush=True)


def merging(args):
    """Compare merged and unmerged logits; unmerge and compare the base with what it was."""
    for dtype, nf4 in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, False),
                       (torch.float16, True)):
        model, _ = load_model(str(args.work / "model"), dtype, torch.device("cuda"), nf4)
        inject_lora(model, LoRAConfig(r=8, targets="all-linear"))
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.002)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        ids = torch.arange(64, device="cuda")[None]
        with torch.no_grad():
            unmerged = model(ids).logits.float()
            merged = merge_lora(model)(ids).logits.float()
        unmerge_lora(model)
        same = all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        apart = float((merged - unmerged).norm() / unmerged.norm())
        print(f"merged in {str(dtype)[6:]}{' over NF4' * nf4}: logits differ by {apart:.1e} of "
              f"their norm; unmerged: {'every bit is back' if same else 'THE BASE HAS CHANGED'}",
              flush=True)
        del model, before


def main(args):
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    args.work.mkdir(parents=True)
    make_model(args.work / "model", open(args.data).read().splitlines())
    for number, flags in enumerate(SETTINGS):
        train(flags, f"setting{number}", args)
    for number in (0, 4):
        resume(SETTINGS[number], f"setting{number}", args)
    score("--dtype float16", "setting0", args)
    score("--dtype float16 --nf4", "setting4", args)
    merging(args)


if __name__ == "__main__":
    run_script("gpu.py", main, parse_args)
