"""GSM8K: prompt, data, answer extraction, batched greedy generation, scores with intervals.

    python eval_gsm8k.py --adapter checkpoints/lora-r8-MetaMathQA    # all its checkpoints
    python eval_gsm8k.py --model DIR --data test.jsonl               # the base alone, from files
    python eval_gsm8k.py --adapter DIR --save-merged merged          # export W0 + s B A
    torchrun --nproc-per-node 2 -- eval_gsm8k.py --adapter DIR       # on two GPUs

The base is always scored, and each adapter compared with it. In --out: NAME-DATA.json (scores),
NAME-DATA.jsonl (every completion) and, with matplotlib, a chart.

Completions that end in "#### n" score as in lm-evaluation-harness (gsm8k, strict and flexible).
Different on purpose: "The answer is n" (MetaMathQA) counts too, and wins over "#### n"; flexible
takes the last number where neither stands; numbers compare by value: $29.00 is 29, 0.5 is 1/2.
--shots takes rows of the same file.
"""
import json
import math
import os
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from lora import dequantize_nf4, load_adapter, merge_lora, strip_lora
from train_math import (BASE_MODEL, RANK, WORLD, Parser, check_ids, checkpoints, encode_prompt,
                        format_prompt, gather, join_processes, load_model, loading, number,
                        pick_device, pick_dtype, read_rows, run_script)


# --- command line ---

def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add, count = parser.add_argument, number(int, 1)
    add("--model", default=BASE_MODEL, help="Hub id or folder of the base model")
    add("--adapter", nargs="+", action="extend", default=[], metavar="DIR", help="adapters or runs")
    add("--data", default="openai/gsm8k", help="Hub id, or .jsonl/.json/.parquet/.csv")
    add("--nb-samples", type=count, help="the first N problems (default: all)")
    add("--batch-size", type=count, default=16, help="problems at once")
    add("--max-new-tokens", type=count, default=256, help="longest completion")
    add("--shots", type=number(int, 0), default=0, help="first rows, shown as examples")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--nf4", action="store_true", help="hold the base's linear layers in 4 bits (QLoRA)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of torch; greedy draws nothing")
    add("--save-merged", metavar="DIR", help="write the merged model, and score it")
    add("--out", default="eval_results", help="folder for the scores")
    return parser.parse_args(argv)


# --- answers ---

def extract_answer(completion, flexible=False):
    """Return the number that a completion answers, a Fraction, or None.

    Strict: the first number in the line of text after the last "The answer is", else the first
    "#### n".
    Flexible: the last "#### n" instead, else the last number.
    """
    text = completion.split("Question:")[0]  # what follows is a question of its own
    # The lookahead leaves the rest of the line to the next match.
    said = re.findall(r"the answer is[: \n]*(?=(.*))", text, re.IGNORECASE)
    hashed = re.findall(r"####\s*([^\s#]+)", text)
    if flexible:
        hashed.reverse()
    for place in said[-1:] + hashed:
        if numbers := find_numbers(place):
            return numbers[0]
    numbers = find_numbers(text) if flexible else []
    return numbers[-1] if numbers else None


# A sign (in 10-5 the minus is an operator), a number, a denominator: a whole number, not 0.
NUMBER = re.compile(r"((?<![\w)])-)?\$?([0-9]*\.?[0-9]+)(?: ?/ ?(0*[1-9][0-9]*)(?!\.?[0-9]))?")
sys.set_int_max_str_digits(0)  # a model may repeat one digit thousands of times


def find_numbers(text):
    """Return every number in a text, exact."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)  # 1,234 is one number, 1,2 are two
    return [Fraction(sign + number) / int(denominator or 1)
            for sign, number, denominator in NUMBER.findall(text)]


# --- generation ---

def complete(model, tokenizer, prompts, batch_size=16, max_new_tokens=256):
    """Return greedy completions, in the order of the prompts: [(text, cut off)]."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_ids(model, encoded, max_new_tokens)
    own = model.generation_config
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    eos = [tokenizer.eos_token_id, *{*stops} - {None}]
    # The checkpoint's own settings may ask for sampling, and its pad id may have no embedding.
    # The tokenizer's EOS pads: decoding skips it.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=eos, pad_token_id=eos[0], return_dict_in_generate=True)
    # Like lengths share a batch, to save padding. The longest first: out-of-memory comes soon.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    starts = range(0, len(order), batch_size)[RANK::WORLD]
    completions = {}
    for start in tqdm(starts, unit="batch", disable=RANK > 0 or None):
        batch = {i: encoded[i] for i in order[start:start + batch_size]}
        completions |= complete_batch(model, tokenizer, batch, eos, max_new_tokens)
    model.generation_config = own
    for others in gather(completions):
        completions |= others
    return [completions[i] for i in range(len(prompts))]


def complete_batch(model, tokenizer, prompts, eos, max_new_tokens):
    """Complete {i: token ids} as {i: (text, cut off)}.

    Every 16 tokens, rows that have ended leave the batch: kept, they would cost as much as the
    longest. A state (Mamba) has no rows that could leave.
    """
    piece = max_new_tokens if model._is_stateful else 16
    # The mask comes from the lengths: ids cannot tell padding from an EOS.
    width = max(map(len, prompts.values()))
    ids = [[eos[0]] * (width - len(prompt)) + prompt for prompt in prompts.values()]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts.values()]
    ids, mask = torch.tensor([ids, mask], device=model.device)
    rows, cache, completions = list(prompts), None, {}
    while rows:
        length = min(ids.shape[1] + piece, width + max_new_tokens)
        out = model.generate(ids, attention_mask=mask, max_length=length, past_key_values=cache)
        keep = []
        for place, new in enumerate(out.sequences[:, width:].tolist()):
            text, asks, _ = tokenizer.decode(new, skip_special_tokens=True).partition("Question:")
            ended = asks or any(token in eos for token in new)
            if ended or len(new) == max_new_tokens:
                completions[rows[place]] = text + asks, not ended
            else:
                keep.append(place)
        rows = [rows[place] for place in keep]
        ids = out.sequences[keep]
        mask = torch.cat([mask[keep], mask.new_ones(len(keep), piece)], 1)
        if rows:
            cache = out.past_key_values
            cache.reorder_cache(torch.tensor(keep, device=model.device))
    return completions


# --- scores ---

def wilson_interval(correct, n, z=1.959964):
    """Return a proportion's 95% interval (Wilson 1927), which holds near 0 and 1 too."""
    centre = (correct + z * z / 2) / (n + z * z)
    half = z * math.sqrt(correct * (n - correct) / n + z * z / 4) / (n + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(first, second):
    """Return the exact two-sided p that two models are equally good (McNemar 1947).

    Of the problems that one alone solves, each falls either way with probability 1/2.
    """
    pairs = list(zip(first, second, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def answer(model, tokenizer, rows, shots=0, batch_size=16, max_new_tokens=256):
    """Return a record per problem. The first `shots` rows are worked examples in every prompt."""
    examples = "".join(f"{format_prompt(q)} {a}\n\n" for q, a in rows[:shots])
    rows = rows[shots:]
    references = [extract_answer(solution, flexible=True) for _, solution in rows]
    if not rows or None in references:
        raise ValueError("--data needs a problem after --shots, and a number in each answer")
    prompts = [examples + format_prompt(question) for question, _ in rows]
    completions = complete(model, tokenizer, prompts, batch_size, max_new_tokens)
    records = []
    for (question, _), reference, (text, cut_off) in zip(rows, references, completions):
        strict, flexible = extract_answer(text), extract_answer(text, flexible=True)
        records.append(dict(
            question=question, completion=text, reference=reference, answer=strict,
            answer_flexible=flexible, correct=strict == reference,
            correct_flexible=flexible == reference, truncated=cut_off))
    return records


def summarise(records, base=None):
    """Return counts, accuracies, 95% interval, and an exact p against the base's records."""
    n, correct = len(records), [record["correct"] for record in records]
    flexible = sum(record["correct_flexible"] for record in records)
    result = dict(
        n=n, correct=sum(correct), accuracy=sum(correct) / n,
        ci95=wilson_interval(sum(correct), n),
        correct_flexible=flexible, accuracy_flexible=flexible / n,
        no_answer=sum(record["answer"] is None for record in records),
        truncated=sum(record["truncated"] for record in records))
    if base:
        result["p_value"] = mcnemar_p([record["correct"] for record in base], correct)
    return result


def describe(name, result):
    """Return a result in one line."""
    low, high = result["ci95"]
    line = (f"{name}: {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {result['n']}  "
            f"flexible {result['accuracy_flexible']:.1%}  no answer {result['no_answer']}  "
            f"cut off {result['truncated']}")
    if "p_value" in result:
        line += f"  p {result['p_value']:.2g} against the base"
    return line


# --- a run of evaluations ---

def plan(args, settings):
    """Return {score file: (name, settings)} of base, adapters or checkpoints, merged model."""
    evaluations = [("base", None)]
    for folder in args.adapter:
        for path in checkpoints(folder) or [Path(folder)]:
            run, name = path.resolve().parts[-2:]
            evaluations.append((f"{run}-{name}" if name.startswith("step_") else name, str(path)))
    if args.save_merged:
        if len(evaluations) != 2 or Path(args.save_merged).exists():
            raise ValueError("--save-merged takes exactly one adapter, and a new folder")
        name, folder = evaluations[-1]
        evaluations.append((f"{name}-merged", folder))
    runs = {}
    for name, folder in evaluations:
        path = Path(args.out, f"{name}-{Path(args.data).stem}.json")
        result = settings | {"adapter": folder}
        old = result
        if path.exists():
            with loading("--out", path):
                old = dict(json.loads(path.read_text()))
        if path in runs or not result.items() <= old.items():
            raise ValueError(f"{path} is another evaluation's: rename a folder, or change --out")
        runs[path] = name, result
    return runs


def main(args):
    """Score the base, each adapter, and the merged model."""
    torch.manual_seed(args.seed)
    device = join_processes(pick_device(args.device))
    dtype, reason = pick_dtype(args.dtype, device)
    rows = read_rows(args.data, "test", args.nb_samples and args.nb_samples + args.shots)
    settings = dict(
        model=args.model, data=args.data, dtype=str(dtype)[6:], nf4=args.nf4, shots=args.shots,
        max_new_tokens=args.max_new_tokens, n=len(rows) - args.shots)
    runs = plan(args, settings)
    os.makedirs(args.out, exist_ok=True)
    model, tokenizer = load_model(args.model, dtype, device, args.nf4)
    for _, result in runs.values():  # a broken adapter ends the run now, not after an hour
        if result["adapter"]:
            load_adapter(model, result["adapter"])
    strip_lora(model)

    print(f"{args.model} on {device} in {dtype} ({reason}): {settings['n']} problems, "
          f"scores in {args.out}/", flush=True)
    base, last = None, [*runs][-1]
    for path, (name, result) in runs.items():
        if result["adapter"]:
            load_adapter(model, result["adapter"])
        if args.save_merged and path == last:
            model = strip_lora(merge_lora(model))
            dequantize_nf4(model)  # with --nf4, the layers without an adapter
            if RANK == 0:
                model.save_pretrained(args.save_merged)
                tokenizer.save_pretrained(args.save_merged)
        start = time.perf_counter()
        records = answer(model, tokenizer, rows, args.shots, args.batch_size, args.max_new_tokens)
        result |= summarise(records, base) | {"seconds": round(time.perf_counter() - start, 1)}
        base = base or records
        print(describe(name, result), flush=True)
        if RANK == 0:
            lines = [json.dumps(record, default=str) + "\n" for record in records]
            path.with_suffix(".jsonl").write_text("".join(lines))
            path.write_text(json.dumps(result, indent=2) + "\n")
    if RANK == 0:
        plot(last.with_suffix(".png"), runs.values())


def plot(path, runs):
    """Draw the accuracies with their intervals, the base lowest."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure(figsize=(8, len(runs) / 2 + 1), layout="constrained").subplots()
    for name, result in runs:
        axes.plot([*result["ci95"], result["accuracy"]], [name] * 3, "|-", color="C0")
    axes.set_title(f"{path.stem}: strict accuracy of {result['n']}, 95% intervals")
    axes.figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script("eval_gsm8k.py", main, parse_args)
