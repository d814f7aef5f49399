"""GSM8K: the prompt, answer extraction, batched greedy generation, scores with their intervals.

    python eval_gsm8k.py --adapter checkpoints/lora-r8-MetaMathQA          # all its checkpoints
    python eval_gsm8k.py --model DIR --data test.jsonl --nb-samples 400    # the base, from files
    python eval_gsm8k.py --adapter DIR --save-merged merged                # export W0 + s B A
    torchrun --nproc-per-node 2 -- eval_gsm8k.py --adapter DIR             # on two GPUs

The base is always scored, and each adapter compared with it. Written to --out: NAME-DATA.json
(scores), NAME-DATA.jsonl (every completion) and, with matplotlib, a chart.

Completions that end in "#### n" score as in lm-evaluation-harness (gsm8k, strict and flexible).
Different on purpose: "The answer is n" (MetaMathQA) counts too, and wins over "#### n"; flexible
prefers such a number to the last one; numbers compare by value, so $29.00 is 29 and 1/2 is 0.5.
"""
import argparse
import csv
import inspect
import json
import math
import os
import re
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

from lora import dequantize_nf4, load_adapter, merge_lora, quantize_nf4, strip_lora

# Large tensors in huge pages (torch on a Linux CPU). In the C library's heap, tensors of changing
# length leave gaps: training took up to twice the memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

RANK = int(os.environ.get("RANK") or 0)  # rank and world size, from torchrun
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
BASE_MODEL = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"


# --- command line ---

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without argparse's usage block
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    return parse


def parse_args(argv=None):
    parser = Parser(prog="eval_gsm8k.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=BASE_MODEL, help="Hub id or folder of the base model")
    add("--adapter", nargs="+", default=[], metavar="DIR",
        help="adapter folders; a run folder means all its checkpoints")
    add("--data", default="openai/gsm8k",
        help="Hub id (its test split), or a .jsonl/.json/.parquet/.csv file")
    add("--nb-samples", type=number(int, 1), help="score the first N problems (default: all)")
    add("--batch-size", type=number(int, 1), default=16, help="problems generated at once")
    add("--max-new-tokens", type=number(int, 1), default=256, help="longest completion")
    add("--shots", type=number(int, 0), default=0,
        help="worked examples in the prompt: the first rows, which are then not scored")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--nf4", action="store_true", help="hold the base's linear layers in 4 bits (QLoRA)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=number(int, 0, 2**31), default=0, help="seeds torch; greedy draws nothing")
    add("--save-merged", metavar="DIR",
        help="write the model with its one adapter merged, and score that too")
    add("--out", default="eval_results", help="folder for the scores")
    return parser.parse_args(argv)


# --- prompt and answer ---

def format_prompt(question):
    """The prompt of training and evaluation. The answer follows after a space."""
    return f"Question: {question}\nAnswer:"


def encode_prompt(tokenizer, text):
    """Token ids with what the tokenizer puts in front (BOS), without an EOS that it appends."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def extract_answer(completion, flexible=False):
    """The number that a completion answers, or None.

    Strict: the first number on the line after the last "The answer is", else the first "#### n".
    Flexible: the last "#### n" instead, else the last number.
    """
    text = completion.split("Question:")[0]  # from there on the model asks itself the next one
    said = re.split("the answer is[: \n]*", text, flags=re.IGNORECASE)[1:]
    hashed = text.split("####")[1:]
    if flexible:
        hashed.reverse()
    places = [after.split("\n")[0] for after in said[-1:]]  # the rest of its line
    places += [" ".join(after.split()[:1]) for after in hashed]  # one word
    for place in places:
        if numbers := find_numbers(place):
            return numbers[0]
    numbers = find_numbers(text)
    return numbers[-1] if flexible and numbers else None


DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"  # 1,234 is one number, 1,2 are two
UNSIGNED = rf"({DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
SIGN = r"((?<![\w)])[-\u2212])?"  # in 10-5 the minus is an operator, and the number is 5
NUMBER = re.compile(rf"{SIGN}[$\u20ac\u00a3]? ?{UNSIGNED}(?: ?/ ?{UNSIGNED})?")
LATEX_FRACTION = re.compile(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}")


def find_numbers(text):
    """Every number in a text: a Decimal as it is written, a Fraction for a quotient.

    The two compare exactly. Arithmetic on Decimals would round to 28 digits: there is none here.
    """
    numbers = []
    for sign, top, bottom in NUMBER.findall(LATEX_FRACTION.sub(r" \1/\2", text)):
        value = Decimal(sign.replace("\u2212", "-") + top.replace(",", ""))
        divisor = Fraction(Decimal((bottom or "1").replace(",", "")))
        if bottom and divisor:
            value = Fraction(value) / divisor
        if divisor:
            numbers.append(value)
    return numbers


# --- data ---

SCHEMAS = (("query", "response"), ("question", "answer"), ("instruction", "output"))
# GSM8K's <<48/2=24>>. Other text between << and >> may be code, and stays.
CALCULATOR_MARK = re.compile(r"<<[-+*/().,%\d]+=[-+*/().,%\d]+>>")


def read_rows(data, split, nb_samples=None):
    """[(question, answer)]: the first nb_samples rows of a file, or of a Hub data set's split.

    Rows without an answer are dropped, and their number is printed. Raises ValueError.
    """
    if Path(data).suffix in (".jsonl", ".json", ".parquet", ".csv") and not Path(data).exists():
        raise ValueError(f"--data {data}: no such file")
    with loading("--data", data, "dataset") as local:
        table = read_file(Path(data)) if Path(data).exists() else read_hub(data, split, local)
    rows, dropped = [], 0
    for place, row in enumerate(table, 1):
        columns = next((pair for pair in SCHEMAS if set(pair) <= set(row)), (None, None))
        question, answer = row.get(columns[0]), row.get(columns[1])
        if not isinstance(question, str) or not isinstance(answer, str | None):
            raise ValueError(f"--data {data}, row {place}: expected texts as query and response, "
                             "question and answer, or instruction, input and output, got "
                             f"{row!r:.200}")
        if not answer or not answer.strip():
            dropped += 1
            continue
        if row.get("input") and "instruction" in columns:
            question += f"\n{row['input']}"
        rows.append((question, CALCULATOR_MARK.sub("", answer)))
        if len(rows) == nb_samples:
            break
    if not rows:
        raise ValueError(f"--data {data} is empty: it has no row with an answer")
    if dropped:
        print(f"{data}: {dropped} rows without an answer are dropped")
    return rows


def read_file(path):
    """The rows of a data file. A CSV's text stays text: "2" is no 2.0, "NA" is not missing."""
    if path.suffix == ".parquet":
        from pyarrow import parquet
        return parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file, restkey="more"))
        text = file.read()
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [dict(row) for row in rows]  # fails where a row is no JSON object


def read_hub(data, split, local):
    import datasets  # here, because importing it takes seconds
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it also raises
    datasets.config.HF_HUB_OFFLINE = local
    name = "main" if data.endswith("gsm8k") else None  # GSM8K has two
    return datasets.load_dataset(data, name, split=split)


# --- the Hub ---

@contextmanager
def loading(flag, name, repo_type):
    """Yield whether only local files can be read. What fails inside becomes one line.

    A name that is no path is asked of the Hub, once: transformers and datasets retry for a minute.
    The download's own client asks, with its proxies, certificates, mirror and HF_HUB_OFFLINE.
    """
    from huggingface_hub import HfApi, errors
    exists, answer = Path(name).exists(), TimeoutError()

    def ask():
        nonlocal answer
        try:
            answer = HfApi().repo_info(name, repo_type=repo_type, timeout=5)
        except Exception as error:
            answer = error

    if not exists:
        thread = threading.Thread(target=ask, daemon=True)  # DNS ignores the timeout
        thread.start()
        thread.join(8)
    if type(answer) in (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ValueError(f"{flag} {name}: no such file, no such folder, and no such repository on "
                         "the Hub (a private one needs: hf auth login)")
    # A gated repository was reached: the download says how to get access.
    reached = not isinstance(answer, Exception) or isinstance(answer, errors.GatedRepoError)
    offline = not exists and not reached
    try:
        yield exists or offline
    except Exception as error:  # OSError, ValueError, the libraries' own
        reason = f"cannot be read: {first_line(error)}"
        if offline:
            reason = ("no such file or folder, the Hugging Face Hub cannot be reached, and it is "
                      f"not in the local cache ({first_line(error)}); use --model DIR and --data "
                      "FILE, or python train_math.py --demo, which downloads nothing")
        raise ValueError(f"{flag} {name}: {reason}") from None


def first_line(error):
    """An error's kind and the first line of its message, which may be empty."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


# --- device, dtype, model ---

def pick_device(name):
    """The device of --device. Under torchrun, "cuda" is this process's own GPU.

    Its number is known before CUDA is touched: "cuda" alone opens a context on GPU 0.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if WORLD > 1 and name.startswith("cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK') or RANK}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's ways to say no
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name} is not here: this machine has a cpu and "
                         f"{torch.cuda.device_count()} cuda devices")
    return device


def join_processes(device):
    """Meet the other processes, if torchrun started any. Return the device. Rank 0 alone prints."""
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def gather(value):
    """The values of all processes, by rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def pick_dtype(name, device):
    """(dtype, the reason for it)."""
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if name != "auto":
        unit = {"bfloat16": "avx512_bf16", "float16": "avx512_fp16"}.get(name)
        if unit and has and not has.get(unit):
            warnings.warn(f"--dtype {name} is slow on a CPU without {unit}; float32 is faster")
        return getattr(torch, name), "as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16, "this GPU has no bfloat16"
    if device.type == "cuda" or has.get("avx512_bf16"):
        return torch.bfloat16, "native here, and needs no loss scaling"
    return torch.float32, "half precision is slow or untested here"


def peak_memory(device):
    """Bytes at the peak so far: CUDA's allocator, elsewhere the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_model(name, dtype, device, nf4=False):
    """(causal language model in eval mode, tokenizer). Raises ValueError.

    With nf4 the layers are quantised on the CPU: the device never holds them dense.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with loading("--model", name, "model") as local:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        # dtype= always: transformers 5 otherwise takes what the checkpoint was stored in
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, local_files_only=local, output_loading_info=True)
    if info["missing_keys"]:  # they would be random, and training would start from them
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"--model {name} lacks {missing}: expected a causal language model")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS, so answers would not end")
    if nf4:
        quantize_nf4(model)
        for parameter in model.parameters():  # views of the mapped file, which keep all of it
            parameter.data = parameter.data.clone()
    return model.to(device).eval(), tokenizer


def check_ids(model, encoded, more=0):
    """ValueError for ids without an embedding, and for rows that with `more` tokens to come are
    beyond the model's positions."""
    longest = max(map(len, encoded)) + more
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if longest > positions:
        flags = "--max-new-tokens or --shots" if more else "--max-length"
        raise ValueError(f"rows of up to {longest} tokens, but the model has {positions} "
                         f"positions: lower {flags}")
    largest = max(max(ids, default=0) for ids in encoded)
    embeddings = len(model.get_input_embeddings().weight)
    if largest >= embeddings:
        raise ValueError(f"the tokenizer gives id {largest}, the model has {embeddings} "
                         "embeddings: they do not belong together")


# --- generation ---

@torch.no_grad()
def complete(model, tokenizer, prompts, batch_size=16, max_new_tokens=256):
    """Greedy completions in the order of the prompts: [(text, cut off by max_new_tokens)]."""
    from transformers import GenerationConfig
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_ids(model, encoded, max_new_tokens)
    own = model.generation_config
    eos = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    eos = sorted({tokenizer.eos_token_id, *eos} - {None})
    # Like lengths share a batch, to save padding. The longest first: out-of-memory comes soon.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    completions = [None] * len(prompts)
    # Not the checkpoint's own settings, which may ask for sampling, penalties, another cache; nor
    # the tokenizer's pad id, which may have no embedding. EOS serves, hidden by the mask.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos,
                                               pad_token_id=eos[0], return_dict_in_generate=True)
    try:
        with tqdm(total=len(prompts), unit="problem", disable=RANK > 0 or None) as bar:
            for start in range(0, len(order), batch_size)[RANK::WORLD]:
                batch = order[start:start + batch_size]
                inputs = [encoded[i] for i in batch]
                for row, completion in complete_batch(model, tokenizer, inputs, max_new_tokens):
                    completions[batch[row]] = completion
                    bar.update(WORLD)
    finally:
        model.generation_config = own
    for others in gather(completions):
        completions = [ours or theirs for ours, theirs in zip(completions, others)]
    return completions


def complete_batch(model, tokenizer, prompts, max_new_tokens):
    """Yield (row, (text, cut off)) as the rows of token ids end.

    Every 16 tokens, rows that have ended leave the batch: kept, they would cost as much as the
    longest. Not without a cache to take them out of (GPT-1), or with a state beside it
    (RecurrentGemma).
    """
    from transformers import StoppingCriteriaList
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    has_cache = "past_key_values" in inspect.signature(model.forward).parameters
    piece = 16 if has_cache and not model._is_stateful else max_new_tokens
    # Padded on the left, every row ends where its completion begins. The mask comes from lengths:
    # with pad == eos the ids cannot tell.
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, device=model.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt):] = torch.tensor(prompt)
        mask[row, -len(prompt):] = 1

    def asks_next(so_far, scores, **_):
        recent = tokenizer.batch_decode(so_far[:, max(width, so_far.shape[1] - 9):])
        return torch.tensor(["Question:" in text for text in recent], device=so_far.device)

    rows, cache = list(range(len(prompts))), {}  # the rows still in the batch
    while rows:
        left = width + max_new_tokens - ids.shape[1]
        out = model.generate(ids, attention_mask=mask, max_new_tokens=min(piece, left),
                             stopping_criteria=StoppingCriteriaList([asks_next]), **cache)
        mask = F.pad(mask, (0, out.sequences.shape[1] - ids.shape[1]), value=1)
        ids = out.sequences
        keep = []
        for place, new in enumerate(ids[:, width:].tolist()):
            text = tokenizer.decode(new, skip_special_tokens=True)
            ended = not set(eos).isdisjoint(new) or "Question:" in text
            if ended or len(new) == max_new_tokens:
                yield rows[place], (text, not ended)
            else:
                keep.append(place)
        rows = [rows[place] for place in keep]
        if rows:
            ids, mask = ids[keep], mask[keep]
            out.past_key_values.reorder_cache(torch.tensor(keep, device=ids.device))
            cache = {"past_key_values": out.past_key_values}


# --- scores ---

def wilson_interval(correct, n, z=1.959964):
    """95% interval of a proportion (Wilson 1927). Unlike p +- z sd it holds near 0 and 1."""
    p = correct / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mcnemar_p(first, second):
    """Exact two-sided p that two models are equally good (McNemar 1947).

    Only problems that one of them alone solves count. Each falls either way with probability 1/2.
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def answer(model, tokenizer, rows, shots=0, batch_size=16, max_new_tokens=256):
    """One record per problem. The first `shots` rows are worked examples in every prompt."""
    examples = "".join(f"{format_prompt(q)} {a}\n\n" for q, a in rows[:shots])
    rows = rows[shots:]
    if not rows:
        raise ValueError(f"no problem is left after --shots {shots}")
    references = [extract_answer(solution, flexible=True) for _, solution in rows]
    if None in references:
        raise ValueError(f"problem {references.index(None) + 1} has no number in its answer")
    prompts = [examples + format_prompt(question) for question, _ in rows]
    completions = complete(model, tokenizer, prompts, batch_size, max_new_tokens)
    records = []
    for (question, _), reference, (text, truncated) in zip(rows, references, completions):
        strict, flexible = extract_answer(text), extract_answer(text, flexible=True)
        records.append({
            "question": question, "completion": text, "reference": reference,
            "answer": strict, "answer_flexible": flexible, "correct": strict == reference,
            "correct_flexible": flexible == reference, "truncated": truncated})
    return records


def summarise(records, base=None):
    """Counts, accuracies as fractions, 95% interval, and an exact p against the base's records."""
    n = len(records)
    correct = [record["correct"] for record in records]
    flexible = sum(record["correct_flexible"] for record in records)
    result = {
        "n": n, "correct": sum(correct), "accuracy": sum(correct) / n,
        "ci95": list(wilson_interval(sum(correct), n)),
        "correct_flexible": flexible, "accuracy_flexible": flexible / n,
        "no_answer": sum(record["answer"] is None for record in records),
        "truncated": sum(record["truncated"] for record in records)}
    if base:
        result["p_value"] = mcnemar_p([record["correct"] for record in base], correct)
    return result


def describe(name, result):
    """A result in one line."""
    n, (low, high) = result["n"], result["ci95"]
    line = (f"{name}: {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {n}  "
            f"flexible {result['accuracy_flexible']:.1%}  "
            f"no answer {result['no_answer'] / n:.1%}  cut off {result['truncated'] / n:.1%}")
    if "p_value" in result:
        line += f"  p {result['p_value']:.2g} against the base"
    return line


# --- a run of evaluations ---

def checkpoints(run):
    """The checkpoints of a training run, in the order of their steps: 999,999 before 1,000,000."""
    steps = [path for path in Path(run).glob("step_*") if path.name[5:].isdigit()]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def find_adapters(folders):
    """[(name, folder)]. A run folder becomes its checkpoints."""
    adapters = []
    for folder in map(Path, folders):
        single = (folder / "adapter_config.json").exists()
        for path in [folder] if single else checkpoints(folder) or [folder]:
            run, name = path.resolve().parts[-2:]
            adapters.append((f"{run}-{name}" if name.startswith("step_") else name, path))
    return adapters


def main(args):
    """Score the base, each adapter, and the merged model. Return [(name, result)]."""
    # What can be refused is refused here, not after an hour of generation.
    evaluations = [("base", None)]
    evaluations += [(name, str(folder)) for name, folder in find_adapters(args.adapter)]
    if args.save_merged:
        if len(evaluations) != 2 or list(Path(args.save_merged).glob("*")):
            raise ValueError("--save-merged takes exactly one adapter, and an empty or new folder")
        name, folder = evaluations[1]
        evaluations.append((f"{name}-merged", folder))
        Path(args.save_merged).mkdir(parents=True, exist_ok=True)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = join_processes(pick_device(args.device))
    dtype, reason = pick_dtype(args.dtype, device)
    nb_rows = args.nb_samples and args.nb_samples + args.shots
    rows = read_rows(args.data, "test", nb_rows)
    settings = {
        "model": args.model, "data": args.data, "dtype": str(dtype)[6:], "nf4": args.nf4,
        "shots": args.shots, "max_new_tokens": args.max_new_tokens, "n": len(rows) - args.shots}
    paths = {}
    for name, folder in evaluations:
        if name in paths:
            raise ValueError(f"--adapter: two results would be called {name}; rename a folder")
        paths[name] = Path(args.out, f"{name}-{Path(args.data).stem}.json")
        refuse_another(paths[name], {**settings, "adapter": folder})
    model, tokenizer = load_model(args.model, dtype, device, args.nf4)
    for _, folder in evaluations[1:]:
        load_adapter(model, folder)
    model = strip_lora(model)

    print(f"{args.model} on {device} in {dtype} ({reason}){', base in NF4' * args.nf4}, "
          f"{len(rows) - args.shots} problems of {args.data}", flush=True)
    scores, base = [], None
    for name, folder in evaluations:
        if folder:
            load_adapter(model, folder)
        if args.save_merged and name == evaluations[-1][0]:
            model = strip_lora(merge_lora(model))
            dequantize_nf4(model)  # with --nf4, the layers without an adapter
            if RANK == 0:
                model.save_pretrained(args.save_merged)
                tokenizer.save_pretrained(args.save_merged)
        start = time.perf_counter()
        records = answer(model, tokenizer, rows, args.shots, args.batch_size, args.max_new_tokens)
        result = {**settings, "adapter": folder, **summarise(records, base),
                  "seconds": round(time.perf_counter() - start, 1)}
        scores.append((name, result))
        base = base or records
        if RANK == 0:
            write_scores(paths[name], result, records)
        print(f"{describe(name, result)}  {result['seconds']:.0f} s", flush=True)
    if len(scores) > 1 and RANK == 0:
        plot(Path(args.out), scores)
    print(f"scores and completions are in {args.out}/")
    return scores


def refuse_another(path, settings):
    """ValueError if a score file holds another evaluation. The same one may be done again."""
    try:
        existing = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):  # absent, or damaged
        return
    for key, value in settings.items():
        if existing.get(key, value) != value:
            raise ValueError(f"{path} holds another evaluation ({key} {existing[key]!r}, now "
                             f"{value!r}): give another --out")


def write_scores(path, result, records):
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")
    with open(path.with_suffix(".jsonl"), "w", encoding="utf8") as file:
        for record in records:  # numbers as text: a float would round them
            file.write(json.dumps(record, default=str, ensure_ascii=False) + "\n")


def plot(out, scores):
    """Draw the accuracies with their intervals, the base first."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(figsize=(len(scores) + 4, 4), layout="constrained")
    for name, result in scores:
        low, high = result["ci95"]
        axes.plot([name.replace("-step_", "\n")] * 3,
                  [100 * low, 100 * result["accuracy"], 100 * high], "_-", color="C0")
    data = Path(result["data"]).stem
    axes.set(ylabel="accuracy, strict (%)", ylim=(0, None),
             title=f"{data}, n = {result['n']}, 95% intervals")
    figure.savefig(out / f"{scores[1][0].split('-step_')[0]}-{data}.png", dpi=120)
    plt.close(figure)


# --- the edge of a script ---

def out_of_memory(error):
    """Whether a GPU, an MPS device or the CPU had no memory left."""
    words = re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(error))
    return isinstance(error, torch.OutOfMemoryError) or words is not None


def run_script(name, main, parse_args):
    """End in one line on stderr and exit code 2 for what a flag or a file can cause."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        main(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:  # the last: a full disk, on saving
        message = " ".join(str(error).split()) or first_line(error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        message = (f"out of memory ({first_line(error)}). What helps: a smaller --batch-size, "
                   "--nf4, a half-precision --dtype; in training also --checkpoint-activations, a "
                   "smaller --max-length, fewer --targets")
    print(f"{name}{f' (rank {RANK})' * (WORLD > 1)}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run_script("eval_gsm8k.py", main, parse_args)
