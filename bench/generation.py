"""How fast is greedy generation, by batch size and with an adapter, and against other ways?

    python bench/generation.py --model DIR --data gsm8k_test.jsonl --rounds 3
    python bench/generation.py --model DIR --data gsm8k_test.jsonl --against generate harness

Takes minutes on 2 cores. Other ways: one generate() of transformers for each batch, with
stop_strings, in which all rows stay to the end; and lm-evaluation-harness (pip install lm_eval).

In each round every state and batch size takes its turn on the same problems, or with --against ours
and the other way, on the base in the last of --batches. Printed are medians. The adapter, r=8 on q
and v, is random and so small that answers hardly change: its cost does not depend on its weights.
"""
import importlib.util
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from eval_gsm8k import complete, pad_left
from lora import LoRAConfig, inject_lora, lora_layers, merge_lora, strip_lora, unmerge_lora
from train_math import (Parser, add_flag, encode_prompt, format_prompt, load_model, number,
                        pick_device, pick_dtype, read_rows, run_script)


def parse_args():
    parser = Parser(description=__doc__)
    add, count = partial(add_flag, parser), number(int, 1)
    add("--model", None, "folder of the model", required=True)
    add("--data", None, ".jsonl with question and answer", required=True)
    add("--n", 64, "problems", **count)
    add("--batches", [1, 16, 32, 64], "batch sizes", nargs="+", **count)
    add("--max-new-tokens", 128, "at most", **count)
    add("--rounds", 3, "repetitions", **count)
    add("--dtype", "auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--against", nargs="+", default=[], choices=["generate", "harness"],
                        help="compare with these instead")
    return parser.parse_args()


def timed(make):
    start = time.perf_counter()
    result = make()
    return time.perf_counter() - start, result


def harness_completions(model, tokenizer, prompts, args):
    """The completions of lm-evaluation-harness for the same model in memory."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batches[-1],
                  max_length=2048)
    options = {"until": ["Question:"], "max_gen_toks": args.max_new_tokens, "do_sample": False}
    requests = [Instance(request_type="generate_until", doc={}, arguments=(prompt, options), idx=i)
                for i, prompt in enumerate(prompts)]
    return theirs.generate_until(requests, disable_tqdm=True)


def generate_completions(model, tokenizer, prompts, args):
    """The completions of one generate() a batch."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    texts = {}
    for start in range(0, len(order), args.batches[-1]):
        batch = order[start:start + args.batches[-1]]
        eos = tokenizer.eos_token_id
        ids, mask = pad_left([encoded[i] for i in batch], eos, model.device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=args.max_new_tokens,
                             do_sample=False, eos_token_id=eos, pad_token_id=eos,
                             stop_strings=["Question:"], tokenizer=tokenizer)
        decoded = tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
        texts |= {i: text.split("Question:")[0] for i, text in zip(batch, decoded)}
    return [texts[i] for i in range(len(prompts))]


def main(args):
    if "harness" in args.against and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--against harness: pip install lm_eval")
    device = pick_device("auto")
    dtype, _ = pick_dtype(args.dtype, device)
    rows = read_rows(args.data, "test", args.n)
    prompts = [format_prompt(question) for question, _ in rows]
    model, tokenizer = load_model(args.model, dtype, device)
    print(f"{len(rows)} problems, {dtype} on {device}, {args.max_new_tokens} tokens", flush=True)

    def run(batch_size):
        seconds, completions = timed(lambda: complete(model, tokenizer, prompts, batch_size,
                                                      args.max_new_tokens))
        tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids)
                     for text, _ in completions)
        return seconds, tokens, [text for text, _ in completions]

    rivals = {"harness": harness_completions, "generate": generate_completions}
    speeds, seconds, same = defaultdict(list), defaultdict(list), {}
    for _ in range(args.rounds):
        for rival in args.against:
            taken, _, ours = run(args.batches[-1])
            seconds[rival, "ours"].append(taken)
            taken, theirs = timed(lambda: rivals[rival](model, tokenizer, prompts, args))
            seconds[rival, "theirs"].append(taken)
            same[rival] = sum(a.split("Question:")[0].strip() == b.strip()
                              for a, b in zip(ours, theirs))
        if args.against:
            continue
        for batch_size in args.batches:
            taken, tokens, _ = run(batch_size)
            speeds[f"base, batch {batch_size}"].append(tokens / taken)
        inject_lora(model, LoRAConfig())
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=1e-4)
        for state, change in (("unmerged", unmerge_lora), ("merged", merge_lora)):
            change(model)
            for batch_size in sorted({args.batches[0], args.batches[-1]}):
                taken, tokens, _ = run(batch_size)
                speeds[f"{state}, batch {batch_size}"].append(tokens / taken)
        unmerge_lora(model)
        strip_lora(model)
    for name, values in speeds.items():
        print(f"{name:24}{median(values):8.1f} tokens/s  "
              f"({min(values):.1f} to {max(values):.1f})")
    for rival in args.against:
        ours, theirs = seconds[rival, "ours"], seconds[rival, "theirs"]
        ratio = median(b / a for a, b in zip(ours, theirs))
        print(f"{rival}: {median(theirs):.1f} s, ours {median(ours):.1f} s, "
              f"x{ratio:.2f}; completions equal: {same[rival]} of {len(rows)}")


if __name__ == "__main__":
    run_script("generation.py", main, parse_args)
