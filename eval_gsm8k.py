"""GSM8K: the prompt, the answer extraction, batched generation, and scores that carry their uncertainty.

    python eval_gsm8k.py --model TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --adapter checkpoints/lora-r8-MetaMathQA
    python eval_gsm8k.py --model DIR --data gsm8k_test.jsonl --nb-samples 400              # the base alone, from files
    python eval_gsm8k.py --model DIR --adapter checkpoints/RUN/step_000500 --save-merged merged
    torchrun --nproc-per-node 2 -- eval_gsm8k.py --model DIR                               # the problems shared out over two GPUs

The base is always scored; each adapter is compared with it by McNemar's exact test. A run folder stands for all its
checkpoints. Decoding is greedy. Written to eval_results/: NAME-DATA.json (scores), NAME-DATA.jsonl (every completion), a chart (PNG).
train_math.py imports the prompt and the data from here, so that training masks exactly what generation is given.
"""
import argparse
import functools
import glob
import inspect
import itertools
import json
import math
import os
import platform
import re
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from lora import dequantize_nf4, load_adapter, merge_lora, quantize_nf4, strip_lora

try:
    import resource
except ImportError:                         # Windows
    resource = None

aten = torch.ops.aten
BASE_MODEL = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"


# --- command line ---

class Parser(argparse.ArgumentParser):
    def error(self, message):               # one line that names the culprit, without argparse's usage block
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def number(kind, low, high=math.inf, open_high=False):
    """An argparse type: kind is int or float; low <= value <= high, or value < high; nan and infinity are refused."""
    def parse(text):
        value = kind(text)
        if not (low <= value < high or (value == high and not open_high and value != math.inf)):
            upper = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number of at least {low:g}{upper}, got {text}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"        # "invalid whole number value: 'two'"
    return parse


def parse_args(argv=None):
    parser = Parser(prog="eval_gsm8k.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=BASE_MODEL, help="Hub id or folder of the base model")
    add("--adapter", nargs="+", default=[], metavar="DIR", help="adapter folders; a run folder means all its checkpoints")
    add("--data", default="openai/gsm8k", help="Hub id (its test split), or a .jsonl/.json/.parquet/.csv file")
    add("--nb-samples", type=number(int, 1), help="score the first N problems (default: all)")
    add("--batch-size", type=number(int, 1), default=16, help="problems generated at once")
    add("--max-new-tokens", type=number(int, 1), default=256, help="longest completion, in tokens")
    add("--shots", type=number(int, 0), default=0, help="worked examples in the prompt: the first rows of the data, which are then not scored")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="storage and compute of the model")
    add("--nf4", action="store_true", help="hold the base's linear layers in 4 bits (QLoRA), computing in --dtype")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=number(int, 0, 2**31), default=0, help="seeds torch; greedy decoding itself draws nothing")
    add("--save-merged", metavar="DIR", help="write the one adapter merged into the model, with tokenizer, and score that too")
    add("--out", default="eval_results", help="folder for the scores")
    return parser.parse_args(argv)


# torch's CPU allocator on Linux: tensors in huge pages of their own. Among the C library's small ones, tensors of changing length
# leave gaps, and training took up to twice the memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# --- one process of several: torchrun says which ---

RANK, WORLD = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


# --- the task: prompt and answer ---

def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def format_prompt(question: str) -> str:
    """The prompt of training and evaluation alike; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt: what the tokenizer puts in front (BOS) once, nothing that it would append (EOS)."""
    plain = tokenizer(text, add_special_tokens=False).input_ids
    full = tokenizer(text).input_ids
    for start in range(len(full) - len(plain) + 1):
        if full[start:start + len(plain)] == plain:
            return full[:start + len(plain)]
    return full                             # a tokenizer that changes the text itself when it adds special tokens


_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_VALUE = re.compile(rf"(?:[$\u20ac\u00a3]\s?(?P<minus>[-\u2212])|(?P<sign>(?<![\w)])[-\u2212])?[$\u20ac\u00a3]?\s?)"     # $-5, -$5; 10-5 ends in 5
                    rf"(?:\\d?frac\{{(?P<top>{_NUMBER})\}}\{{(?P<bottom>{_NUMBER})\}}|(?P<a>{_NUMBER})(?:\s?/\s?(?P<b>{_NUMBER}))?)")


def extract_answer(completion: str, flexible: bool = False) -> Decimal | None:
    """The number that a completion answers, or None.

    Strict needs a marker: the last "The answer is", else the first "####"; the first number after it, on its line. Text from
    the next "Question:" on is the model talking to itself and is cut off first. Flexible falls back to the last number.
    29.00 equals 29, 1/2 is 0.5, 29.5 is not 30: numbers are compared as Decimal, never rounded.
    """
    text = completion.split("Question:")[0]
    after = None
    if said := list(re.finditer("the answer is", text, re.IGNORECASE)):
        after = text[said[-1].end():].lstrip(": \n")
    elif (at := text.find("####")) >= 0:
        after = text[at + len("####"):].lstrip()
    values = _numbers(after.split("\n")[0]) if after is not None else []
    if values:
        return values[0]
    values = _numbers(text) if flexible else []
    return values[-1] if values else None


def _numbers(text: str) -> list[Decimal]:
    values = []
    for match in _VALUE.finditer(text):
        top, bottom = (Decimal((match[x] or match[y] or "1").replace(",", "")) for x, y in (("top", "a"), ("bottom", "b")))
        if bottom:
            values.append(top / bottom * (-1 if match["sign"] or match["minus"] else 1))
    return values


# --- data ---

SCHEMAS = (("query", "response"), ("question", "answer"), ("instruction", "output"))    # MetaMathQA, GSM8K, Alpaca
TEXTS = [*(column for pair in SCHEMAS for column in pair), "input"]


def read_rows(data: str, split: str, nb_samples: int | None = None) -> list[tuple[str, str]]:
    """[(question, answer)] from a Hub data set or a .jsonl/.json/.parquet/.csv file, the first nb_samples rows.

    Calculator marks like <<48/2=24>> are removed from the answers. Raises ValueError for what cannot be read.
    """
    import datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)       # it logs what it also raises
    path, kinds = Path(data), {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    if path.exists() or path.suffix in kinds or data.count("/") != 1 or data.startswith((".", "/", "~")):
        if not path.is_file() or path.suffix not in kinds:
            raise ValueError(f"--data {data}: {'not a data file' if path.exists() else 'no such file'}; expected a {', '.join(kinds)} file or a Hub id (owner/name)")
        with open(path, "rb") as file:
            start = file.read(4096).strip()
        if not start or (kinds[path.suffix] == "json" and start[:1] not in b"{["):      # pyarrow may crash on other JSON
            raise ValueError(f"--data {data}: {'the file is empty' if not start else f'begins with {start[:20]!r}, expected a JSON object a line, or a list of them'}")
        # csv: text stays text (no 2.0 for 2, no None for NA), and a row with a field too many does not shift the columns
        options = {"converters": dict.fromkeys(TEXTS, str), "keep_default_na": False, "index_col": False} if path.suffix == ".csv" else {}
        load = functools.partial(datasets.load_dataset, kinds[path.suffix], data_files=glob.escape(str(path)), split="train", **options)
    else:
        datasets.config.HF_HUB_OFFLINE = not hub_reachable()        # what was downloaded earlier still loads
        load = functools.partial(datasets.load_dataset, data, "main" if data.endswith("gsm8k") else None, split=split)
    try:
        table = load()
    except Exception as error:              # datasets raises its own, pyarrow's, and OSErrors, several lines each
        if not path.exists() and not hub_reachable():
            raise ValueError(f"--data {data}: {OFFLINE}") from None
        if "corresponds to no data" in str(error) or "BatchSize" in str(error):
            raise ValueError(f"--data {data} holds no rows") from None
        raise ValueError(f"--data {data} cannot be read: {first_line(error.__cause__ or error)}") from None
    schema = next((pair for pair in SCHEMAS if set(pair) <= set(table.column_names)), None)
    if schema is None:
        raise ValueError(f"--data {data} has the columns {', '.join(table.column_names)}; expected query and response, "
                         "question and answer, or instruction, input and output")
    table, rows = table.select(range(min(nb_samples or len(table), len(table)))), []
    for index, row in enumerate(table):
        question, answer = row[schema[0]], row[schema[1]]
        more = row.get("input") or "" if schema[0] == "instruction" else ""
        if not all(isinstance(text, str) for text in (question, answer, more)) or not question.strip() or not answer.strip():
            raise ValueError(f"--data {data}, row {index + 1}: {schema[0]} and {schema[1]} must be text and not empty, got {question!r:.60} and {answer!r:.60}")
        question += "\n" + more if more else ""
        rows.append((question, re.sub(r"<<.*?>>", "", answer)))
    if not rows:
        raise ValueError(f"--data {data} holds no rows")
    return rows


# --- model, device, dtype ---

OFFLINE = ("the Hugging Face Hub cannot be reached and it is not in the local cache; use --model DIR and --data FILE, "
           "or python train_math.py --demo, which downloads nothing")


@functools.cache
def hub_reachable() -> bool:
    """One probe of at most 3 seconds, where transformers and datasets would retry for over a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    reached = []

    def probe():
        try:
            urllib.request.urlopen(urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD"), timeout=3)
            reached.append(True)
        except urllib.error.HTTPError:      # it answered
            reached.append(True)
        except (OSError, ValueError):
            pass
    thread = threading.Thread(target=probe, daemon=True)        # a thread, because a name look-up obeys no timeout
    thread.start()
    thread.join(3)
    return bool(reached)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):     # torch's ways of saying no, on many lines
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: this machine has cpu{', mps' if torch.backends.mps.is_available() else ''} "
                         f"and {torch.cuda.device_count()} cuda devices") from None
    return device


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun: meets the other processes (NCCL on GPUs, gloo on CPUs) and returns this one's device. Rank 0 alone prints."""
    if WORLD == 1:
        return device
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK") or RANK), torch.cuda.device_count()
        if local >= count or device.index is not None:
            raise ValueError(f"--device {device} with {local + 1} processes or more on this machine, which has {count} cuda devices: "
                             f"each process takes its own; use --device cuda and torchrun --nproc-per-node {count} at most")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def gather(value) -> list:
    """What each process has, as a list in the order of the ranks. ValueError when one of them is gone."""
    values = [value] * WORLD
    if WORLD > 1:
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise ValueError(f"the processes cannot exchange results ({first_line(error)}): if one of them is gone, its own message says why") from None
    return values


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, the reason for it)."""
    if name != "auto":
        dtype = getattr(torch, name)
        return dtype, "as asked" + (", its products in float32: this CPU has no unit for them" if widens(dtype, device) else "")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "this GPU computes in it natively, and it needs no loss scaling"
        return torch.float16, "this GPU has no native bfloat16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return torch.bfloat16, "this CPU multiplies in it natively"
    return torch.float32, f"half precision is slow or untested on this {device.type}"


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this is a CPU that multiplies such half-precision numbers by slow, general code."""
    native = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return (device.type == "cpu" and dtype in native and platform.machine().lower() in ("x86_64", "amd64")
            and hasattr(torch.ops.mkldnn, native[dtype]) and not getattr(torch.ops.mkldnn, native[dtype])())


class Float32Products(TorchDispatchMode):
    """While entered, products of half-precision matrices are computed in float32 and rounded once: ten times as fast on a CPU without
    half-precision units. Weights and what is kept for backward stay in half precision; one layer is widened at a time.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Below autograd: every product of forward, backward and recomputation comes here as one of these. One row alone (generation,
        # one by one) waits for the weights to be read, and widening them would cost more than it saves.
        if (func in (aten.mm.default, aten.bmm.default, aten.addmm.default) and args[-2].shape[-2] > 1
                and args[-1].dtype in (torch.bfloat16, torch.float16)):
            return func(*(tensor.float() for tensor in args), **(kwargs or {})).to(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def fast_products(dtype: torch.dtype, device: torch.device):
    """The context in which to compute with tensors of this dtype."""
    return Float32Products() if widens(dtype, device) else nullcontext()


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's peak so far elsewhere (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) if resource else 0


def load_model(name: str, dtype: torch.dtype, device: torch.device, nf4: bool = False):
    """(model in eval mode, tokenizer). With nf4 the linear layers are quantised on the CPU: the device never holds them dense.

    ValueError when the model is not there, or is no causal language model.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(name)
    if not path.is_dir() and (path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name}: {'not a folder' if path.exists() else 'no such folder'}; expected one with config.json, model.safetensors and tokenizer.json")
    local = path.is_dir() or not hub_reachable()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        # dtype= always: transformers 5 otherwise takes whatever the checkpoint was stored in
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=local, output_loading_info=True)
    except Exception as error:              # OSError, ValueError, SafetensorError, tokenizers' own: the first line says it
        if local and not path.is_dir():
            raise ValueError(f"--model {name}: {OFFLINE}") from None
        raise ValueError(f"--model {name} cannot be loaded: {first_line(error)}; expected a folder with whole config.json, "
                         "model.safetensors and tokenizer.json that belong together, of a causal language model") from None
    if info["missing_keys"]:                # they would be random weights, and training would quietly start from them
        raise ValueError(f"--model {name} lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}: expected a causal language model")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {name}: its tokenizer has no EOS token, so answers would have no end")
    if nf4:
        quantize_nf4(model)
        for parameter in model.parameters():        # views of the file: while one of them lives, all of it stays in memory
            parameter.data = parameter.data.clone()
    return model.to(device).eval(), tokenizer


def check_ids(model, encoded: list[list[int]], more: int = 0) -> None:
    """ValueError for token ids that the model has no embedding for, and for rows (`more` tokens will follow) beyond its positions."""
    longest, positions = max(map(len, encoded)) + more, getattr(model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise ValueError(f"rows of up to {longest} tokens, but the model has {positions} positions: lower "
                         + ("--max-new-tokens or --shots" if more else "--max-length"))
    words = model.get_input_embeddings().weight.shape[0]
    if (largest := max(max(ids, default=0) for ids in encoded)) >= words:
        raise ValueError(f"the tokenizer gives id {largest}, the model has {words} embeddings: they do not belong together")


# --- generation ---

@torch.no_grad()
def complete(model, tokenizer, prompts: list[str], batch_size: int = 16, max_new_tokens: int = 256) -> list[tuple[str, bool]]:
    """Greedy completions of the prompts, in their order: (text, whether max_new_tokens cut it off)."""
    from transformers import GenerationConfig
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_ids(model, encoded, max_new_tokens)
    # Like lengths together waste no work on padding; the longest first, so that out-of-memory comes at once, not at the end.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    completions = [None] * len(prompts)
    theirs = model.generation_config
    own_eos = [theirs.eos_token_id] if isinstance(theirs.eos_token_id, int) else theirs.eos_token_id or []
    eos = sorted({tokenizer.eos_token_id, *own_eos})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    # In place of the checkpoint's own, which may ask for sampling, a repetition penalty, another kind of cache.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=pad, return_dict_in_generate=True)
    try:
        with tqdm(total=len(prompts), unit="problem", desc="generating", disable=RANK > 0 or None) as bar, fast_products(model.dtype, model.device):
            for start in range(0, len(order), batch_size)[RANK::WORLD]:     # the same batches, whatever the number of processes
                rows = order[start:start + batch_size]
                for place, completion in complete_batch(model, tokenizer, [encoded[i] for i in rows], max_new_tokens):
                    completions[rows[place]] = completion
                    bar.update(WORLD)
    finally:
        model.generation_config = theirs
    return [next(filter(None, found)) for found in zip(*gather(completions))]


def complete_batch(model, tokenizer, encoded: list[list[int]], max_new_tokens: int):
    """Yields (place in the batch, (text, whether it was cut off)) of every prompt, as they end."""
    from transformers import StoppingCriteriaList
    eos, pad = set(model.generation_config.eos_token_id), model.generation_config.pad_token_id
    # Padding goes left, so that every row ends where its completion begins. The mask comes from lengths, not from
    # ids: with pad == eos an id cannot tell them apart.
    width, places, cache = max(map(len, encoded)), list(range(len(encoded))), {}
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)

    def asks_on(so_far, scores, **_):       # a row that begins the next question has said its answer
        recent = tokenizer.batch_decode(so_far[:, max(width, so_far.shape[1] - 6):])
        return torch.tensor(["Question:" in text for text in recent], device=so_far.device)

    # Every 16 tokens the rows that have ended leave the batch, which would go on at full width until the longest ends. Not where
    # there is no cache (GPT-1), or a state outside of it that would stay as wide as it was (RecurrentGemma).
    narrows = "past_key_values" in inspect.signature(model.forward).parameters and not model._is_stateful
    piece = 16 if narrows else max_new_tokens
    while places:
        out = model.generate(ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([asks_on]),
                             max_new_tokens=min(piece, width + max_new_tokens - ids.shape[1]), **cache)
        ids, going_on = out.sequences, []
        mask = torch.cat([mask, mask.new_ones(len(places), ids.shape[1] - mask.shape[1])], dim=1)
        for row, new in enumerate(ids[:, width:].tolist()):     # (batch, up to max_new_tokens)
            text = tokenizer.decode(new, skip_special_tokens=True)
            ended = bool(eos & set(new)) or "Question:" in text
            if ended or len(new) == max_new_tokens:
                yield places[row], (text, not ended)
            else:
                going_on.append(row)
        places = [places[row] for row in going_on]
        if places:
            keep = torch.tensor(going_on, device=model.device)
            ids, mask = ids[keep], mask[keep]
            cache = {"past_key_values": out.past_key_values}
            out.past_key_values.reorder_cache(keep)


# --- scores ---

def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson 1927); unlike p +- z sd it holds near 0 and 1."""
    p, zz = correct / n, z * z
    middle, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, (middle - half) / (1 + zz / n)), min(1.0, (middle + half) / (1 + zz / n))


def mcnemar_p(first: list[bool], second: list[bool]) -> float:
    """Two-sided exact p that two models answering the same problems are equally good (McNemar 1947): only problems that
    one solves and the other does not count, and under equality each falls either way with probability 1/2."""
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n)


def answer(model, tokenizer, rows, shots=0, batch_size=16, max_new_tokens=256) -> list[dict]:
    """One record per problem, the first `shots` rows serving as worked examples instead."""
    examples = "".join(f"{format_prompt(q)} {a}\n\n" for q, a in rows[:shots])
    rows = rows[shots:]
    references = [extract_answer(a, flexible=True) for _, a in rows]
    if None in references:
        raise ValueError(f"problem {references.index(None) + shots + 1} of the data has no number in its answer, so it cannot be scored")
    if not rows:
        raise ValueError(f"no problem is left to score after {shots} examples")
    completions = complete(model, tokenizer, [examples + format_prompt(q) for q, _ in rows], batch_size, max_new_tokens)
    records = []
    for (question, _), reference, (text, truncated) in zip(rows, references, completions):
        strict, flexible = extract_answer(text), extract_answer(text, flexible=True)
        records.append({"question": question, "completion": text, "reference": reference, "answer": strict, "answer_flexible": flexible,
                        "correct": strict == reference, "correct_flexible": flexible == reference, "truncated": truncated})
    return records


def summarise(records: list[dict], base: list[dict] | None = None) -> dict:
    """Counts, accuracies as fractions with their 95% interval, and against the base's records an exact p."""
    n = len(records)
    correct, flexible = (sum(r[key] for r in records) for key in ("correct", "correct_flexible"))
    result = {"n": n, "correct": correct, "accuracy": correct / n, "ci95": list(wilson_interval(correct, n)),
              "correct_flexible": flexible, "accuracy_flexible": flexible / n, "ci95_flexible": list(wilson_interval(flexible, n)),
              "no_answer": sum(r["answer"] is None for r in records), "truncated": sum(r["truncated"] for r in records)}
    if base is not None:
        result["p_value"] = mcnemar_p([r["correct"] for r in base], [r["correct"] for r in records])
    return result


def describe(name: str, result: dict) -> str:
    low, high = result["ci95"]
    p = f"  p {result['p_value']:.2g} against the base" if "p_value" in result else ""
    return (f"{name}: {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {result['n']}  flexible {result['accuracy_flexible']:.1%}  "
            f"no answer {result['no_answer'] / result['n']:.1%}  cut off {result['truncated'] / result['n']:.1%}{p}")


# --- a run of evaluations ---

def find_adapters(folders: list[str]) -> list[tuple[str, Path]]:
    """[(name, folder)]; a run folder becomes all its checkpoints, in order."""
    found = []
    for folder in map(Path, folders):
        steps = sorted(path.parent for path in folder.glob("step_*[0-9]/adapter_config.json"))
        for path in [folder] if (folder / "adapter_config.json").exists() or not steps else steps:
            whole = path.resolve()
            found.append((f"{whole.parent.name}-{whole.name}" if whole.name.startswith("step_") else whole.name, path))
    names = ["base", *(name for name, _ in found)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--adapter: two results would be called {twice!r}; rename a folder, or score them one by one with another --out")
    return found


def keep_other(path: Path, result: dict) -> None:
    """Moves scores of the same name out of the way if they are not the same evaluation done before."""
    try:
        before = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return
    if isinstance(before, dict) and all(before.get(key) == result[key] for key in ("model", "adapter", "data", "dtype", "nf4", "shots", "n")):
        return
    n = next(n for n in itertools.count(1) if not path.with_stem(f"{path.stem}-{n}").exists())
    for old in (path, path.with_suffix(".jsonl")):
        if old.exists():
            old.rename(old.with_stem(f"{old.stem}-{n}"))
    print(f"{path} held the scores of another evaluation: they are in {path.stem}-{n}.json now")


def plot(path: Path, scores: list[tuple[str, dict]]) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    (_, base), *adapters = scores
    fig, axes = plt.subplots(figsize=(max(5, 1.1 * len(adapters) + 2.5), 4), layout="constrained")
    axes.axhspan(*(100 * x for x in base["ci95"]), color="0.9")
    axes.axhline(100 * base["accuracy"], color="0.4", linestyle="--", label=f"base {base['accuracy']:.1%}")
    middle = [100 * r["accuracy"] for _, r in adapters]
    spread = [[m - 100 * r["ci95"][0] for m, (_, r) in zip(middle, adapters)], [100 * r["ci95"][1] - m for m, (_, r) in zip(middle, adapters)]]
    axes.errorbar(range(len(adapters)), middle, yerr=spread, fmt="o-", capsize=4, label="LoRA")
    axes.set_xticks(range(len(adapters)), [name.split("-step_")[-1].lstrip("0") for name, _ in adapters])
    axes.set(xlabel="optimizer step", ylabel="accuracy, strict (%)", ylim=(0, None),
             title=f"{Path(base['data']).stem}, n = {base['n']}, 95% intervals")
    axes.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(args) -> list[tuple[str, dict]]:
    """Scores the base, then every adapter. Returns [(name, result)]."""
    adapters = find_adapters(args.adapter)
    if args.save_merged and len(adapters) != 1:
        raise ValueError(f"--save-merged writes one model: give exactly one adapter, got {len(adapters)}")
    if args.save_merged and Path(args.save_merged).exists() and any(Path(args.save_merged).iterdir()):
        raise ValueError(f"--save-merged {args.save_merged}: the folder exists and is not empty; name another")
    for folder in [args.out, *([args.save_merged] if args.save_merged else [])]:
        Path(folder).mkdir(parents=True, exist_ok=True)     # what cannot be written shows now, not after an hour
    torch.manual_seed(args.seed)
    device = join_processes(pick_device(args.device))
    dtype, reason = pick_dtype(args.dtype, device)
    rows = read_rows(args.data, "test", None if args.nb_samples is None else args.nb_samples + args.shots)
    model, tokenizer = load_model(args.model, dtype, device, args.nf4)
    for _, folder in adapters:              # every adapter is tried before the first hour of generation, not after it
        load_adapter(model, folder)
    model = strip_lora(model)
    print(f"{args.model} on {device} in {'NF4, computing in ' if args.nf4 else ''}{str(dtype)[6:]} ({reason}), {len(rows) - args.shots} problems of {args.data}", flush=True)

    out, data_name, scores, answered = Path(args.out), Path(args.data).stem, [], {}

    def score(name, folder):
        start = time.perf_counter()
        records = answered[name] = answer(model, tokenizer, rows, args.shots, args.batch_size, args.max_new_tokens)
        result = {"model": args.model, "adapter": folder and str(folder), "data": args.data, "dtype": str(dtype)[6:], "nf4": args.nf4, "shots": args.shots,
                  **summarise(records, answered["base"] if folder else None), "seconds": round(time.perf_counter() - start, 1)}
        if RANK == 0:
            keep_other(out / f"{name}-{data_name}.json", result)
            (out / f"{name}-{data_name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")
            with open(out / f"{name}-{data_name}.jsonl", "w", encoding="utf8") as file:
                file.writelines(json.dumps(record, default=str, ensure_ascii=False) + "\n" for record in records)
        scores.append((name, result))
        print(f"{describe(name, result)}  {result['seconds']:.0f} s", flush=True)

    score("base", None)
    for name, folder in adapters:
        load_adapter(model, folder)
        score(name, folder)
    if args.save_merged:
        name, folder = adapters[0]
        merge_lora(model)
        model = strip_lora(model)
        dequantize_nf4(model)               # with --nf4 the layers that were not adapted
        if RANK == 0:
            model.save_pretrained(args.save_merged)
            tokenizer.save_pretrained(args.save_merged)
        score(f"{name}-merged", folder)
        changed = sum(a["completion"] != b["completion"] for a, b in zip(answered[name], answered[f"{name}-merged"]))
        print(f"merged model written to {args.save_merged}; {changed} of {len(answered[name])} completions differ from the unmerged adapter's"
              + ("" if dtype == torch.float32 else f" (W + delta is rounded once more, to {str(dtype)[6:]})"))
    if adapters and RANK == 0:
        plot(out / f"{adapters[0][0].split('-step_')[0]}-{data_name}.png", scores[:len(adapters) + 1])
    print(f"scores and completions are in {out}/")
    return scores


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)       # a GPU's, and a CPU's


def run_script(name: str, main, parse_args) -> None:
    """The edge of a script: what a flag or a file can cause ends in one line on stderr and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        main(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, SafetensorError) as error:        # transformers saves with safetensors, whose full disk is its own error
        print(f"{name}{f' (rank {RANK})' if WORLD > 1 else ''}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"{name}: out of memory ({str(error).splitlines()[0]}); use a smaller --batch-size, or a smaller model or dtype", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_script("eval_gsm8k.py", main, parse_args)
