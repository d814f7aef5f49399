"""LoRA and full fine-tuning of RoBERTa, DistilBERT or BERT on SST-2 (Hu et al. 2021, Sec. 5, 7).

    python train_sst2.py                               # RoBERTa-base, r=8 on query and value
    python train_sst2.py --ranks 1 2 4 8 --seeds 0 1 2 --full-finetune      # the rank ablation
    python train_sst2.py --demo                        # half a minute on a CPU, no download
    python train_sst2.py --adapter runs/sst2/r8-s0     # score a saved adapter
    python train_sst2.py --compare runs/sst2/r8-s0 runs/sst2/r64-s1    # what was learned

One experiment is one folder, --out: sst2.jsonl has a line per finished run, which is not repeated;
sst2.png the curves; r8-s0/ adapter and head of r=8 and seed 0, as PEFT saves them. Own data is a
folder with a train and a validation file (.tsv, .csv, .jsonl, .parquet) of sentence and label, 0
or 1.

Weights are fp32 under autocast: full fine-tuning, the baseline, trains them all. SST-2 validation
has 872 rows: at 93% one run's 95% interval is +/- 1.7 points. All ranks and targets share one alpha
and lr, and the update is scaled by alpha / r: neither rank (Sec. 7.2) nor targets (Sec. 7.1) are
compared alone.
"""
import argparse
import csv
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import time
import warnings
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pandas  # comes with datasets
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, errors
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lora import (LoRAConfig, count_parameters, inject_lora, is_transposed, load_adapter,
                  lora_layers, merge_lora, save_adapter)

# Huge pages for tensors (Linux), or training takes up to twice the memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # no pictures


# --- flags ---

def at_least(low, kind=int):
    """An argparse type: a finite number from low on."""
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected at least {low:g}, got {text}")
        return value
    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS)  # errors in one line
    add, rate, count = parser.add_argument, at_least(1e-12, float), at_least(1)
    add("--model", help="Hub id or folder (default: roberta-base, or the adapter's)")
    add("--data", default="nyu-mll/glue", help="Hub id, or folder (see above)")
    add("--targets", nargs="+", help="layers to adapt (default: query and value)")
    add("--head", nargs="+", help="modules trained in full (default: the classifier)")
    add("--adapter", metavar="DIR", help="score a saved adapter")
    add("--compare", nargs=2, metavar="DIR", help="Sec. 7.2 and 7.3 on two adapters")
    add("--ranks", nargs="*", type=count, default=[8])
    add("--seeds", nargs="+", type=at_least(0), default=[0])
    add("--alpha", type=rate, default=16.0, help="released script: 16; Table 9: 8")
    add("--dropout", type=at_least(0, float), default=0.05, help="on the adapter's input")
    add("--lr", type=rate, default=5e-4, help="peak, of LoRA runs (Table 9: 5e-4)")
    add("--full-finetune", action="store_true", help="train every weight, beside LoRA")
    add("--full-lr", type=rate, default=5e-5, help="peak, of full fine-tuning")
    add("--epochs", type=count, default=3)
    add("--batch-size", type=count, default=32, help="sentences per micro-batch")
    add("--grad-accum", type=count, default=1, help="micro-batches per step")
    add("--checkpoint-activations", action="store_true", help="less memory, more time")
    add("--max-length", type=at_least(3), default=128, help="tokens; the rest is cut")
    add("--nb-samples", type=count, help="train on N sentences drawn with seed 0")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--out", default="runs/sst2", help="folder of the experiment")
    add("--demo", action="store_true", help="in demo-sst2; heeds the first of --seeds")
    args = parser.parse_args(argv)
    if not args.ranks and not args.full_finetune:
        parser.error("--ranks: give a rank, or --full-finetune")
    return args


# --- data and model, from a folder or the Hub ---

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def hub_problem(name, kind):
    """Ask the Hub for a repository, once. Return what is wrong, or None."""
    try:
        with ThreadPool(1) as pool:  # get's timeout also ends a name look-up that hangs
            pool.apply_async(HfApi().repo_info, [name], {"repo_type": kind, "timeout": 5}).get(8)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return f"no such folder, and no public {kind} of this name on the Hub"
    except Exception:
        return "the Hugging Face Hub cannot be reached; give a folder that exists, or --demo"


@contextmanager
def loading(flag, name, kind=None):
    """Turn a failure into one line. Yield True if only local files can be read."""
    problem = hub_problem(name, kind) if kind and not Path(name).exists() else None
    try:
        yield problem is not None
    except Exception as error:
        reason = problem or first_line(error.__cause__ or error)
        raise ValueError(f"{flag} {name}: {reason}") from None


def pretrained(kind, name, **options):
    with loading("--model", name, "model") as offline:
        return kind.from_pretrained(name, local_files_only=offline, **options)


def read_sentences(data, split):
    """Return [(sentence, 0 or 1)] of a split. Raise ValueError for what cannot be read."""
    text = partial(pandas.read_csv, dtype=str, keep_default_na=False)  # null, NA are sentences
    readers = {
        ".jsonl": partial(pandas.read_json, dtype=False, lines=True),
        ".parquet": pandas.read_parquet,
        ".csv": text,
        # GLUE's own files quote nothing: a row may begin with a lone quotation mark.
        ".tsv": partial(text, sep="\t", quoting=csv.QUOTE_NONE)}
    with loading("--data", data, "dataset") as offline:
        if Path(data).exists():
            paths = [path for path in Path(data).glob(f"{split}.*") if path.suffix in readers]
            if len(paths) != 1:
                raise ValueError(f"expected a folder with one {split} file, {', '.join(readers)}")
            table = readers[paths[0].suffix](paths[0])
        else:
            import datasets  # takes seconds
            datasets.config.HF_HUB_OFFLINE = offline
            config = "sst2" if data.endswith("glue") else None
            table = datasets.load_dataset(data, config, split=split).to_pandas()
        rows = table[["sentence", "label"]].values.tolist()
        bad = [row for row in rows if not isinstance(row[0], str) or row[1] not in (0, 1, "0", "1")]
        if bad or not rows:
            raise ValueError(f"{split}: expected sentences and labels 0 or 1, got {bad[:1]}")
    return [(sentence, int(label)) for sentence, label in rows]


def read_data(args, *splits):
    """Return {split: [(token ids, label)]}. A long sentence is cut: its label still holds."""
    tokenizer = pretrained(transformers.AutoTokenizer, args.model)
    longest = min(args.max_length, tokenizer.model_max_length)
    data = {}
    for split in splits:
        rows = read_sentences(args.data, split)
        if split == "train" and args.nb_samples:
            rows = random.Random(0).sample(rows, min(args.nb_samples, len(rows)))
        sentences, labels = zip(*rows)
        ids = tokenizer(list(sentences), truncation=True, max_length=longest).input_ids
        data[split] = list(zip(ids, labels))
    return data


def load_encoder(args, r, seed):
    """Return (pretrained encoder under a fresh head, its LoRAConfig). With r None there is none."""
    # For head, A and dropout masks. torch's CPU generator uses 32 bits of a seed.
    torch.manual_seed(random.Random(seed).getrandbits(32))
    model, info = pretrained(transformers.AutoModelForSequenceClassification, args.model,
                             num_labels=2, dtype=torch.float32, output_loading_info=True)
    distilbert = model.config.model_type == "distilbert"
    targets = args.targets or (["q_lin", "v_lin"] if distilbert else ["query", "value"])
    head = args.head or [name for name, module in model.named_children()
                         if module is not model.base_model and list(module.parameters())]
    for key in info["missing_keys"]:
        if not any(module in key for module in head):
            raise ValueError(f"--model {args.model} has no {key}: name its module in --head")
    model.to(args.device)
    config = None
    if r is not None:
        config = LoRAConfig(r, args.alpha, args.dropout, targets, also_train=head)
        inject_lora(model, config)
    if args.checkpoint_activations:
        model.activation_checkpointing_enable()
    return model, config


# --- batches ---

def cut(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]


def epoch_windows(examples, batch_size, grad_accum, rng):
    """Shuffle an epoch into windows, one per optimizer step: lists of micro-batches.

    Sentences are sorted by length in pools of 50 windows, to save padding.
    """
    size = batch_size * grad_accum
    windows = []
    for pool in cut(rng.sample(examples, len(examples)), 50 * size):
        windows += cut(sorted(pool, key=lambda example: len(example[0])), size)
    rng.shuffle(windows)
    return [cut(window, batch_size) for window in windows]


# --- mixed precision, recomputation ---

def settle(args):
    """Settle device and dtype: auto is the device's own half precision, or fp32."""
    with loading("--device", args.device):
        if args.device == "auto":
            args.device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        args.device = torch.zeros(1, device=args.device).device
    kind, native = args.device.type, "float32"
    if kind == "cuda":
        native = "bfloat16" if torch.cuda.get_device_capability(args.device)[0] >= 8 else "float16"
    elif kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        native = "bfloat16"
    if args.dtype == "auto":
        args.dtype = native
    if kind == "cpu" and args.dtype not in ("float32", native):
        warnings.warn(f"--dtype {args.dtype} is slow on this CPU, {native} is not")
    print(f"{args.device}: fp32 weights, matrix products in {args.dtype}")
    if kind == "mps" and args.checkpoint_activations:
        raise ValueError("--checkpoint-activations: on MPS torch recomputes other dropout masks")


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, Sec. 3.2): below 6e-8 fp16 gradients vanish.

    Scale the loss, unscale the fp32 gradients. An overflow halves the scale, `interval` good steps
    in a row double it.
    """

    def __init__(self, enabled, scale=2.0**16, interval=2000):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.interval = interval
        self.good_steps = self.skips = 0  # in a row

    def unscale(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:  # None: it took no part in the loss
                parameter.grad /= self.scale

    def update(self, finite):
        self.good_steps = self.good_steps + 1 if finite else 0
        self.skips = 0 if finite else self.skips + 1
        if self.enabled and not finite:
            self.scale /= 2
        elif self.enabled and self.good_steps % self.interval == 0:
            self.scale *= 2


def classify(model, batch, dtype):
    """Return (logits (batch, 2), summed cross-entropy). Products run in dtype, sums in fp32."""
    device = model.device
    ids = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True).to(device)
    mask = pad_sequence([torch.ones(len(row)) for row, _ in batch], batch_first=True).to(device)
    labels = torch.tensor([label for _, label in batch], device=device)
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits, F.cross_entropy(logits.float(), labels, reduction="sum")


# --- evaluation ---

@torch.no_grad()
def evaluate(model, examples, dtype):
    """Return (predicted labels in the order of the examples, share correct, mean cross-entropy)."""
    model.eval()
    predictions, loss = torch.empty(len(examples), dtype=torch.long), 0.0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))  # saves padding
    for rows in cut(order, 64):
        logits, batch_loss = classify(model, [examples[i] for i in rows], dtype)
        predictions[rows] = logits.argmax(-1).cpu()
        loss += float(batch_loss)
    correct = predictions == torch.tensor([label for _, label in examples])
    return predictions, int(correct.sum()) / len(examples), loss / len(examples)


def wilson_interval(p, n, z=1.96):
    """95% interval of a share p of n (Wilson 1927); unlike p +- z sd it holds near 0 and 1."""
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def peak_memory(device):
    """GiB: the allocator's peak on CUDA, elsewhere the process's so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- one run ---

def name_of(r):
    return "full" if r is None else f"r={r}"


def train(args, data, r, seed):
    """Train and evaluate LoRA of rank r, or every weight. Return (line of sst2.jsonl, model)."""
    model, config = load_encoder(args, r, seed)
    trainable, total = count_parameters(model)
    adapter = sum(layer.lora_A.numel() + layer.lora_B.numel() for _, layer in lora_layers(model))
    print(f"{name_of(r)}, seed {seed}: {adapter:,} adapter + {trainable - adapter:,} other weights "
          f"train, {trainable / total:.2%} of {total:,}", flush=True)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    peak_lr = args.lr if config else args.full_lr
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.01)
    scaler = LossScaler(enabled=args.dtype == "float16")
    rng, windows = random.Random(seed), []
    for _ in range(args.epochs):
        windows += epoch_windows(data["train"], args.batch_size, args.grad_accum, rng)
    steps = len(windows)
    every = math.ceil(steps / (4 * args.epochs))
    history, losses, skipped, seconds = [], [], 0, 0.0

    for step, window in enumerate(bar := tqdm(windows, unit="step", disable=None), 1):
        start = time.perf_counter()
        model.train()

        # 1. Learning rate: warm-up over 6% of the steps (Table 9) and at most 100, linearly to 0.
        #    A skipped step does not advance the schedule.
        done = step - 1 - skipped
        warmup = max(1, min(100, 0.06 * steps))
        lr = peak_lr * min((done + 1) / warmup, (steps - done) / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. Forward and backward, one micro-batch at a time. Each loss is divided by the sentences
        #    of the whole window: 4 x 8 gives the gradients of 1 x 32.
        sentences = sum(len(batch) for batch in window)
        loss = 0.0
        for batch in window:
            _, batch_loss = classify(model, batch, args.dtype)
            (batch_loss * (scaler.scale / sentences)).backward()
            loss += batch_loss.detach()
        loss = float(loss) / sentences

        # 3. Unscale and clip, in fp32.
        scaler.unscale(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))

        # 4. Step, or skip after an overflow, leaving weights and moments untouched.
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            optimizer.step()
            losses.append(loss)
        optimizer.zero_grad(set_to_none=True)
        scaler.update(finite)
        skipped += not finite
        if scaler.skips == (20 if scaler.enabled else 1):
            raise ValueError(f"{name_of(r)}: loss {loss:g}, gradient norm {norm:g} at step {step}: "
                             f"try a lower {'--lr' if config else '--full-lr'}")
        seconds += time.perf_counter() - start
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)

        # 5. Log, and evaluate four times an epoch.
        if step % every == 0 or step == steps:
            _, accuracy, val_loss = evaluate(model, data["validation"], args.dtype)
            history.append({"epoch": step * args.epochs / steps, "accuracy": accuracy,
                            "train_loss": statistics.fmean(losses or [math.nan]), "loss": val_loss})
            bar.write("  ".join(f"{key} {value:.3f}" for key, value in history[-1].items()))
            losses = []

    if config:
        save_adapter(model, config, Path(args.out, f"r{r}-s{seed}"))
    flags = ("model data head epochs batch_size grad_accum max_length nb_samples dtype "
             + ("lr alpha dropout targets" if config else "full_lr"))
    n = len(data["validation"])
    run = {flag: getattr(args, flag) for flag in flags.split()}
    run |= {"r": r, "seed": seed, "adapter_parameters": adapter, "trainable": trainable,
            "total": total, **history[-1], "n": n, "ci95": wilson_interval(accuracy, n),
            "skipped": skipped, "seconds": seconds, "peak_memory_gb": peak_memory(args.device),
            "history": history}
    return run, model


# --- one experiment: its folder, table and picture ---

def read_runs(args, path):
    """Return the finished runs. Raise ValueError if they are another experiment's."""
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    with loading("--out", args.out):
        runs = [json.loads(line) for line in lines]
    for run in runs:
        changed = [f"--{flag.replace('_', '-')} was {run[flag]}, is {value}"
                   for flag, value in vars(args).items() if run.get(flag, value) != value]
        if changed:
            raise ValueError(f"{path} holds other runs: {'; '.join(changed)}; give another --out")
    return runs


def main(args):
    """Make every run that is not in the folder yet, then the table and the picture."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.demo:
        return demo(args.seeds[0])
    settle(args)
    if args.adapter:
        return score_adapter(args)
    if args.compare:
        return compare(args)
    args.model = args.model or "roberta-base"
    data = read_data(args, "train", "validation")
    path = Path(args.out, "sst2.jsonl")
    runs = read_runs(args, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for r, seed in itertools.product(args.ranks + [None] * args.full_finetune, args.seeds):
        if (r, seed) not in [(run["r"], run["seed"]) for run in runs]:
            run, _ = train(args, data, r, seed)
            runs.append(run)
            with open(path, "a", encoding="utf8") as file:
                file.write(json.dumps(run) + "\n")
    report(runs, path.with_suffix(".png"))
    print(f"{path} has {len(runs)} runs; beside it the picture and the adapters")
    return runs


def report(runs, picture):
    """Print a row per rank. Draw its seeds' mean in a band from the lowest to the highest."""
    table = pandas.DataFrame(runs)
    table["accuracy"] *= 100
    table["rank"] = [name_of(run["r"]) for run in runs]
    ranks = table.groupby("rank", sort=False)
    low, high = runs[0]["ci95"]
    print(f"\nn = {runs[0]['n']}: one run's 95% interval is +/- {50 * (high - low):.1f} points")
    print(ranks.agg(
        adapter=("adapter_parameters", "first"), trainable=("trainable", "first"),
        accuracy=("accuracy", "mean"), spread=("accuracy", "std"), loss=("loss", "mean"),
        seconds=("seconds", "mean"), GiB=("peak_memory_gb", "max"), seeds=("seed", "count"),
    ).to_string(float_format="{:.4g}".format))
    if not Figure:
        return
    figure = Figure(figsize=(14, 4), layout="constrained")
    titles = {"train_loss": "training loss", "loss": "validation loss", "accuracy": "accuracy"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items()):
        for name, rank in ranks:
            curves = pandas.concat(map(pandas.DataFrame, rank["history"])).groupby("epoch")[key]
            mean = curves.mean()
            axes.plot(mean.index, mean, label=name)
            axes.fill_between(mean.index, curves.min(), curves.max(), alpha=0.2)
        axes.set(xlabel="epoch", title=title)
    axes.legend()
    figure.savefig(picture, dpi=120)


# --- score a saved adapter ---

def load_adapted(args, folder):
    """Return a base with its adapter, whose config names base and head."""
    with loading("the adapter", folder):
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf8"))
        args.model = args.model or config["base_model_name_or_path"]
        args.head = args.head or config["modules_to_save"]
        if not args.model:
            raise ValueError("it names no base: give --model")
    model, _ = load_encoder(args, None, 0)
    load_adapter(model, folder)
    return model


def score_adapter(args):
    """Print an adapter's accuracy, and how many labels merging changes."""
    model = load_adapted(args, args.adapter)
    examples = read_data(args, "validation")["validation"]
    labels, accuracy, loss = evaluate(model, examples, args.dtype)
    merged, _, _ = evaluate(merge_lora(model), examples, args.dtype)
    low, high = wilson_interval(accuracy, len(labels))
    print(f"accuracy {accuracy:.2%} [{low:.2%}, {high:.2%}] of {len(labels)}, loss {loss:.3f}; "
          f"{int((labels != merged).sum())} labels change when merged")
    return labels


# --- what was learned (Sec. 7) ---

def subspace_similarity(first, second):
    """Return phi(A1, A2, i, j) of Eq. 4 for all i and j: A (r1, k) and (r2, k) -> (r1, r2).

    phi is ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j), U the right singular vectors of A: 1 if one
    subspace holds the other, max(i, j) / k by chance.
    """
    U1, U2 = (torch.linalg.svd(A, full_matrices=False).Vh.T for A in (first, second))  # (k, r)
    overlap = (U1.T @ U2).square().cumsum(0).cumsum(1)  # at (i, j): over the first i and j
    i = torch.arange(1, len(first) + 1)[:, None]
    j = torch.arange(1, len(second) + 1)
    return overlap / torch.minimum(i, j)


def amplification(W, dW, r):
    """Return Table 7: ||W||, ||dW||, ||U^T W V|| with the top r singular directions of dW, of W and
    of a random matrix, and the amplification factor ||dW|| / ||U^T W V||, with those of dW.
    """
    projections = []
    for source in (dW, W, torch.randn_like(W)):
        U, _, Vh = torch.linalg.svd(source, full_matrices=False)
        projections.append((U[:, :r].T @ W @ Vh[:r].T).norm())
    return torch.stack([W.norm(), dW.norm(), *projections, dW.norm() / projections[0]])


def chosen(kind, names, values):
    """Return {layer: value} of the first, middle and last layer of a kind, and the mean of all."""
    rows = {names[n]: values[n] for n in (0, len(names) // 2, -1)}
    return rows | {f"mean of {len(names)} {kind}": torch.stack(values).mean(0)}


def print_table(title, columns, rows):
    rows = {name: row.tolist() for name, row in rows.items()}
    table = pandas.DataFrame.from_dict(rows, orient="index", columns=columns)
    print(f"\n{title}\n" + table.to_string(float_format="{:.2f}".format))


@torch.no_grad()
def compare(args):
    """Print and draw phi (Fig. 3, 4) and amplification (Table 7) of two adapters of one base."""
    # On the CPU: not every device has an SVD.
    adapters = [dict(lora_layers(load_adapted(args, folder).cpu())) for folder in args.compare]
    kinds = {}  # the layers that both adapt, by name within a block: query, value
    for name in adapters[0]:
        if name in adapters[1]:
            kinds.setdefault(re.split(r"\.\d+\.", name)[-1], []).append(name)
    if not kinds:
        raise ValueError("--compare: the adapters share no layer")
    torch.manual_seed(0)  # of the random matrices

    maps = {}
    for kind, names in kinds.items():
        pairs = [[adapter[name].lora_A for adapter in adapters] for name in names]
        maps |= chosen(kind, names, [subspace_similarity(*pair) for pair in pairs])
        maps[f"random, {kind}"] = subspace_similarity(*map(torch.randn_like, pairs[0]))
        (r1, k), r2 = pairs[0][0].shape, len(pairs[0][1])
        larger = torch.maximum(torch.arange(r1)[:, None], torch.arange(r2)) + 1
        maps[f"chance max(i, j) / k, {kind}"] = larger / k
    print_table("Subspace similarity phi(i, j) (Eq. 4), i of {}, j of {}".format(*args.compare),
                ["1, 1", f"1, {r2}", f"{r1}, {r2}"],
                {name: phi[[0, 0, -1], [0, -1, -1]] for name, phi in maps.items()})

    for folder, adapter in zip(args.compare, adapters):
        rows = {}
        for kind, names in kinds.items():
            values = []
            for layer in map(adapter.get, names):
                W = layer.weight.T if is_transposed(layer.base) else layer.weight
                values.append(amplification(W, layer.delta(), len(layer.lora_A)))
            rows |= chosen(kind, names, values)
        print_table(f"Amplification (Table 7) of {folder}, r={len(layer.lora_A)}",
                    ["|W|", "|dW|", "|U'WV|: dW", "W", "random", "factor"], rows)
    if not Figure:
        return maps
    figure = Figure(figsize=(16, 2.5 * len(kinds)), layout="constrained")  # as Fig. 3 and 4
    grid = figure.subplots(len(kinds), math.ceil(len(maps) / len(kinds)), squeeze=False)
    for axes, (name, phi) in zip(grid.flat, maps.items()):
        image = axes.imshow(phi.numpy(), vmin=0, vmax=1, aspect="auto",
                            extent=(0.5, r2 + 0.5, r1 + 0.5, 0.5))
        axes.set_title(name.split("encoder.")[-1], fontsize=7)
    figure.colorbar(image, ax=grid, label="phi: i down, j across")
    first, second = (Path(folder).resolve().name for folder in args.compare)
    picture = Path(args.out, f"compare-{first}-{second}.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    print(f"written: {picture}")
    return maps


# --- demo ---

GOOD = "lovely superb charming moving fresh witty".split()
BAD = "dull awful clumsy stale flat tired".split()
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the music was but story .".split() + GOOD + BAD


def write_demo(folder, seed, train=1500, validation=500):
    """Write an untrained BERT (base/) and sentences whose label is whether the story is good."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(folder / "base")
    vocab = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocab, model_max_length=32).save_pretrained(folder / "base")
    rng = random.Random(seed)
    for split, count in [("train", train), ("validation", validation)]:
        pairs = [rng.choices(GOOD + BAD, k=2) for _ in range(count)]
        table = pandas.DataFrame({
            "sentence": [f"the music was {music} but the story was {story} ."
                         for music, story in pairs],
            "label": [int(story in GOOD) for _, story in pairs]})
        table.to_json(folder / f"{split}.jsonl", orient="records", lines=True)


def demo(seed):
    """Teach an untrained encoder to judge the story, not the music."""
    folder = Path("demo-sst2")
    torch.set_num_threads(1)  # for tensors this small a second thread costs more than it computes
    write_demo(folder, seed)
    (folder / "sst2.jsonl").unlink(missing_ok=True)  # so that its runs are made again
    flags = (f"--model {folder}/base --data {folder} --out {folder} --ranks 1 4 --lr 1e-2 "
             f"--full-finetune --full-lr 1e-3 --seeds {seed} {seed + 1} --device cpu "
             "--dtype float32 --epochs 2")
    print(f"python train_sst2.py {flags}", flush=True)
    return main(parse_args(flags.split()))


# --- the edge ---

def run_script():
    """End what a flag or a file can cause in one line on stderr and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return main(parse_args())
    except (ValueError, OSError, SafetensorError) as error:  # the last: a full disk
        message = first_line(error)
    except RuntimeError as error:
        if not re.search("out of memory|allocate|ALLOC_FAILED", str(error)):
            raise
        message = "out of memory: try --checkpoint-activations, or a smaller --batch-size"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"train_sst2.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run_script()
