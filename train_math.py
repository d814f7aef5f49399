"""LoRA fine-tuning of TinyLlama-1.1B on MetaMathQA, sized for one 4 GB card.

    python train_math.py                                           # 10,000 rows, 3 epochs, r=8
    python train_math.py --demo                                    # a minute on 2 cores, offline
    python train_math.py --model DIR --data train.jsonl --r 16     # your own model and data
    python train_math.py --adapter DIR --data more.jsonl           # go on from an adapter
    python train_math.py --run-name X --resume                     # after Ctrl-C or a kill
    python eval_gsm8k.py --adapter checkpoints/lora-r8-MetaMathQA  # score every checkpoint
    torchrun --nproc-per-node 2 -- train_math.py                   # on two GPUs (not measured)

Data: .jsonl, .json, .parquet, .csv or a data set of the Hub, with the columns query and response,
question and answer, prompt and completion, instruction (with input or context) and output or
response, or messages.

Written: checkpoints/RUN/step_000375/ (an adapter in PEFT's format), state_000375.pt (optimizer) and
run.json (flags) beside it, and runs/RUN/ (metrics.jsonl with a line per step, TensorBoard events,
loss.png). Start reading at experiment(), near the end, which calls the sections in order; then
train().
"""
import argparse
import csv
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

# Before torch's first tensor: large tensors then lie on huge pages (Linux), with which a run on a
# CPU has a lower peak (results/README.md, "Speed").
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout  # comes with torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lora import (LoRAConfig, count_parameters, inject_lora, load_adapter, lora_layers,
                  quantize_nf4, save_adapter)

RANK = int(os.environ.get("RANK", 0))  # both from torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
BASE_MODEL = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
GiB = 2**30
csv.field_size_limit(2**31 - 1)  # of a cell; the module's own limit is 128 KiB


# --- flags ---

# Without usage= argparse would print the usage above every error.
Parser = partial(argparse.ArgumentParser, usage=argparse.SUPPRESS,
                 formatter_class=argparse.RawDescriptionHelpFormatter)


def number(kind, low, high=math.inf):
    """Return the options of a flag that takes a finite int or float in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and value < math.inf:
            return value
        expected = "a whole number" if kind is int else "a number"
        upper = "" if high == math.inf else f" to {high}"
        raise argparse.ArgumentTypeError(f"{text}, expected {expected} from {low}{upper}")
    return {"type": parse, "metavar": "N"}


def add_flag(parser, flag, default=None, help="", **options):
    """Add a flag to a parser, and its default to the help."""
    if default is not None and default is not False:
        values = default if isinstance(default, list) else [default]
        help += f" (default: {' '.join(map(str, values))})"
    parser.add_argument(flag, default=default, help=help, **options)


def parse_args(argv=None):
    """Return the flags. --resume and --adapter restore saved ones, and refuse other values."""
    parser, count = Parser(description=__doc__), number(int, 1)
    add, on_or_off = partial(add_flag, parser), argparse.BooleanOptionalAction
    add("--model", BASE_MODEL, "Hub id or folder of the base model")
    add("--data", "meta-math/MetaMathQA", "Hub id, or .jsonl/.json/.parquet/.csv")
    add("--chat", None, "prompts by the tokenizer's chat template (default: for messages)",
        action=on_or_off)
    add("--nb-samples", 10000, "train on the first N rows, or turns of messages", **count)
    add("--val-samples", None, "hold out the N rows after the training rows, or the last N of a "
        "short file (default: a tenth, at most 200; 0: none)", **number(int, 0))
    add("--epochs", 3, "passes over the training rows", **count)
    add("--max-steps", None, "stop after N steps; the learning rate ends there too", **count)
    add("--adapter", None, "start from this adapter, or from a run's best checkpoint; r, alpha, "
        "dropout, targets and rslora are the adapter's, and model, chat and nf4, unless given",
        metavar="DIR")
    add("--r", 8, "rank (Sec. 4.1)", **count)
    add("--alpha", 16.0, "the update is scaled by alpha / r", **number(float, 1e-9))
    add("--dropout", 0.05, "on the adapter's input", **number(float, 0, 0.99))
    add("--targets", ["q_proj", "v_proj"], "name endings, or all-linear", nargs="+")
    add("--rslora", False, "scale by alpha / sqrt(r)", action="store_true")
    add("--lr", 3e-4, "learning rate at the peak", **number(float, 1e-12, 1))
    add("--warmup-steps", 100, "steps of linear warm-up, at most a tenth of the run",
        **number(int, 0))
    add("--weight-decay", 0.0, "of A and B", **number(float, 0, 1))
    add("--clip", 1.0, "largest gradient norm", **number(float, 1e-6))
    add("--batch-size", 1, "rows per micro-batch", **count)
    add("--grad-accum", 8, "micro-batches per step", **count)
    add("--max-length", 512, "tokens; longer rows are left out", **number(int, 2))
    add("--dtype", "auto", "of the base", choices=["auto", "float32", "bfloat16", "float16"])
    add("--nf4", False, "hold the base's linear layers in 4 bits (QLoRA)", action=on_or_off)
    add("--checkpoint-activations", None, "keep only each block's input, and recompute the rest in "
        "backward (default: where a GPU's memory runs out)", action=on_or_off)
    add("--device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--vram", None, "cap CUDA memory at N GiB, 0.5 of it for CUDA itself",
        **number(float, 0.6))
    add("--run-name", None, "default: lora-r{r}-{data}")
    add("--save-every", None, "steps between checkpoints, beside those at each tenth of the run",
        **count)
    add("--resume", False, "continue from the newest checkpoint", action="store_true")
    add("--seed", 0, "order of the data, A, dropout", **number(int, 0, 2**31))
    add("--demo", False, "train and score a tiny model", action="store_true")
    args = parser.parse_args(argv)
    if args.demo and (message := no_effect(parser, args, "--demo", "seed")):
        raise ValueError(message)
    saved = saved_flags(args)
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)  # again: a flag that is not given takes its saved value
    refuse_changed(args, saved)
    args.run_name = name_run(args)
    return args


# What may differ on --resume. Of --model and --data begin_run() compares the contents instead.
MAY_DIFFER = {"model", "data", "device", "vram", "save_every", "resume", "run_name",
              "checkpoint_activations"}


def refuse_changed(args, saved):
    """Raise ValueError for a flag that differs from its saved value, and may not."""
    free = MAY_DIFFER if args.resume else MAY_DIFFER | {"chat", "nf4"}
    for key in sorted(saved.keys() - free):
        now, then = getattr(args, key), saved[key]
        if now != then and not (key == "targets" and sorted(now) == sorted(then)):
            whose = f"the run {name_run(args)}" if args.resume else args.adapter
            raise ValueError(f"--{key.replace('_', '-')} is {now}, but {then} in {whose}: "
                             "leave the flag out")


def no_effect(parser, args, flag, *used):
    """Return a line on the set flags that have no effect beside this one, "" if there are none."""
    names = [f"--{name.replace('_', '-')}" for name, value in vars(args).items()
             if name not in used and value != parser.get_default(name)]
    names.remove(flag)
    return f"no effect beside {flag}: leave out {', '.join(names)}" if names else ""


def name_run(args):
    name = args.run_name or f"lora-r{args.r}-{Path(args.data).stem}"
    return re.sub(r"^\.|[^\w.-]", "_", name)  # no / and no leading dot


def saved_flags(args):
    """Return the flags of the run that is resumed, or of the adapter that is started from."""
    if args.resume:
        path = Path("checkpoints", name_run(args), "run.json")
        with loading("--resume", path):
            return json.loads(path.read_text())["flags"] | {"run_name": name_run(args)}
    if args.adapter is not None:
        with loading("--adapter", args.adapter):
            flags = trained_with(best_adapter(args.adapter))
        del flags["head"]
        return flags | {"chat": flags.get("chat") or None}  # None: as the rows are
    return {}


def trained_with(folder, task="CAUSAL_LM"):
    """Return the flags an adapter was trained with, those of model, chat and nf4 where known."""
    path = Path(folder, "adapter_config.json")
    if Path(folder).exists() and not path.is_file():
        raise ValueError("this is not an adapter: adapter_config.json is missing")
    config = json.loads(path.read_text(encoding="utf8"))
    if config.get("task_type") not in (None, task):
        raise ValueError(f"an adapter for {config['task_type']}, expected one for {task}")
    targets = config["target_modules"]
    flags = {"r": config["r"], "alpha": float(config["lora_alpha"]),
             "dropout": float(config.get("lora_dropout", 0)),
             "rslora": bool(config.get("use_rslora")),
             "targets": targets if isinstance(targets, list) else [targets],
             "head": config.get("modules_to_save") or []}
    with safe_open(Path(folder, "adapter_model.safetensors"), "pt") as file:
        header = file.metadata() or {}  # where experiment() writes chat and nf4
    if config.get("base_model_name_or_path"):
        flags["model"] = config["base_model_name_or_path"]
    return flags | {key: header[key] == "True" for key in ("chat", "nf4") if key in header}


def warn_of_mismatch(args, folder, trained):
    """Warn if an adapter was trained on another base, or with other --chat or --nf4."""
    base = trained.get("model", args.model)
    if Path(base).name != Path(args.model).name:  # the folder may have been moved
        warnings.warn(f"{folder} was trained on {base}, but is used on {args.model}")
    for name in ("chat", "nf4"):
        if trained.get(name, bool(getattr(args, name))) != bool(getattr(args, name)):
            words = ("with", "without") if trained[name] else ("without", "with")
            warnings.warn(f"{folder} was trained {words[0]} --{name}, but is used {words[1]} it")


# --- prompt and data: from a file to token ids ---

# A question is a text, or the turns of a chat before the answer. `place` is the row's number in the
# file, from 1. `problem` is equal for rows that rephrase one problem, as MetaMathQA's do.
Row = namedtuple("Row", "question answer place problem")

COLUMNS = (("query", "response"), ("question", "answer"), ("prompt", "completion"),
           ("instruction", "output"), ("instruction", "response"))
READ = {*sum(COLUMNS, ()), "input", "context", "messages", "original_question"}
FILES = (".jsonl", ".json", ".parquet", ".csv")
SUBSETS = {"gsm8k": "main", "glue": "sst2"}  # of data sets that have several


def read_table(data, split, limit=None, chat=None):
    """Return the first `limit` Rows of a file, or of a split on the Hub.

    `messages` give a Row for each turn of the assistant, and are refused if chat is False. If it is
    True, any other row becomes a user's turn and its answer.
    """
    rows, empty = [], 0
    with loading("--data", data):
        table = open_table(data, split)
        for place, row in enumerate(table, 1):
            try:
                for question, answer in examples_of(row, chat):
                    if answer.strip():
                        rows.append(Row(question, answer, place, problem_key(row, question)))
                    else:
                        empty += 1
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"row {place}: {error}") from None
            if limit and len(rows) >= limit:
                break
        if not rows:
            raise ValueError("no row has an answer" if len(table) else "there are no rows")
        if len({type(row.question) for row in rows}) > 1:
            raise ValueError("only some rows have messages: add --chat, to read all as chats")
        if chat is False and isinstance(rows[0].question, list):
            raise ValueError("messages are a chat: leave --no-chat out")
    left_out = f"; of the first {place:,}, {empty:,} without an answer are left out"
    unread = [str(name) for name in row if name not in READ]
    print(f"{data}: {len(table):,} rows{left_out if empty else ''}"
          f"{'; columns not read: ' * bool(unread)}{', '.join(unread)}")
    return rows[:limit]


def read_rows(data, split, nb_samples=None):
    """Return the first nb_samples [(question, answer)] of a file, or of a split on the Hub."""
    return [(row.question, row.answer) for row in read_table(data, split, nb_samples)]


def open_table(data, split):
    """Return the rows, {column: value}, of a file or of a data set on the Hub."""
    path = Path(data)
    if not path.exists() and path.suffix not in FILES:
        import datasets  # takes seconds
        return datasets.load_dataset(data, SUBSETS.get(path.name), split=split)
    # Files are read as they stand: datasets would turn "2024-01-01" into a date.
    if path.suffix == ".parquet":
        from pyarrow import parquet
        return parquet.read_table(path).to_pylist()
    if path.suffix not in FILES:
        raise ValueError(f"expected a file that ends in {', '.join(FILES)}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise ValueError("expected text in UTF-8") from None
    if path.suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    elif text.lstrip().startswith("["):
        return json.loads(text)
    else:
        table = map(json.loads, filter(str.strip, text.split("\n")))
    rows = []
    try:
        rows.extend(table)
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"row {len(rows) + 1}: {error}") from None
    return rows


def examples_of(row, chat):
    """Yield (question, answer): one of a plain row, one per assistant turn of messages."""
    if not isinstance(row, dict):
        raise ValueError(f"found {row!r:.60}, expected columns and their values")
    extra = [name for name in ("input", "context", "system", "history", "tools")
             if row.get(name) not in (None, "", [])]
    if row.get("messages") is not None:
        if extra:
            raise ValueError(f"messages and {', '.join(extra)} cannot be used together")
        yield from turns_of(row["messages"])
        return
    pairs = [pair for pair in COLUMNS if set(pair) <= set(row)]
    if not pairs or None in row:  # None: more fields than columns, in a .csv file
        raise ValueError(f"its columns are {[*row]}, expected messages or one of "
                         f"{', '.join(map('/'.join, COLUMNS))}")
    answered = [pair for pair in pairs if row[pair[1]] is not None]
    names = (answered or pairs)[0]
    question, answer = row[names[0]], row[names[1]]
    question = plain_text(question, names[0])
    answer = plain_text("" if answer is None else answer, names[1])
    for name in extra:
        if names[0] != "instruction" or name not in ("input", "context"):
            raise ValueError(f"it has {name}, which is not read beside {names[0]}: write the row "
                             "as messages")
        question += "\n" + plain_text(row[name], name)
    # GSM8K's <<48/2=24>> goes. Other text between << and >> may be code.
    answer = re.sub(r"<<[-+*/().,%\d]+=[-+*/().,%\d]+>>", "", answer)
    yield [{"role": "user", "content": question}] if chat else question, answer


def turns_of(messages):
    """Yield (turns before it, text) of each assistant turn. Raises ValueError."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError(f"messages is {messages!r:.60}, expected a list of role and content")
    for name in ("tool_calls", "weight", "reasoning_content", "reasoning", "thinking"):
        if any(turn.get(name) not in (None, "", [], 1) for turn in messages):
            raise ValueError(f"its messages have {name}, which is not supported")
    turns = [{key: plain_text(turn.get(key), key) for key in ("role", "content")}
             for turn in messages]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[0] == 0:
        raise ValueError("messages need an assistant turn that is not the first, found "
                         f"{[turn['role'] for turn in turns]}")
    for i in answers:
        yield turns[:i], turns[i]["content"]


def plain_text(value, name="it"):
    """Return value. Raises ValueError unless it is a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.60}, expected text")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{name} holds half of a character, a lone surrogate")
    return value


def problem_key(row, question):
    """Return a key, equal for all rephrasings of a problem and all turns of a chat."""
    asked = [turn["content"] for turn in row.get("messages") or () if turn["role"] != "assistant"]
    return str(row.get("original_question") or asked or question)


def hold_out(rows, nb_samples, val_samples=None):
    """Return (training rows, held-out rows, how many were passed over).

    The held-out rows are the val_samples after nb_samples, in a shorter list the last ones; by
    default 200 or a tenth of the rows, whichever is less. Rows that ask what a training row asks
    are passed over.
    """
    if val_samples is None:
        val_samples = min(200, min(len(rows), nb_samples) // 10)
    n = min(nb_samples, len(rows) - val_samples)
    if n < 1:
        raise ValueError(f"--val-samples {val_samples} leaves nothing to train on: there are "
                         f"{len(rows)} rows")
    asked, held_out, repeated = {row.problem for row in rows[:n]}, [], 0
    for row in rows[n:]:
        if len(held_out) == val_samples:
            break
        if row.problem in asked:
            repeated += 1
        else:
            held_out.append(row)
    if val_samples and not held_out:
        warnings.warn("nothing is held out: the other rows all repeat a training question")
    return rows[:n], held_out, repeated


def format_prompt(question):
    """Return the prompt of training and evaluation. The answer follows after a space."""
    return f"Question: {question}\nAnswer:"


# Some chat templates write today's date by this function. With a fixed date a run reads the same
# text when it is resumed, or scored, on another day.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def chat_text(tokenizer, turns, ask):
    """Return the turns as the tokenizer's chat template writes them; with ask, up to the answer."""
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template, which messages and --chat need")
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=FIXED_DATE + tokenizer.get_chat_template(), tokenize=False,
            add_generation_prompt=ask)
    except Exception as error:  # a template is a program and may raise anything
        raise ValueError(f"the chat template: {first_line(error)}") from None


def encode_prompt(tokenizer, prompt):
    """Return the token ids of a text, with the tokenizer's BOS and no EOS, or of a chat's turns."""
    if isinstance(prompt, list):
        text = chat_text(tokenizer, prompt, ask=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    ids = tokenizer(prompt, split_special_tokens=True).input_ids  # "<s>" in a text is no BOS
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def encode_row(tokenizer, question, answer):
    """Return (ids of prompt and answer, how many of them are prompt)."""
    chat = isinstance(question, list)
    if chat:  # the template brings its own BOS and EOS
        turns = [*question, {"role": "assistant", "content": answer}]
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and any(token.content in turn["content"] for turn in turns):
                raise ValueError(f"a turn contains the special token {token.content}")
        start = chat_text(tokenizer, question, ask=True)
        whole = chat_text(tokenizer, turns, ask=False)
        if not whole.startswith(start):
            raise ValueError("the chat template writes the prompt differently before an answer")
        prompt, ids = tokenizer([start, whole], add_special_tokens=False).input_ids
        rest, end = whole[len(start):], []
    else:
        text = format_prompt(question)
        rest = f" {answer.removeprefix(' ')}"  # some data sets begin answers with the space
        prompt, ids = encode_prompt(tokenizer, text), encode_prompt(tokenizer, text + rest)
        end = [tokenizer.eos_token_id]
    if ids[:len(prompt)] != prompt:  # a token spans the prompt's end and the answer's start
        ids = prompt + tokenizer(rest, add_special_tokens=False,
                                 split_special_tokens=not chat).input_ids
    return ids + end, len(prompt)


def encode(rows, tokenizer, max_length):
    """Return [(token ids with EOS, how many of them are prompt)] of Rows, or of (question, answer).

    Rows over max_length are left out, not cut: a row without its EOS teaches the model not to stop.
    """
    examples = []
    for i, row in enumerate(rows, 1):
        try:
            example = encode_row(tokenizer, *row[:2])
        except ValueError as error:
            place = getattr(row, "place", i)
            raise ValueError(f"--data: row {place}: {first_line(error)}") from None
        if length(example) <= max_length:
            examples.append(example)
    return examples


def length(example):
    return len(example[0])


def chunks(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]


def epoch_batches(examples, batch_size, seed, epoch):
    """Return the batches of an epoch: a function of (seed, epoch), so that a run can resume."""
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(examples, len(examples))
    batches = []
    for pool in chunks(order, 50 * batch_size):  # sorted by length within these, to save padding
        batches += chunks(sorted(pool, key=length), batch_size)
    rng.shuffle(batches)
    # The largest comes first, so that running out of memory shows at the first step.
    sizes = [len(batch) * max(map(length, batch)) for batch in batches]
    largest = sizes.index(max(sizes))
    batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def collate(examples, device):
    """Return ids (batch, longest), and the rows and columns of the targets: answers and their EOS.

    Padding is on the right, where causal attention never looks. Targets are found by position, not
    by token id, so that the final EOS counts even where pad == eos.
    """
    longest = max(len(ids) for ids, _ in examples)
    padded = [ids + [0] * (longest - len(ids)) for ids, _ in examples]
    targets = [(row, column) for row, (ids, prompt) in enumerate(examples)
               for column in range(prompt, len(ids))]
    rows, columns = torch.tensor(targets, device=device).T
    return torch.tensor(padded, device=device), rows, columns


def count_targets(examples):
    return sum(len(ids) - prompt for ids, prompt in examples)


# --- the loss ---

LOGITS_AT_ONCE = 2**22  # 131 positions at a time, with a vocabulary of 32,000


def batch_loss(model, batch):
    """Return the loss summed over the targets, in float32.

    To save memory, logits are computed at targets only, a chunk at a time, and not kept: backward
    computes them again.
    """
    ids, rows, columns = batch
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = hidden[rows, columns - 1]  # (batch, longest, width) -> (targets, width)
    head = model.get_output_embeddings()
    size = LOGITS_AT_ONCE // len(head.weight)

    def chunk_loss(h, targets):
        logits = head(h.to(head.weight.dtype)).float()  # (chunk, width) -> (chunk, vocabulary)
        return F.cross_entropy(logits, targets, reduction="sum")

    return sum(recompute_in_backward(chunk_loss, h, targets, use_reentrant=False)
               for h, targets in zip(hidden.split(size), ids[rows, columns].split(size)))


@torch.no_grad()
def validation_loss(model, examples, batch_size):
    """Return the loss per target of held-out examples, in nats, without dropout."""
    training = model.training
    model.eval()
    total = sum(float(batch_loss(model, collate(batch, model.device)))
                for batch in chunks(sorted(examples, key=length), batch_size))
    model.train(training)
    return total / count_targets(examples)


# --- device and model ---

def pick_device(name):
    """Return the device. Under torchrun, "cuda" is this process's own GPU."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if WORLD > 1 and name == "cuda":  # which would put all processes on GPU 0
        name = f"cuda:{os.environ.get('LOCAL_RANK', RANK)}"
    elif WORLD > 1 and name.startswith("cuda"):
        raise ValueError(f"--device {name}: each process takes its own GPU, expected cuda")
    try:
        tried = torch.ones(1, device=name)
        tried.item()  # fails on the device "meta"
        return tried.device
    except (RuntimeError, AssertionError) as error:  # what torch raises
        raise ValueError(f"--device {name}: {first_line(error)}") from None


def cap_memory(device, vram):
    """Make CUDA run out of memory at --vram, or at what is free; Windows would swap instead."""
    if device.type != "cuda":
        if vram:
            raise ValueError(f"--vram {vram:g} needs a CUDA device, and this is {device}")
        return
    free, total = torch.cuda.mem_get_info(device)
    limit = min(free, (vram - 0.5) * GiB) if vram else free
    torch.cuda.set_per_process_memory_fraction(min(1, limit / total), device)


def pick_dtype(name, device):
    """Return (dtype, the reason for it)."""
    slow = device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16")
    if slow and name.endswith("16"):
        warnings.warn(f"--dtype {name} may be slower than float32 on this CPU")
    if name != "auto":
        return getattr(torch, name), "by --dtype"
    if slow or device.type == "mps":
        return torch.float32, "half precision is slow or untested here"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return torch.float16, "this GPU has no bfloat16"
    return torch.bfloat16, "this device computes in it"


def load_tokenizer(name):
    """Return the tokenizer of a base model."""
    transformers.logging.set_verbosity_error()
    with loading("--model", name):
        if Path(name, "adapter_config.json").exists():  # transformers would put it on, unasked
            raise ValueError("this folder holds an adapter: give its base as --model, and the "
                             "folder as --adapter")
        if Path(name).is_dir() and not Path(name, "config.json").exists():
            raise ValueError("this folder holds no config.json, so it is no model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no EOS token, with which answers end")
    return tokenizer


def load_model(name, dtype, device, nf4=False):
    """Return (causal language model in eval mode, tokenizer)."""
    tokenizer = load_tokenizer(name)
    transformers.logging.disable_progress_bar()
    with loading("--model", name):
        # dtype= always: transformers 5 otherwise takes the checkpoint's
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True)
        if missing := sorted(info["missing_keys"])[:3]:  # they would be random
            raise ValueError(f"{', '.join(missing)} is missing: expected a pretrained causal "
                             "language model")
    if nf4:  # on the CPU: the device never holds the layers dense
        quantize_nf4(model)
        for parameter in model.parameters():  # else the whole checkpoint file stays in memory
            parameter.data = parameter.data.clone()
    return model.to(device).eval(), tokenizer


def check_ids(model, encoded, new_tokens=0):
    """Refuse ids without an embedding, and rows that, with new tokens, exceed the context."""
    longest, largest = max(map(len, encoded)) + new_tokens, max(map(max, encoded))
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    embeddings = len(model.get_input_embeddings().weight)
    if largest >= embeddings:
        raise ValueError(f"the tokenizer is not this model's: it gives ids up to {largest}, for "
                         f"{embeddings} embeddings")
    if longest > positions:
        raise ValueError(f"{longest} tokens, but the model has {positions} positions: lower "
                         "--max-length, --max-new-tokens or --shots")


# --- attention, and checks of the model ---

def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Return (softmax(scaling Q K^T + causal bias) V, None): (b, n, h, c), and no weights.

    With b rows, n tokens and c channels, query is (b, h, n, c) in h heads, and key and value are
    (b, g, n, c), h a multiple of g. attention_mask is None if it is just causal, else (b, 1, n, n),
    True where a position may attend.
    """
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("a cap, sinks or a position bias")
    b, h, n, c = query.shape
    group = h // key.shape[1]
    if query.device.type != "cpu" or query.dtype == torch.float32:
        # Below compute capability 8 torch's fused kernels take no grouped heads: without this,
        # scores of (b, h, n, n) would be in memory.
        if group > 1:
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout,
                                             is_causal=attention_mask is None, scale=scaling)
    else:
        # In 16 bits the fused kernel's backward is slow on CPUs. Here the query heads of a group
        # are stacked in the rows, so that K and V are not repeated.
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        bias.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
        rows = (query * (scaling or c**-0.5)).reshape(b, -1, group * n, c)
        scores = rows @ key.transpose(2, 3)  # (b, g, h/g n, n)
        scores += bias.repeat(1, 1, group, 1)  # in place: scores are the largest tensors here
        weights = F.dropout(F.softmax(scores, dim=-1), dropout)
        out = (weights @ value).view(b, h, n, -1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("lora_training", attention)
AttentionMaskInterface.register("lora_training", sdpa_mask)  # else the mask is silently None


def use_attention(model):
    """Set the attention above, in place of transformers' own."""
    model.set_attn_implementation("lora_training")


def last_logits(model, ids):
    """Return the logits at the last 16 positions, as batch_loss computes them, in float32."""
    ids = torch.tensor([ids], device=model.device)
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -16:]
        return head(hidden.to(head.weight.dtype)).float()


def agree(logits, others, tolerance):
    return bool((logits - others).norm() <= tolerance * others.norm())  # False for NaN


def check_head(model, ids):
    """Raise ValueError unless batch_loss computes the model's own logits, and they are causal.

    ids: the longest row, so that sliding windows take effect.
    """
    # Allowed relative error of one matrix product.
    rounding = 1e-5 if model.dtype == torch.float32 else 0.01
    # Logits of all positions would take more memory than training does.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 16} if keeps else {}
    try:
        with torch.no_grad():
            inputs = torch.tensor([ids], device=model.device)
            expected = model(input_ids=inputs, use_cache=False, **last).logits[:, -16:].float()
        logits = last_logits(model, ids)
        other_token = (ids[-1] + 1) % len(model.get_input_embeddings().weight)
        after_change = last_logits(model, [*ids[:-1], other_token])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{type(model).__name__} is not supported here: {first_line(error)}"
                         ) from None
    if not agree(logits, expected, rounding):
        raise ValueError(f"{type(model).__name__}: its logits are not its head of its last hidden "
                         "states. It scales or caps them, which is not supported here, or "
                         f"overflows in {model.dtype}")
    if not agree(after_change[:, :-1], logits[:, :-1], max(1e-4, rounding)):
        raise ValueError(f"{type(model).__name__} is not causal: its logits see later tokens")


def try_attention(model, ids):
    """Set the attention above, unless it would change the model's logits."""
    own, logits = model.config._attn_implementation, last_logits(model, ids)
    # Allowed relative error over all blocks; 30 blocks in 16 bits had 0.01.
    rounding = 1e-4 if model.dtype == torch.float32 else 0.05
    try:
        use_attention(model)
        same = agree(last_logits(model, ids), logits, rounding)
    except Exception as error:  # a mask of another kind, a cap, sinks
        if is_out_of_memory(error):
            raise
        same = False
    if not same:
        print("the model's own attention is kept")
        model.set_attn_implementation(own)


# --- precision, schedule ---
#
# The base's weights and activations are in --dtype; A, B, their gradients and AdamW's moments are
# in float32, and so is the loss. float16 has 5 bits of exponent: gradients on their way down to A
# and B would vanish below 3e-8, so the loss is scaled up first, and the gradients down afterwards.
# bfloat16 has float32's 8 bits of exponent, and needs no scaling. It has fewer digits, so A and B,
# which sum up many small steps, stay in float32.

class LossScaler:
    """Loss scaling for float16 (Micikevicius et al. 2018, arXiv:1710.03740, Sec. 3.2).

    The loss is multiplied by `scale`, and the gradients are divided by it. If one is not finite,
    the step is skipped and the scale halves; after `interval` good steps in a row it doubles.
    """

    def __init__(self, enabled, scale=2.0**16, interval=2000):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.interval = interval
        self.good_steps = self.skipped = self.skipped_in_a_row = 0

    def unscale(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.scale)  # in float32: nothing underflows here

    @property
    def diverged(self):
        """True after 20 skipped steps in a row, or after one if the loss is not scaled."""
        return self.skipped_in_a_row >= (20 if self.enabled else 1)

    def update(self, finite):
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.good_steps = self.good_steps + 1 if finite else 0
        if self.enabled and not finite:
            self.scale /= 2
        elif self.enabled and self.good_steps % self.interval == 0:
            self.scale *= 2


def learning_rate_at(step, steps, warmup, peak):
    """Warm up linearly over at most a tenth of the steps, then fall to 0 as a cosine.

    The cosine is that of Loshchilov and Hutter 2016 (arXiv:1608.03983); the step after the last
    would have 0.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# --- memory ---
#
# Two things are computed again in backward: the logits, always (above), and the blocks, if memory
# runs out: experiment() calls cap_memory(), which sets the limit, and settle_memory(), which
# calls make_it_fit() on the largest batch.

LESS_MEMORY = "--nf4, a smaller --batch-size or a smaller --max-length take less memory"


def blocks(model):
    """Return the transformer blocks: the model's module list with most weights."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, default=[], key=lambda modules: sum(p.numel() for p in modules.parameters()))


def recompute_blocks(model):
    """Keep only each block's input, and run the block again in backward (arXiv:1604.06174)."""
    for block in blocks(model):  # with use_reentrant=True nothing trains behind frozen embeddings
        block.forward = partial(recompute_in_backward, block.forward, use_reentrant=False)


def fits(model, batch, reserve):
    """Run a batch forward and backward beside `reserve` bytes; return False if memory runs out.

    Afterwards gradients are None, the RNG is as before, and a failure leaves no tensor behind.
    """
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        try:
            held = torch.empty(reserve, dtype=torch.uint8, device=model.device)
            batch_loss(model, batch).backward()
            del held
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False  # this ends `error`, whose traceback holds on to the activations
        finally:
            model.zero_grad(set_to_none=True)


def make_it_fit(model, batch, recompute):
    """Try the largest batch. If recompute is None, first keep activations, then recompute them.

    Return whether blocks are recomputed. Raises ValueError if it does not fit.
    """
    # In float32: gradients of earlier micro-batches, and AdamW's two moments.
    reserve = 12 * count_parameters(model)[0]
    choices = (False, True) if recompute is None else (recompute,)
    for recomputed in choices:
        if recomputed:
            recompute_blocks(model)
        if model.device.type == "cuda":  # else the peak would be that of the trial that failed
            torch.cuda.reset_peak_memory_stats(model.device)
        if fits(model, batch, reserve):
            return recomputed
    more = "" if recomputed else "--checkpoint-activations, "
    raise ValueError(f"out of memory in the largest batch: {more}{LESS_MEMORY}")


def settle_memory(model, batch, recompute):
    """Decide whether blocks are recomputed, and print what a step takes."""
    device = model.device
    if device.type != "cuda":  # elsewhere the system swaps or kills before an error can be caught
        if recompute and device.type == "mps":  # torch would draw other dropout masks
            raise ValueError("--checkpoint-activations cannot be used on mps")
        if recompute:
            recompute_blocks(model)
        print("activations are recomputed" if recompute else
              "activations are kept: --checkpoint-activations takes less memory, but more time",
              flush=True)
        return
    recompute = make_it_fit(model, batch, recompute)
    peak = torch.cuda.max_memory_allocated(device) / GiB
    # 4 bytes each: a trained weight (which the footprint has too), its gradient, two moments.
    adapter = 16 * count_parameters(model)[0] / GiB
    weights = model.get_memory_footprint() / GiB - adapter / 4
    rows, longest = batch[0].shape
    print(f"memory in GiB, measured on the largest batch, {rows} x {longest} tokens: {weights:.2f} "
          f"weights, {adapter:.2f} adapter with gradients and AdamW's moments, "
          f"{peak - weights - adapter:.2f} activations {'recomputed' if recompute else 'kept'}, "
          f"{peak:.2f} peak", flush=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """Return the peak bytes of CUDA's allocator, or of the process; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- checkpoints ---
#
# A resumed run repeats the interrupted one to the bit, on the same kind of device and as many
# processes (tested on CPUs, and on one GPU in float16). The batches follow from --seed and the
# epoch, and dropout from --seed and the micro-batch: no random state is saved, only A and B,
# AdamW's moments, the loss scale and the step, written in full before a rename makes them
# visible. run.json says what must be the same: flags, rows, base. On --resume,
# saved_flags() reads it, newest_state() finds the last whole checkpoint, begin_run() compares rows
# and base, experiment() loads the adapter, and train() goes on after the step.


def checkpoints(run):
    """Return a run's checkpoints, sorted as numbers: 999,999 before 1,000,000."""
    steps = [path for path in Path(run).glob("step_*") if path.name[5:].isdecimal()]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def best_adapter(folder):
    """Return the folder; for a run, its checkpoint with the lowest held-out loss, or the last."""
    measured, steps = val_losses(read_log(metrics_path(folder))), checkpoints(folder)
    if len(steps) > 1 and not measured:
        warnings.warn(f"no held-out loss of {folder} is known: its last checkpoint is taken")
    losses = {step: measured.get(int(step.name[5:]), math.inf) for step in reversed(steps)}
    best = min(losses, key=losses.get, default=Path(folder))
    if steps and measured.get(0, math.inf) < losses[best]:
        warnings.warn(f"no checkpoint of {folder} has a lower held-out loss than its start")
    return best


def state_path(folder):
    """Return the file of the training state that belongs to a checkpoint."""
    return folder.with_name(f"state_{folder.name[5:]}.pt")


def save_checkpoint(folder, model, metadata, step, optimizer, scaler):
    """Write the adapter and, beside it, the training state; a kill leaves none half done.

    All adapters are kept, but only the newest two of the states, which are twice as large.
    """
    part = Path(f"{folder}.part")
    save_adapter(model, part, metadata)
    state = {"step": step, "optimizer": optimizer.state_dict(), "scaler": vars(scaler),
             "adapter": adapter_hash(part)}
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, after --resume
    part.rename(folder)
    content = io.BytesIO()  # to a file, torch.save would hide that a disk is full
    torch.save(state, content)
    write_whole(state_path(folder), content.getvalue())
    steps = checkpoints(folder.parent)
    earlier = steps[:steps.index(folder)]
    for old in earlier[:-1]:
        state_path(old).unlink(missing_ok=True)


def newest_state(run):
    """Return (folder, training state) of the newest checkpoint that can be read."""
    with_state = [path for path in checkpoints(run) if state_path(path).exists()]
    for path in reversed(with_state):
        try:
            with zipfile.ZipFile(state_path(path)) as file:  # torch.load compares no checksums
                broken = file.testzip()
            state = torch.load(state_path(path), "cpu", weights_only=True)
            if broken or state["adapter"] != adapter_hash(path):
                raise ValueError("its checksum differs")
            return path, state
        except Exception as error:  # a damaged file may raise anything
            warnings.warn(f"passing over {path}, which is damaged: {first_line(error)}")
    another = "with another --run-name and " if checkpoints(run) else ""
    raise ValueError(f"--resume: {run} has no whole checkpoint to continue from: begin again, "
                     f"{another}without --resume")


def write_whole(path, content):
    """Write bytes to a file in one step: a kill leaves the old file or the new one."""
    part = Path(f"{path}.part")
    part.write_bytes(content)
    part.replace(path)


def adapter_hash(folder):
    files = (folder / "adapter_model.safetensors", folder / "adapter_config.json")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def hash_of(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def base_hash(model):
    """Return a hash of some 100 evenly spaced weights of each tensor."""
    tensors = [x.flatten() for x in [*model.parameters(), *model.buffers()]]
    return hash_of([x[::max(1, len(x) // 64)].tolist() for x in tensors])


def begin_run(run, args, examples, model):
    """Write run.json, or compare it on --resume. Raises ValueError if rows or base differ."""
    hashes, path = {"data": hash_of(examples), "base": base_hash(model)}, run / "run.json"
    wanted = gather(hashes)[0]  # every process must have what rank 0 has
    if args.resume:
        wanted = json.loads(path.read_text())
    for name, flag, what in (("data", "data", "data or tokenizer"), ("base", "model", "the base")):
        if hashes[name] != wanted.get(name):
            raise ValueError(f"--{flag} {getattr(args, flag)}: {what} changed since this run "
                             "began. Restore it, or begin another run with --run-name")
    if RANK == 0 and not args.resume:
        versions = {library.__name__: library.__version__ for library in (torch, transformers)}
        begun = {"flags": vars(args), **hashes, "versions": versions}
        write_whole(path, json.dumps(begun, indent=2).encode())


# --- training ---

def train(model, examples, args, held_out=(), state=None, metadata=None):
    """Train what requires grad, from `state` if given, and save checkpoints with `metadata`.

    The model has to be in train mode. Without metadata no checkpoint is saved.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    scaler = LossScaler(enabled=model.dtype == torch.float16)
    batches = [batch for epoch in range(args.epochs)
               for batch in epoch_batches(examples, args.batch_size, args.seed, epoch)]
    steps = min(math.ceil(len(batches) / args.grad_accum), args.max_steps or math.inf)
    tenths = {round(steps * tenth / 10) for tenth in range(1, 11)}
    saves = tenths | set(range(0, steps, args.save_every or steps))
    step = state["step"] if state else 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        vars(scaler).update(state["scaler"])
    metrics = metrics_path(Path("checkpoints", args.run_name))
    stop, log = False, open_log(metrics, step)
    bar = tqdm(total=steps, initial=step, unit="step", disable=RANK > 0 or None)
    with bar, catch_signals() as caught:
        if held_out and step == 0:
            loss = validation_loss(model, held_out, args.batch_size)
            log({"step": 0, "val_loss": loss})
            bar.write(f"step     0/{steps}  held-out loss {loss:.3f}")
        while step < steps and not stop:
            began = time.perf_counter()

            # 1. Learning rate. A skipped step does not advance the schedule.
            lr = learning_rate_at(step - scaler.skipped, steps, args.warmup_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr

            # 2. Forward and backward, one micro-batch at a time. Each loss is divided by the
            #    targets of the whole window: without dropout, 8 micro-batches of 1 row give the
            #    gradient of one micro-batch of 8 rows, up to rounding.
            first = step * args.grad_accum
            window = batches[first:first + args.grad_accum]
            targets = sum(map(count_targets, window))
            total = 0.0
            for n in range(RANK, len(window), WORLD):
                seed_dropout(args.seed, first + n)
                loss = batch_loss(model, collate(window[n], model.device))
                (loss * (scaler.scale / targets)).backward()
                total += loss.detach()
            loss, stop = sum_over_processes(parameters, float(total) / targets, bool(caught))

            # 3. Unscale and clip, in float32.
            scaler.unscale(parameters)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, args.clip))

            # 4. Step, or skip the step if a number overflowed: weights and moments stay, and these
            #    rows do not come again in this epoch. Without loss scaling, the first overflow ends
            #    the run (below).
            finite, scale = math.isfinite(loss + norm), scaler.scale
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scaler.update(finite)
            step += 1

            # 5. Log, validate and save.
            tokens = sum(len(ids) for batch in window for ids, _ in batch)
            speed = tokens / (time.perf_counter() - began)
            line = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm,
                    "loss_scale": scale, "tokens": tokens, "tokens_per_s": speed,
                    "peak_memory_gib": peak_memory(model.device) / GiB, "skipped": not finite}
            status = f"loss {loss:.3f}  lr {lr:.1e}  {speed:.0f} tok/s"
            if held_out and step in tenths:
                line["val_loss"] = validation_loss(model, held_out, args.batch_size)
                status += f"  held-out loss {line['val_loss']:.3f}"
            log(line)
            if scaler.diverged:
                float32 = ", or --dtype float32" * (model.dtype != torch.float32)
                raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}: try a lower "
                                 f"--lr{float32}, and another --run-name")
            bar.update()
            bar.set_postfix_str(status)
            if step in tenths:
                bar.write(f"step {step:5d}/{steps}  {status}")
            if metadata and (step in saves or stop):
                folder = Path("checkpoints", args.run_name, f"step_{step:06d}")
                if RANK == 0:
                    save_checkpoint(folder, model, metadata, step, optimizer, scaler)
    if RANK == 0 and metadata:
        plot_loss(metrics)
    gather(None)  # rank 0 may still be writing, and torchrun kills the others when one exits
    if stop and step < steps:
        if metadata:
            print(f"stopped, {folder} is saved. To go on: --run-name {args.run_name} --resume")
        signum = caught[0] if caught else signal.SIGTERM  # another process may have caught it
        sys.exit(128 + signum)  # 130 for Ctrl-C, 143 for SIGTERM


def seed_dropout(seed, micro_batch):
    """Seed torch per micro-batch, so that a resumed run draws the same dropout masks."""
    torch.manual_seed(random.Random(f"{seed} {micro_batch}").getrandbits(32))


def sum_over_processes(parameters, loss, stop):
    """Sum over all processes: the gradients in place, the loss, and whether to stop."""
    if WORLD == 1:
        return loss, stop
    numbers = torch.tensor([loss, stop], device=parameters[0].device)
    dist.all_reduce(numbers)
    for p in parameters:
        if p.grad is None:  # in a short window not every process has a micro-batch
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
    return numbers.tolist()


def metrics_path(run):
    """Return runs/RUN/metrics.jsonl, which stands beside checkpoints/RUN."""
    run = Path(run).absolute()
    return run.parent.parent / "runs" / run.name / "metrics.jsonl"


def read_log(path):
    """Return the lines of metrics.jsonl, without those that are damaged, as by a kill."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def open_log(path, step):
    """Return log(line), which writes to TensorBoard and metrics.jsonl.

    Lines after `step` are dropped from the file first; a new run, at step 0, starts an empty one.
    """
    if RANK > 0:
        return lambda line: None
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in read_log(path) if line["step"] <= step and step > 0]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    try:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(path.parent, purge_step=step + 1)  # hides what it has of later steps
    except ImportError:
        board = None

    def log(line):
        if board:
            for key in line.keys() - {"step"}:
                board.add_scalar(key, line[key], line["step"])
            board.flush()
        line = {key: x if math.isfinite(x) else None for key, x in line.items()}  # JSON has no NaN
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    return log


def val_losses(lines):
    """Return {step: held-out loss} of a log, where it was measured."""
    return {line["step"]: line["val_loss"] for line in lines if line.get("val_loss") is not None}


def plot_loss(path):
    """Draw training and held-out loss of metrics.jsonl, where matplotlib is installed."""
    try:
        import pandas  # comes with datasets
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = read_log(path)
    if not any("loss" in line for line in lines):
        return
    table = pandas.DataFrame(lines).set_index("step")
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    losses = table.loss.dropna()
    window = 1 + len(losses) // 20
    axes.plot(losses, ".-", color="0.75", label="training, each step")
    if window > 1:
        mean = losses.rolling(window, center=True, min_periods=1).mean()
        axes.plot(mean, label=f"training, mean of {window} steps")
    if measured := val_losses(lines):
        axes.plot([*measured], [*measured.values()], "o-", label="held out")
        best = min(measured, key=measured.get)
        axes.plot(best, measured[best], "o", label=f"lowest: {measured[best]:.3f} at step {best}")
    axes.set(title=path.parent.name, xlabel="optimizer step", ylabel="loss per target token (nats)")
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    axes.figure.savefig(path.with_name("loss.png"), dpi=150)


@contextmanager
def catch_signals():
    """Yield a list that receives Ctrl-C or SIGTERM; train() then stops after the step."""
    def note(signum, _):
        os.write(2, b"\nstopping after this step; a second signal ends at once\n")
        caught.append(signum)
        restore()

    def restore():
        for signum, handler in before.items():
            signal.signal(signum, handler)

    caught = []
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()


# --- a run, from flags to files ---

def main(args):
    """Run the experiment and return the last checkpoint's folder, or run the demo."""
    if args.demo:
        return demo(args.seed)
    run = Path("checkpoints", args.run_name)
    with locked(run, "--run-name"):
        return experiment(args, run)


def experiment(args, run):
    """Read, load, check, say what will happen, train, and report."""
    # 1. What is trained, and from where: new A and B, an adapter, or a checkpoint of this run.
    if args.resume:
        adapter, state = newest_state(run)
    elif checkpoints(run):
        raise ValueError(f"{run} has checkpoints: add --resume, or give another --run-name")
    else:
        adapter, state = args.adapter and best_adapter(args.adapter), None
    config = LoRAConfig(args.r, args.alpha, args.dropout, args.targets, rslora=args.rslora)

    # 2. What it runs on.
    if args.grad_accum < WORLD:
        raise ValueError(f"--grad-accum {args.grad_accum} is too few: each of {WORLD} processes "
                         "takes a micro-batch of a step")
    device = pick_device(args.device)
    join_processes(device)
    cap_memory(device, args.vram)
    dtype, reason = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    if adapter is not None:
        print(f"starting from {adapter}")

    # 3. Data, to token ids. Ten times the rows to hold out are read: some repeat a training
    #    question and are passed over.
    spare = 10 * (200 if args.val_samples is None else args.val_samples)
    table = read_table(args.data, "train", args.nb_samples + spare, args.chat)
    rows, held_out, passed_over = hold_out(table, args.nb_samples, args.val_samples)
    args.chat = isinstance(rows[0].question, list)
    tokenizer = load_tokenizer(args.model)
    examples = encode(rows, tokenizer, args.max_length)
    held_out_examples = encode(held_out, tokenizer, args.max_length)
    if not examples:
        raise ValueError(f"--max-length {args.max_length} leaves none of {len(rows)} rows")
    if not any(tokenizer.eos_token_id in ids[prompt:] for ids, prompt in examples):
        warnings.warn(f"no target holds {tokenizer.eos_token} (the chat template writes none): the "
                      "model will not learn to stop")
    encoded = [ids for ids, _ in examples + held_out_examples]

    # 4. The base, and whether it can be trained on these rows.
    model, _ = load_model(args.model, dtype, device, args.nf4)
    check_ids(model, encoded)
    check_head(model, max(encoded, key=len))
    try_attention(model, max(encoded, key=len))
    begin_run(run, args, (examples, held_out_examples), model)

    # 5. The adapter.
    torch.manual_seed(args.seed)
    if adapter is None:
        inject_lora(model, config)
    else:
        load_adapter(model, adapter)
        if not args.resume:
            warn_of_mismatch(args, adapter, trained_with(adapter))

    # 6. Say what will be trained.
    trainable, total = count_parameters(model)
    ids, prompt = examples[0]
    print(f"{args.model} in {args.dtype}{' over NF4' * args.nf4} on {device} ({reason})\n"
          f"{len(dict(lora_layers(model)))} layers adapted: {trainable:,} of {total:,} parameters "
          f"train ({trainable / total:.2%}), in float32\n"
          f"{len(examples):,} rows train, {len(held_out_examples):,} are held out\n"
          f"left out: {len(rows) + len(held_out) - len(encoded):,} longer than {args.max_length} "
          f"tokens, {passed_over:,} held-out candidates that repeat a training question\n"
          f"the first row, prompt | target: {tokenizer.decode(ids[:prompt])!r} | "
          f"{tokenizer.decode(ids[prompt:])!r}")

    # 7. Settle memory on the largest batch, train, and report.
    model.train()
    largest = sorted(examples, key=length)[-args.batch_size:]  # no batch of the run is larger
    settle_memory(model, collate(largest, device), args.checkpoint_activations)
    metadata = {"chat": str(args.chat), "nf4": str(args.nf4)}
    train(model, examples, args, held_out_examples, state, metadata)
    return report(run, device, len(held_out_examples))


def report(run, device, n):
    """Say what was written and which checkpoint is the best on n held-out rows; return the last."""
    last, log = checkpoints(run)[-1], metrics_path(run)
    picture = ", loss.png" * log.with_name("loss.png").exists()  # by matplotlib, where it is
    print(f"peak memory {peak_memory(device) / GiB:.2f} GiB. Written: {last}/, "
          f"runs/{run.name}/metrics.jsonl{picture}")
    if measured := val_losses(read_log(log)):
        best = min(measured, key=measured.get)
        folder = f": {run}/step_{best:06d}" if best else ", where the run began"
        print(f"the loss on {n} held-out rows is lowest, {measured[best]:.3f}, at step {best}"
              f"{folder}")
    return last


# --- the demo: everything above, on a model and problems made here ---

def demo_problem(rng, two_steps):
    """Return a problem of one step, 7 + 5 = 12, or of two, 7 + 5 = 12, 12 - 3 = 9."""
    name = rng.choice(["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn"])
    thing = rng.choice(["apples", "books", "coins", "eggs", "pens", "shells"])
    have = rng.randint(0, 10 if two_steps else 15)  # the base has seen each step
    question, solution = f"{name} has {have} {thing} .", ""
    for _ in range(1 + two_steps):
        change = rng.randint(1, 5)
        if rng.random() < 0.5 or change > have:
            story, sign, left = f"gets {change} more", "+", have + change
        else:
            story, sign, left = f"gives {change} away", "-", have - change
        question += f" {name} {story} ."
        solution += f"{have} {sign} {change} = {left} . "
        have = left
    return {"question": f"{question} How many ?", "answer": f"{solution}The answer is {have}"}


def demo_base(texts, seed=0):
    """Return a Llama of 0.9M random weights, and a tokenizer with just the words of these texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", " ".join(texts))))
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>",
                                        eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(ids), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, pad_token_id=0, eos_token_id=1,
        bos_token_id=None)), tokenizer


def demo(seed):
    """Pretrain a base on one-step problems, adapt it to two-step ones, score it on both, merge."""
    import eval_gsm8k
    if WORLD > 1:
        raise ValueError("--demo runs in one process: start it without torchrun")
    begun = Path("checkpoints/demo/run.json")
    if begun.exists():
        with loading("--demo", begun):
            if json.loads(begun.read_text())["flags"]["data"] != "demo/two-step-train.jsonl":
                raise ValueError("a run of your own: rename it, or run the demo in another folder")
        with locked(begun.parent, "folder"):
            pass  # no other demo is writing there
        shutil.rmtree(begun.parent)
    if Path("demo/one-step-train.jsonl").exists():  # the last demo's
        for folder in ("demo/merged", "demo/scores", "demo/scores-merged"):
            shutil.rmtree(folder, ignore_errors=True)
    Path("demo").mkdir(exist_ok=True)
    rng = random.Random(seed)
    for task in ("one-step", "two-step"):
        problems = {}
        while len(problems) < 3400:  # keyed by question: none is in both files
            problem = demo_problem(rng, task == "two-step")
            problems[problem["question"]] = json.dumps(problem) + "\n"
        lines = list(problems.values())
        Path(f"demo/{task}-test.jsonl").write_text("".join(lines[:400]))
        Path(f"demo/{task}-train.jsonl").write_text("".join(lines[400:]))
    cpu = "--dtype float32 --device cpu"
    common = f"{cpu} --grad-accum 1 --dropout 0 --lr 3e-3 --seed {seed}"

    print("1. Pretrain a base on one-step problems, by the same loop")
    args = parse_args(f"--run-name demo-base --epochs 4 --batch-size 64 {common}".split())
    rows = read_rows("demo/one-step-train.jsonl", "train")
    model, tokenizer = demo_base([f"{format_prompt(q)} {a}" for q, a in rows], seed)
    train(model, encode(rows, tokenizer, 512), args)
    model.save_pretrained("demo/base")
    tokenizer.save_pretrained("demo/base")

    flags = ("--model demo/base --data demo/two-step-train.jsonl --run-name demo "
             f"--targets all-linear --epochs 3 --batch-size 32 {common}")
    print(f"2. Adapt it to two-step problems: train_math.py {flags}")
    last = main(parse_args(flags.split()))

    # 3. Score held-out problems of both tasks, and the merged model
    score = f"--batch-size 200 --max-new-tokens 40 {cpu}"
    for flags in (f"--adapter {last} --data demo/two-step-test.jsonl --out demo/scores {score}",
                  f"--adapter {last} --data demo/one-step-test.jsonl --out demo/scores {score}",
                  f"--adapter {last} --save-merged demo/merged {cpu}",
                  f"--model demo/merged --data demo/two-step-test.jsonl --out demo/scores-merged "
                  f"{score}"):
        print(f"3. eval_gsm8k.py {flags}")
        eval_gsm8k.main(eval_gsm8k.parse_args(flags.split()))
    print("With the adapter on, most one-step problems fail: trained on two-step problems alone, "
          "the model forgets them. With it off, the base is unchanged.")


# --- processes, errors, entry point ---

@contextmanager
def locked(folder, flag):
    """Hold a folder for this process. The lock ends with the process, even a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0) if RANK == 0 else nullcontext():
            yield
    except Timeout:
        raise ValueError(f"{folder} is in use by another process: wait, or give another {flag}"
                         ) from None


def join_processes(device):
    """Join torchrun's group, where there is one; only rank 0 prints."""
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def gather(value):
    """Return the values of all processes, by rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def loading(flag, name):
    """Turn a failure to load into one line that names the flag."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        if isinstance(error, SafetensorError):
            reason = f"its weights are damaged, copy them again ({reason})"
        if type(error) is not ValueError and not Path(name).exists():  # ours are ValueErrors
            if flag == "--model" and Path(name).is_absolute():
                reason = "no such folder; if an adapter's base has moved, give its place as --model"
            elif isinstance(error, FileNotFoundError) and error.errno:
                reason = "no such file or folder"
            elif re.search("connect|reach|offline|resolve", reason, re.IGNORECASE):
                reason = f"no such file or folder, and the Hub cannot be reached ({reason})"
            else:
                reason = f"no such file or folder, and from the Hub: {reason}"
        raise ValueError(f"{flag} {name}: {reason}") from None


def first_line(error):
    """Return the first line of an error's message, with its kind unless it is a ValueError."""
    kind = "" if type(error) is ValueError and str(error) else f"{type(error).__name__}: "
    return kind + str(error).strip().split("\n")[0]


def is_out_of_memory(error):
    words = "out of memory|OutOfMemory|allocate|ALLOC_FAILED"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, repr(error)))


def run_script(name, main, parse_args, less_memory=f"--checkpoint-activations, {LESS_MEMORY}"):
    """Run main(); errors of flags and files end in one line on stderr and exit code 2.

    less_memory says which flags help when memory runs out. `python -X dev` shows the traceback
    instead of the line.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    hub_logging.set_verbosity_error()  # it would announce every retry
    with suppress(AttributeError):  # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="backslashreplace")  # not every console shows every character
    try:
        main(parse_args())
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:  # the last: a full disk
        if sys.flags.dev_mode:
            raise
        message = " ".join(str(error).split()) or first_line(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"out of memory ({first_line(error)}): {less_memory}"
    print(f"{name}{f' (rank {RANK})' * (WORLD > 1)}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run_script("train_math.py", main, parse_args)
