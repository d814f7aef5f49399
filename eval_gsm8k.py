"""Ask a model and its adapters, score them on GSM8K with intervals, or export W0 + s B A.

    python eval_gsm8k.py --adapter DIR --ask "What is 7 + 5?"        # what base and adapter say
    python eval_gsm8k.py --adapter checkpoints/lora-r8-MetaMathQA    # score all its checkpoints
    python eval_gsm8k.py --model DIR --data test.jsonl               # score the base, from files
    python eval_gsm8k.py --adapter DIR --save-merged merged          # write one plain model
    torchrun --nproc-per-node 2 -- eval_gsm8k.py --adapter DIR       # on two GPUs (not measured)

Scores compare each adapter with the base. The best of several checkpoints looks too good on the
problems that chose it: choose by the held-out loss. Written to --out: NAME-DATA-N.json (scores of N
problems), NAME-DATA-N.jsonl (every completion) and, with matplotlib, the chart DATA-N.png. A score
that exists is reused, or refused if it was made with other settings.

Completions that end in "#### n" score as in lm-evaluation-harness (gsm8k, strict and flexible).
Different on purpose: "The answer is n" (MetaMathQA) counts too, and of two markers the later one.
Without a marker, flexible takes the last number. Numbers are compared by value: $29.00 is 29, 0.5
is 1/2.
"""
import argparse
import json
import math
import re
import sys
import time
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lora import dequantize_nf4, load_adapter, merge_lora, strip_lora
from train_math import (BASE_MODEL, RANK, WORLD, Parser, Row, adapter_hash, add_flag, agree,
                        base_hash, best_adapter, check_ids, checkpoints, chunks, encode_prompt,
                        format_prompt, gather, hash_of, join_processes, load_model, loading,
                        no_effect, number, pick_device, pick_dtype, plain_text, read_table,
                        run_script, trained_with, warn_of_mismatch, write_whole)


# --- flags ---

def parse_args(argv=None):
    parser, count = Parser(description=__doc__), number(int, 1)
    add, on_or_off = partial(add_flag, parser), argparse.BooleanOptionalAction
    exclusive = partial(add_flag, parser.add_mutually_exclusive_group())
    add("--model", None, "Hub id or folder of the base (default: the adapter's, or TinyLlama)")
    add("--adapter", None, "adapters, or runs: all their checkpoints; with --ask and --save-merged "
        "the best one", nargs="+", action="extend", metavar="DIR")
    exclusive("--ask", None, "print what base and adapters say, and do not score", nargs="+",
              metavar="TEXT")
    exclusive("--save-merged", None, "write base and adapter as one model, and do not score",
              metavar="DIR")
    add("--system", None, "a system turn before each text of --ask")
    add("--data", "openai/gsm8k", "Hub id or file")
    add("--nb-samples", None, "the first N problems (default: all)", **count)
    add("--batch-size", 16, "problems at once", **count)
    add("--max-new-tokens", 256, "longest completion", **count)
    add("--shots", 0, "first rows of --data, shown as examples", **number(int, 0))
    add("--chat", None, "prompts by the chat template (default: as trained)", action=on_or_off)
    add("--nf4", None, "hold the base in 4 bits (default: as trained)", action=on_or_off)
    add("--dtype", "auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--out", "eval_results", "folder for the scores")
    args = parser.parse_args(argv)
    used, message = ["model", "adapter", "chat", "nf4", "dtype", "device"], ""
    if args.ask:
        used += ["system", "batch_size", "max_new_tokens"]
        message = no_effect(parser, args, "--ask", *used)
    elif args.save_merged is not None:
        message = no_effect(parser, args, "--save-merged", *used)
    if message:  # the flags may be left over from a command that scores
        warnings.warn(message)
    for text in args.ask or ():
        plain_text(text, "--ask")
    plain_text(args.system or "", "--system")
    return args


def list_adapters(folders, scoring):
    """Return {name: folder} of adapters, and of a run's checkpoints: all to score, or the best."""
    adapters = {}
    for folder in folders or ():
        paths = checkpoints(folder) if scoring else []
        for path in paths or [best_adapter(folder)]:
            name = path.resolve().name
            if name.startswith("step_"):
                name = f"{path.resolve().parent.name}-{name}"
            if name in ("base", *adapters):
                raise ValueError(f"--adapter {path}: another score is called {name} too: give a "
                                 "folder once, or rename it")
            adapters[name] = path
    return adapters


def inherit_flags(args, adapters):
    """Set --model, --chat and --nf4, where they are not given, to those of the first adapter.

    Return {folder: flags it was trained with}.
    """
    trained = {}
    for folder in adapters.values():
        with loading("--adapter", folder):
            trained[folder] = trained_with(folder)
    first = next(iter(trained.values()), {})
    args.model = args.model or first.get("model", BASE_MODEL)
    if args.nf4 is None:
        args.nf4 = first.get("nf4", False)
    if args.chat is None:
        args.chat = first.get("chat") or None  # None: as the rows are
    return trained


# --- answers ---

NUMBER = re.compile(r"""
    (?P<minus>(?<![\w)])-)?                     # in 10-5 it is an operator
    (?:[$€£][ ]?(?P<minus_inside>-)?)?
    (?:(?P<whole>[0-9]+)[ ](?=[0-9]+[ ]?/[ ]?[0-9]))?       # of a mixed number, 1 1/2
    (?P<digits>[0-9]*\.?[0-9]+)                 # 12, 1.5, .5
    (?:[ ]?/[ ]?(?P<denominator>[0-9]+))?
    (?P<unread>[ ]?(?:[²³⁴⁵⁶⁷⁸⁹½¼¾]|\\pi)
    |(?:(?:[ ]?(?:[/^]|\*\*)[ ]?|[ ]?(?:×|x|\\times|\\cdot|\*)[ ]?(?=10\^)|[.eE{])
        [-+.{}]*[0-9][0-9.{}]*)*)               # 10^6, 1e5, 1.2.3
    """, re.VERBOSE)
sys.set_int_max_str_digits(0)  # a model may repeat one digit thousands of times


def find_numbers(text):
    r"""Return every number in a text, exact, and None for one continued by something not read.

    So 10^6, 1e5 and 2\sqrt{3} are None, and 1,234, $5, 1/2, 1 1/2 and \frac{1}{2} are numbers.
    """
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "$")
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac\{)", " ", text)  # 1\frac{1}{2} is mixed
    text = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    # Other fractions and roots are not read: 2\sqrt{3} becomes 21^1.
    text = re.sub(r"[ ]?\\(?:[dt]?frac|sqrt)(?:[{[][^]}]*[]}])*", "1^1", text)
    # 1,234 is one number, 1,2 are two; thin spaces group digits too
    text = re.sub(r"(?<=[0-9])(?:\\?,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", "", text)
    values = []
    for match in NUMBER.finditer(text):
        denominator = int(match["denominator"] or 1)
        if match["unread"] or not denominator:
            values.append(None)
        else:
            value = int(match["whole"] or 0) + Fraction(match["digits"]) / denominator
            values.append(-value if match["minus"] or match["minus_inside"] else value)
    return values


def extract_answer(text, flexible=False):
    """Return the number that a completion answers, a Fraction, or None.

    Strict: the first number behind a marker, "The answer is" (the last one) or "####" (the first
    with a number), whichever comes later. Flexible: so too, but with the last "####"; without a
    marked number, the last number of the text.
    """
    # The lookahead takes no text, so that a second "The answer is" on the line is found too.
    phrases = [(match.start(), match[1]) for match in
               re.finditer(r"the answer is[: \n]*(?=(.*))", text, re.IGNORECASE)]
    # As in the harness, #### is followed by one word, in which commas do not count.
    marks = [(match.start(), match[1].replace(",", "")) for match in
             re.finditer(r"####\s*([^\s#]*[0-9][^\s#]*)", text)]
    markers = phrases[-1:] + (marks[-1:] if flexible else marks[:1])
    for _, said in sorted(markers, reverse=True):
        if numbers := find_numbers(said):
            return numbers[0]
    numbers = find_numbers(text) if flexible else []
    return numbers[-1] if numbers else None


def reference(row):
    """Return the number that a row of the data asks for. Raises ValueError if there is none."""
    value, numbers = extract_answer(row.answer), find_numbers(row.answer)
    bare = not re.search(r"[A-Za-z0-9\\-]", NUMBER.sub("", row.answer))  # nothing but the number
    if value is None and bare and len(numbers) == 1:
        value = numbers[0]
    several = re.search(r"####\s*[^\s#]*[0-9][^\s#]*[^\S\n]+[0-9]", row.answer)  # #### 10 000
    if value is None or several:
        raise ValueError(f"row {row.place}: expected an answer that ends in #### and a number, or "
                         f"is a number, found {row.answer[-40:]!r}")
    return value


# --- generation ---

def complete(model, tokenizer, prompts, batch_size=16, max_new_tokens=256):
    """Return greedy completions, in the order of the prompts: [(text, cut off)].

    A prompt is a text or the turns of a chat. After a text a model may go on with a question of its
    own: the completion ends before it.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_ids(model, encoded, max_new_tokens)
    own = model.generation_config
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    eos = [tokenizer.eos_token_id, *(token for token in stops if token is not None)]
    # With this word a model begins a question of its own; in a chat it may be a quotation.
    stop = None if isinstance(prompts[0], list) else "Question:"
    # The checkpoint's own settings may ask for sampling, and its pad id may have no embedding.
    # The tokenizer's EOS pads: decoding skips it.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=eos, pad_token_id=eos[0], return_dict_in_generate=True)
    try:
        shortest = min(encoded, key=len)
        if min(batch_size, len(encoded)) > 1 and padding_matters(model, shortest, eos[0]):
            print("padding changes what this model computes: one prompt at a time", flush=True)
            batch_size = 1
        rows = {i: encoded[i] for i in range(RANK, len(encoded), WORLD)}
        completions = complete_rows(model, tokenizer, rows, eos, stop, batch_size, max_new_tokens)
    finally:
        model.generation_config = own
    for others in gather(completions):
        completions |= others
    return [completions[i] for i in range(len(prompts))]


def complete_rows(model, tokenizer, rows, eos, stop, batch_size, max_new_tokens):
    """Complete {i: token ids} as {i: (text, cut off)}, up to an EOS or before the text `stop`.

    In a batch, a row that has ended costs as much as one that goes on. So all rows are completed to
    32 tokens first; those that have not ended form new, full batches and go on to 64, then to 128,
    and so on. The tokens they have are then read as part of the prompt.
    """
    starts, completions = {i: len(ids) for i, ids in rows.items()}, {}
    done, limit = 0, min(32, max_new_tokens)
    with tqdm(total=len(rows), unit="row", disable=RANK > 0 or None) as bar:
        while rows:
            longest_first = sorted(rows, key=lambda i: -len(rows[i]))  # sorted: less padding
            for batch in chunks(longest_first, batch_size):
                ids, mask = pad_left([rows[i] for i in batch], eos[0], model.device)
                out = model.generate(ids, attention_mask=mask, max_new_tokens=limit - done)
                for i, new in zip(batch, out.sequences[:, ids.shape[1]:].tolist()):
                    rows[i] = rows[i] + new
                    text = tokenizer.decode(rows[i][starts[i]:], skip_special_tokens=True)
                    kept = text.split(stop)[0] if stop else text
                    ended = kept != text or any(token in eos for token in new)
                    if ended or limit == max_new_tokens:
                        completions[i] = kept, not ended
                bar.update(len(completions) - bar.n)
            rows = {i: ids for i, ids in rows.items() if i not in completions}
            done, limit = limit, min(2 * limit, max_new_tokens)
    return completions


def pad_left(rows, pad, device):
    """Return (ids, attention mask), the mask by lengths: ids cannot tell padding from an EOS."""
    left = dict(batch_first=True, padding_side="left")
    ids = pad_sequence([torch.tensor(row) for row in rows], padding_value=pad, **left)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **left)
    return ids.to(device), mask.to(device)


def padding_matters(model, row, pad):
    """Return whether padding before a row changes its logits, in four generated tokens.

    Call it while complete()'s generation_config is set.
    """
    logits = []
    for rows in ([row], [row, [pad] * (len(row) + 3)]):
        ids, mask = pad_left(rows, pad, model.device)
        out = model.generate(ids, attention_mask=mask, min_new_tokens=4, max_new_tokens=4,
                             output_logits=True)
        logits.append(torch.stack([step[0].float() for step in out.logits]))
    return not agree(logits[1], logits[0], 1e-3 if model.dtype == torch.float32 else 0.05)


# --- scores ---

def wilson_interval(correct, n, z=1.959964):
    """Return a proportion's 95% interval (Wilson 1927), which holds near 0 and 1 too."""
    centre = (correct + z * z / 2) / (n + z * z)
    half = z * math.sqrt(correct * (n - correct) / n + z * z / 4) / (n + z * z)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(first, second):
    """Return the exact two-sided p-value of McNemar's test (1947).

    Null hypothesis: of the problems that only one model solves, each is as likely solved by either.
    """
    pairs = list(zip(first, second, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def answer(model, tokenizer, rows, shots=0, batch_size=16, max_new_tokens=256):
    """Return a record per problem, of Rows or (question, answer); a question may be a chat's turns.

    The first `shots` rows are worked examples in every prompt. Raises ValueError for a problem
    whose answer is no reference.
    """
    rows = [Row(*row[:2], place, None) for place, row in enumerate(rows, 1)]
    examples, problems = rows[:shots], rows[shots:]
    references = [reference(row) for row in problems]
    prompts = [row.question for row in problems]
    if not isinstance(prompts[0], list):
        shown = "".join(f"{format_prompt(row.question)} {row.answer}\n\n" for row in examples)
        prompts = [shown + format_prompt(question) for question in prompts]
    completions = complete(model, tokenizer, prompts, batch_size, max_new_tokens)
    records = []
    for row, wanted, (text, cut_off) in zip(problems, references, completions):
        strict, flexible = extract_answer(text), extract_answer(text, flexible=True)
        records.append(dict(
            question=row.question, completion=text, reference=wanted, answer=strict,
            answer_flexible=flexible, correct=strict == wanted,
            correct_flexible=flexible == wanted, truncated=cut_off))
    return records


def summarise(records, base=None):
    """Return counts, accuracies, 95% interval, and an exact p against what the base solves."""
    n, correct = len(records), [record["correct"] for record in records]
    flexible = sum(record["correct_flexible"] for record in records)
    result = dict(
        n=n, correct=sum(correct), accuracy=sum(correct) / n,
        ci95=wilson_interval(sum(correct), n),
        correct_flexible=flexible, accuracy_flexible=flexible / n,
        no_answer=sum(record["answer"] is None for record in records),
        truncated=sum(record["truncated"] for record in records))
    if base:
        result["p_value"] = mcnemar_p(base, correct)
    return result


def describe(name, result):
    """Return a result in one line."""
    low, high = result["ci95"]
    p = f"  p {result['p_value']:.2g} against the base" if "p_value" in result else ""
    return (f"{name}: {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {result['n']}  "
            f"flexible {result['accuracy_flexible']:.1%}  no answer {result['no_answer']}  "
            f"cut off {result['truncated']}{p}")


# --- ask, export, score ---

def ask(args, model, tokenizer, adapters):
    """Print what the base and each adapter say to each text, one under the other."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    prompts = [[*system, {"role": "user", "content": text}] if args.chat else format_prompt(text)
               for text in args.ask]
    said = {}
    for name, folder in {"base": None, **adapters}.items():
        if folder:
            load_adapter(model, folder)
        said[name] = complete(model, tokenizer, prompts, args.batch_size, args.max_new_tokens)
    for i, text in enumerate(args.ask):
        print(f"\n{text}")
        for name, completions in said.items():
            completion, cut_off = completions[i]
            end = " ..." if cut_off else ""
            print(f"--- {name}\n{completion.strip() or '(no text)'}{end}")


def save_merged(args, model, tokenizer, adapters):
    """Write base and adapter as one model, with tokenizer and generation settings."""
    (folder,) = adapters.values()
    target = Path(args.save_merged)
    load_adapter(model, folder)
    dequantize_nf4(strip_lora(merge_lora(model)))  # with --nf4, the layers without an adapter
    if RANK == 0:
        part = Path(f"{target}.part")  # a full disk leaves nothing that looks whole
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(target)
    print(f"written: {target}/, {folder} merged into its base, in {model.dtype}")


def read_problems(args):
    """Return the rows of --data: shots first, then problems. Raises ValueError for other rows."""
    limit = args.nb_samples and args.nb_samples + args.shots
    rows = read_table(args.data, "test", limit, args.chat)
    with loading("--data", args.data):
        for row in rows[args.shots:]:
            reference(row)
    if len(rows) <= args.shots:
        raise ValueError(f"--shots {args.shots} leaves none of {len(rows)} problems")
    if args.shots and isinstance(rows[0].question, list):
        raise ValueError("--shots needs a plain prompt, and this is a chat: leave it out")
    return rows


def score(args, model, tokenizer, rows, adapters):
    """Score the base and each adapter that has no score yet; write the scores and a chart."""
    n = len(rows) - args.shots
    settings = dict(
        base_hash=base_hash(model), dtype=str(model.dtype).removeprefix("torch."), nf4=args.nf4,
        chat=args.chat, shots=args.shots, max_new_tokens=args.max_new_tokens, n=n,
        data_hash=hash_of(rows))
    name_of_data = f"{Path(args.data).stem}-{n}"
    print(f"{n} problems, scores in {args.out}/", flush=True)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    results, base = {}, None
    for name, folder in {"base": None, **adapters}.items():
        path = Path(args.out, f"{name}-{name_of_data}.json")
        settings["adapter_hash"] = folder and adapter_hash(folder)
        if not path.exists():
            if folder:
                load_adapter(model, folder)
            start = time.perf_counter()
            records = answer(model, tokenizer, rows, args.shots, args.batch_size,
                             args.max_new_tokens)
            result = {"model": args.model, "adapter": folder and str(folder), "data": args.data,
                      **settings, **summarise(records, base),
                      "seconds": round(time.perf_counter() - start, 1)}
            if RANK == 0:
                lines = [json.dumps(record, default=str) + "\n" for record in records]
                write_whole(path.with_suffix(".jsonl"), "".join(lines).encode())
                write_whole(path, json.dumps(result, indent=2).encode() + b"\n")
            gather(None)  # the other processes read what rank 0 has written
        with loading("--out", path):
            result = json.loads(path.read_text())
            lines = path.with_suffix(".jsonl").read_text().splitlines()
            correct = [json.loads(line)["correct"] for line in lines]
            saved = dict.fromkeys(settings) | result | {"n": len(correct)}
            refuse_other_settings(saved, settings)
        results[name] = result
        base = base or correct
        print(describe(name, result), flush=True)
    if RANK == 0:
        plot(Path(args.out, f"{name_of_data}.png"), results)


def refuse_other_settings(saved, settings):
    """Raise ValueError if a saved result was made with other settings, of those that it names."""
    changed = [f"{key} was {saved[key]}, now it is {value}" for key, value in settings.items()
               if saved.get(key, value) != value]
    if changed:
        raise ValueError(f"made with other settings: {'; '.join(changed)}; give another --out")


def plot(path, results):
    """Draw the accuracies with their intervals, the base at the bottom."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        return
    axes = Figure(figsize=(8, len(results) / 2 + 1.5), layout="constrained").subplots()
    for name, result in results.items():
        axes.plot(result["ci95"], [name] * 2, "|-", color="C0")
        axes.plot(result["accuracy"], name, "o", color="C0")
    model, data = Path(result["model"]).name, Path(result["data"]).stem
    axes.set(title=f"{model} on {result['n']} problems of {data}",
             xlabel="strict accuracy, with 95% intervals")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(y=0.5 / len(results))
    axes.figure.savefig(path, dpi=150)


def main(args):
    """Ask, export, or score."""
    scoring = not args.ask and args.save_merged is None
    adapters = list_adapters(args.adapter, scoring)
    trained = inherit_flags(args, adapters)
    if args.save_merged is not None and len(adapters) != 1:
        raise ValueError(f"--save-merged takes one --adapter, found {len(adapters)}")
    if args.save_merged is not None and Path(args.save_merged).exists():
        raise ValueError(f"--save-merged {args.save_merged} exists: give another name")
    if args.system and not (args.ask and args.chat):
        raise ValueError("--system is a turn of a chat: it needs --ask and --chat")
    device = pick_device(args.device)
    join_processes(device)
    dtype, reason = pick_dtype(args.dtype, device)
    if scoring:
        rows = read_problems(args)
        args.chat = isinstance(rows[0].question, list)
    model, tokenizer = load_model(args.model, dtype, device, args.nf4)
    for folder, flags in trained.items():
        load_adapter(model, folder)  # a broken adapter ends the run now, not after an hour
        warn_of_mismatch(args, folder, flags)
    strip_lora(model)
    prompt = "the tokenizer's chat template" if args.chat else repr(format_prompt("..."))
    print(f"{args.model}{' over NF4' * args.nf4} on {device} in {dtype} ({reason}), "
          f"prompt: {prompt}", flush=True)
    if args.ask:
        ask(args, model, tokenizer, adapters)
    elif args.save_merged is not None:
        save_merged(args, model, tokenizer, adapters)
    else:
        score(args, model, tokenizer, rows, adapters)


if __name__ == "__main__":
    run_script("eval_gsm8k.py", main, parse_args, "--nf4, a smaller --batch-size or a smaller "
               "--max-new-tokens take less memory")
