"""LoRA and full fine-tuning of RoBERTa, DistilBERT or BERT on SST-2 (Hu et al. 2021, Sec. 5, 7).

    python train_sst2.py                               # RoBERTa-base, r=8 on query and value
    python train_sst2.py --ranks 1 2 4 8 --seeds 0 1 2 --full-finetune      # the rank ablation
    python train_sst2.py --demo                        # half a minute on a CPU, no download
    python train_sst2.py --adapter runs/sst2/r8-s0     # score a saved adapter
    python train_sst2.py --compare runs/sst2/r8-s0 runs/sst2/r64-s1    # what was learned

One experiment is one folder, --out: sst2.jsonl has a line per finished run; those are skipped;
sst2.png the curves; r8-s0/ adapter and head of r=8 and seed 0, as PEFT saves them. Own data is a
folder with train and validation as .jsonl or .tsv: sentence, and label 0 or 1.

Weights are fp32 under autocast. SST-2 validation has 872 rows: at 93% one run's 95% interval is
+/- 1.7 points. All ranks and targets share one alpha and lr, and the update is scaled by alpha / r:
another rank (Sec. 7.2), or other targets at one budget (Sec. 7.1), is another scale too. To be
read alone, this file imports lora.py only and has its own small helpers.
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
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pandas  # comes with datasets
import torch
import transformers
from huggingface_hub import HfApi, errors
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lora import (LoRAConfig, count_parameters, inject_lora, is_transposed, load_adapter,
                  lora_layers, save_adapter)

# Huge pages (Linux): without them up to twice the memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

BASE = "roberta-base"


# --- flags ---

def at_least(low, kind=int):
    """An argparse type: a finite number from low on."""
    def number(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"expected at least {low:g}, got {text}")
        return kind(text)
    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS)  # errors in one line
    add, rate, count = parser.add_argument, at_least(1e-12, float), at_least(1)
    add("--model", help=f"Hub id or folder (default: the adapter's, or {BASE})")
    add("--data", default="nyu-mll/glue", help="Hub id or folder")
    add("--targets", nargs="+", help="layers to adapt (default: query and value)")
    add("--head", nargs="+", help="modules trained in full (default: the classifier)")
    add("--adapter", metavar="DIR", help="score a saved adapter")
    add("--compare", nargs=2, metavar="DIR", help="Sec. 7.2 and 7.3 on two adapters")
    add("--ranks", nargs="*", type=count, default=[8])
    add("--seeds", nargs="+", type=at_least(0), default=[0])
    add("--alpha", type=float, default=16.0, help="released script: 16; Table 9: 8")
    add("--dropout", type=float, default=0.05)
    add("--lr", type=rate, default=5e-4, help="before warm-up and decay (Table 9: 5e-4)")
    add("--full-finetune", action="store_true", help="beside LoRA")
    add("--full-lr", type=rate, default=5e-5, help="of full fine-tuning")
    add("--epochs", type=count, default=3)
    add("--batch-size", type=count, default=32, help="sentences")
    add("--grad-accum", type=count, default=1, help="batches per step")
    add("--checkpoint-activations", action="store_true", help="less memory, more time")
    add("--max-length", type=at_least(3), default=128, help="tokens")
    add("--nb-samples", type=count, help="of training, drawn with seed 0")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--out", default="runs/sst2")
    add("--demo", action="store_true", help="in demo-sst2/")
    args = parser.parse_args(argv)
    if not args.ranks and not args.full_finetune:
        parser.error("--ranks: give a rank, or --full-finetune")
    return args


# --- data and model, from a folder or the Hub ---

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def hub_problem(name, kind):
    """Ask the Hub for a repository. Return what is wrong, or None."""
    try:
        with ThreadPool(1) as pool:  # get's timeout also ends a name look-up that hangs
            pool.apply_async(HfApi().repo_info, [name], {"repo_type": kind, "timeout": 5}).get(8)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return f"no such folder, and no such {kind} on the Hub"
    except Exception:
        return "no such folder, and the Hub cannot be reached; try --demo"


@contextmanager
def loading(flag, name, kind=None):
    """Turn a failure into one line. Yield True if only local files can be read."""
    problem = hub_problem(name, kind) if kind and not Path(name).exists() else None
    try:
        yield problem is not None
    except Exception as error:
        raise ValueError(f"{flag} {name}: {problem or first_line(error)}") from None


def pretrained(kind, name, **options):
    with loading("--model", name, "model") as offline:
        return kind.from_pretrained(name, local_files_only=offline, **options)


def read_sentences(data, split):
    """Return [(sentence, 0 or 1)] of a split. Raise ValueError for what cannot be read."""
    tsv, jsonl = Path(data, f"{split}.tsv"), Path(data, f"{split}.jsonl")
    with loading("--data", data, "dataset") as offline:
        if tsv.exists():
            # GLUE's own files quote nothing: a row may begin with a lone quotation mark.
            file = tsv.open(encoding="utf-8-sig")
            table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        elif Path(data).exists():
            table = map(json.loads, filter(str.strip, jsonl.open(encoding="utf-8-sig")))
        else:
            import datasets
            datasets.config.HF_HUB_OFFLINE = offline
            config = "sst2" if data.endswith("glue") else None
            table = datasets.load_dataset(data, config, split=split).to_list()
        rows = [(row.get("sentence"), str(row.get("label"))) for row in table]
        if {type(text) for text, _ in rows} != {str} or {label for _, label in rows} - {"0", "1"}:
            raise ValueError(f"{split}: expected sentence, and label 0 or 1")
    return [(text, int(label)) for text, label in rows]


def read_data(args, split):
    """Return [(token ids, label)]. A long sentence is cut: its label still holds."""
    tokenizer = pretrained(transformers.AutoTokenizer, args.model)
    positions = pretrained(transformers.AutoConfig, args.model).max_position_embeddings
    rows = read_sentences(args.data, split)
    if split == "train" and args.nb_samples:
        rows = random.Random(0).sample(rows, min(args.nb_samples, len(rows)))
    sentences, labels = zip(*rows)
    longest = min(args.max_length, positions - 2)  # RoBERTa's first two take no token
    ids = tokenizer(list(sentences), truncation=True, max_length=longest).input_ids
    return list(zip(ids, labels))


def load_encoder(args, r, seed):
    """Return (pretrained encoder under a fresh head, its LoRAConfig). r=None means none."""
    # For head, A and dropout masks. torch's CPU generator uses 32 bits of a seed.
    torch.manual_seed(random.Random(seed).getrandbits(32))
    shape = pretrained(transformers.AutoConfig, args.model, num_labels=2)  # fails at once offline
    model, info = pretrained(transformers.AutoModelForSequenceClassification, args.model,
                             config=shape, dtype=torch.float32, output_loading_info=True)
    distilbert = shape.model_type == "distilbert"
    targets = args.targets or (["q_lin", "v_lin"] if distilbert else ["query", "value"])
    head = args.head
    if head is None:
        head = [name for name, module in model.named_children()
                if module is not model.base_model and list(module.parameters())]
    for key in info["missing_keys"]:
        if not any(f".{module}." in f".{key}" for module in head):
            raise ValueError(f"--model {args.model} has no {key}: name its module in --head")
    model.to(args.device)
    config = None
    if r:
        config = LoRAConfig(r, args.alpha, args.dropout, targets, also_train=head)
        inject_lora(model, config)
    if args.checkpoint_activations:
        model.activation_checkpointing_enable()
    return model, config


# --- batches ---

def cut(items, size):
    return [items[start:start + size] for start in range(0, len(items), size)]


def length(example):
    return len(example[0])


def epoch_windows(examples, batch_size, grad_accum, rng):
    """Shuffle an epoch into windows, one per optimizer step: lists of micro-batches."""
    size = batch_size * grad_accum
    windows = []  # sorted by length in pools of 50, to save padding
    for pool in cut(rng.sample(examples, len(examples)), 50 * size):
        windows += cut(sorted(pool, key=length), size)
    rng.shuffle(windows)
    return [cut(window, batch_size) for window in windows]


# --- mixed precision ---

def settle(args):
    """Settle device and dtype: auto is the device's own half precision, or fp32."""
    if args.device == "auto":
        args.device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with loading("--device", args.device):
        args.device = torch.zeros(1, device=args.device).device
    kind, native = args.device.type, "float32"
    if kind == "cuda":
        native = "bfloat16" if torch.cuda.get_device_capability(args.device)[0] >= 8 else "float16"
    elif kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        native = "bfloat16"
    if args.dtype == "auto":
        args.dtype = native
    if kind == "cpu" and args.dtype not in ("float32", native):
        warnings.warn(f"--dtype {args.dtype} is slow on this CPU")
    print(f"{args.device}: fp32 weights, matrix products in {args.dtype}")
    if kind == "mps" and args.checkpoint_activations:
        raise ValueError("--checkpoint-activations: on MPS torch recomputes other dropout masks")


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, Sec. 3.2): below 6e-8 fp16 gradients vanish.

    An overflow halves the scale, `interval` good steps in a row double it.
    """

    def __init__(self, enabled, scale=2.0**16, interval=2000):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.interval = interval
        self.good_steps = self.skips = 0  # in a row

    def unscale(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:  # None: not in the loss
                parameter.grad /= self.scale

    def update(self, finite):
        self.good_steps = self.good_steps + 1 if finite else 0
        self.skips = 0 if finite else self.skips + 1
        if self.enabled and not finite:
            self.scale /= 2
        elif self.enabled and self.good_steps % self.interval == 0:
            self.scale *= 2


def classify(model, batch, dtype):
    """Return (summed cross-entropy, number right). Products run in dtype, sums in fp32."""
    device = model.device
    ids = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True).to(device)
    mask = pad_sequence([torch.ones(len(row)) for row, _ in batch], batch_first=True).to(device)
    labels = torch.tensor([label for _, label in batch], device=device)
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        logits = model(input_ids=ids, attention_mask=mask).logits
    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, (logits.argmax(-1) == labels).sum()


# --- evaluation ---

@torch.no_grad()
def evaluate(model, examples, dtype):
    """Return (share right, mean cross-entropy)."""
    model.eval()
    right, loss = 0, 0.0
    for batch in cut(sorted(examples, key=length), 64):  # less padding
        batch_loss, batch_right = classify(model, batch, dtype)
        right += int(batch_right)
        loss += float(batch_loss)
    return right / len(examples), loss / len(examples)


def wilson_interval(p, n, z=1.96):
    """95% interval of a share p of n (Wilson 1927), valid near 0 and 1 too."""
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / scale, (middle + half) / scale]


# --- one run ---

def name_of(r):
    return f"r={r}" if r else "full"


def train(args, data, r, seed):
    """Train and evaluate LoRA of rank r, or every weight. Return (line of sst2.jsonl, model)."""
    model, config = load_encoder(args, r, seed)
    trainable, total = count_parameters(model)
    adapter = sum(layer.lora_A.numel() + layer.lora_B.numel() for _, layer in lora_layers(model))
    print(f"{name_of(r)}, seed {seed}: {adapter:,} adapter + {trainable - adapter:,} other weights "
          f"train, {trainable / total:.2%} of {total:,}")
    cuda = args.device.type == "cuda"
    if cuda:
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
    history, losses, done, seconds = [], [], 0, 0.0

    for step, window in enumerate(bar := tqdm(windows, unit="step", disable=None), 1):
        start = time.perf_counter()
        model.train()

        # 1. Learning rate: up over 6% of the steps (Table 9), at most 100, then down the line from
        #    the peak at step 0 to 0 at the end. Skipped steps do not count.
        warmup = max(1, min(100, 0.06 * steps))
        lr = peak_lr * min((done + 1) / warmup, (steps - done) / steps)
        optimizer.param_groups[0]["lr"] = lr

        # 2. Forward and backward. Each loss is divided by the sentences of the whole window: 4 x 8
        #    gives the gradients of 1 x 32.
        sentences = sum(len(batch) for batch in window)
        loss = 0.0
        for batch in window:
            batch_loss, _ = classify(model, batch, args.dtype)
            (batch_loss * (scaler.scale / sentences)).backward()
            loss += batch_loss.detach()
        loss = float(loss) / sentences

        # 3. Unscale and clip, in fp32.
        scaler.unscale(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))

        # 4. Step, or after an overflow skip: weights and moments stay.
        finite = math.isfinite(loss + norm)
        if finite:
            optimizer.step()
            losses.append(loss)
            done += 1
        optimizer.zero_grad(set_to_none=True)
        scaler.update(finite)
        if scaler.skips == (20 if scaler.enabled else 1):
            raise ValueError(f"loss {loss:g}, gradient norm {norm:g} at step {step}: "
                             "try a lower learning rate")
        seconds += time.perf_counter() - start
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        # 5. Log, and evaluate four times an epoch.
        if step % every == 0 or step == steps:
            accuracy, val_loss = evaluate(model, data["validation"], args.dtype)
            history.append({"epoch": step * args.epochs / steps, "accuracy": accuracy,
                            "train_loss": statistics.fmean(losses or [loss]), "loss": val_loss})
            bar.write("  ".join(f"{key} {value:.3f}" for key, value in history[-1].items()))
            losses = []

    if config:
        save_adapter(model, Path(args.out, f"r{r}-s{seed}"))
    peak = torch.cuda.max_memory_allocated(args.device) / 2**30 if cuda else None
    flags = ("model data head epochs batch_size grad_accum max_length nb_samples dtype "
             + ("lr alpha dropout targets" if config else "full_lr"))
    n = len(data["validation"])
    run = {flag: getattr(args, flag) for flag in flags.split()}
    run |= {"r": r, "seed": seed, "adapter_parameters": adapter, "trainable": trainable,
            "total": total, **history[-1], "n": n, "ci95": wilson_interval(accuracy, n),
            "skipped": steps - done, "seconds": seconds, "peak_memory_gb": peak, "history": history}
    return run, model


# --- one experiment: its folder, table and picture ---

def read_runs(args, path):
    """Return the finished runs. Refuse those of another experiment."""
    lines = path.read_text().splitlines() if path.exists() else []
    with loading("--out", args.out):
        runs = [json.loads(line) for line in lines]
    for run in runs:
        changed = [f"--{flag.replace('_', '-')} was {run[flag]}, is {value}"
                   for flag, value in vars(args).items() if run.get(flag, value) != value]
        if changed:
            raise ValueError(f"{path} holds other runs: {'; '.join(changed)}; give another --out")
    return runs


def report(runs, picture):
    """Print a row per rank. Draw its seeds' mean in a band from lowest to highest."""
    table = pandas.DataFrame(runs)
    table["rank"] = [name_of(run["r"]) for run in runs]
    ranks = table.groupby("rank", sort=False)
    columns = {"adapter_parameters": "first", "trainable": "first", "seconds": "mean",
               "loss": "mean", "accuracy": ["mean", "std", "count"]}
    low, high = runs[0]["ci95"]
    print(ranks.agg(columns).to_string(float_format="{:.4g}".format))
    print(f"n = {runs[0]['n']}: one run's 95% interval is +/- {(high - low) / 2:.3f}")
    if not Figure:
        return
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 3), ("train_loss", "loss", "accuracy")):
        for name, rank in ranks:
            curves = pandas.concat(map(pandas.DataFrame, rank["history"])).groupby("epoch")[key]
            mean = curves.mean()
            axes.plot(mean.index, mean, label=name)
            axes.fill_between(mean.index, curves.min(), curves.max(), alpha=0.2)
        axes.set(xlabel="epoch", title=key)
    axes.legend()
    figure.savefig(picture)


# --- score a saved adapter ---

def load_adapted(args, folder):
    """Return a base with its adapter, and set --model and --head, if not given, to its own."""
    with loading("the adapter", folder):
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf8"))
        args.model = args.model or config["base_model_name_or_path"] or BASE
        args.head = args.head or config["modules_to_save"] or []
    model, _ = load_encoder(args, None, 0)
    load_adapter(model, folder)
    return model


def score_adapter(args):
    model = load_adapted(args, args.adapter)
    examples = read_data(args, "validation")
    accuracy, loss = evaluate(model, examples, args.dtype)
    low, high = wilson_interval(accuracy, len(examples))
    print(f"accuracy {accuracy:.2%} [{low:.2%}, {high:.2%}] of {len(examples)}, loss {loss:.3f}")
    return accuracy, loss


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


def amplification(layer):
    """Return Table 7: ||W||, ||dW||, ||U^T W V|| with the top r singular directions of dW, of W and
    of a random matrix, and the amplification factor ||dW|| / ||U^T W V|| with those of dW.
    """
    W = layer.weight.T if is_transposed(layer.base) else layer.weight
    dW, r = layer.delta(), len(layer.lora_A)
    projections = []
    for source in (dW, W, torch.randn_like(W)):
        U, _, Vh = torch.linalg.svd(source, full_matrices=False)
        projections.append((U[:, :r].T @ W @ Vh[:r].T).norm())
    return torch.stack([W.norm(), dW.norm(), *projections, dW.norm() / projections[0]])


def measured(kinds, measure):
    """Return {layer: measure(layer)} of each kind's first, middle and last, and the mean of all."""
    rows = {}
    for kind, layers in kinds.items():
        values = [measure(layer) for layer in layers]
        rows |= {layers[n]: values[n] for n in (0, len(layers) // 2, -1)}
        rows[f"mean of {len(layers)} {kind}"] = torch.stack(values).mean(0)
    return rows


def print_table(title, columns, rows):
    table = pandas.DataFrame(torch.stack([*rows.values()]).numpy(), [*rows], columns)
    print(f"\n{title}\n" + table.to_string(float_format="{:.2f}".format))


@torch.no_grad()
def compare(args):
    """Print and draw phi (Fig. 3, 4) and amplification (Table 7) of two adapters of one base."""
    # On a CPU: not every device has an SVD.
    first, second = (dict(lora_layers(load_adapted(args, folder).cpu())) for folder in args.compare)
    pairs = {name: (layer.lora_A, second[name].lora_A)
             for name, layer in first.items() if name in second}
    if not pairs:
        raise ValueError("--compare: the adapters share no layer")
    kinds = {}  # layers by name within a block: query, value
    for name in pairs:
        kinds.setdefault(re.split(r"\.\d+\.", name)[-1], []).append(name)

    torch.manual_seed(0)
    maps = measured(kinds, lambda name: subspace_similarity(*pairs[name]))
    for kind, names in kinds.items():
        A1, A2 = map(torch.randn_like, pairs[names[0]])
        maps[f"random {kind}; chance max(i, j) / {A1.shape[1]}"] = subspace_similarity(A1, A2)
    r1, r2 = next(iter(maps.values())).shape
    corners = {name: phi[[0, 0, -1], [0, -1, -1]] for name, phi in maps.items()}
    print_table("Similarity phi(i, j) (Eq. 4), i of {}, j of {}".format(*args.compare),
                ["1, 1", f"1, {r2}", f"{r1}, {r2}"], corners)
    for folder, adapter in zip(args.compare, (first, second)):
        print_table(f"Amplification (Table 7) of {folder}",
                    ["|W|", "|dW|", "|U'WV|: dW", "W", "random", "factor"],
                    measured(kinds, lambda name: amplification(adapter[name])))
    if not Figure:
        return maps
    figure = Figure(figsize=(14, 10), layout="constrained")
    for place, (name, phi) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(math.ceil(len(maps) / 4), 4, place)
        image = axes.imshow(phi.numpy(), vmin=0, vmax=1, aspect="auto",
                            extent=(0.5, r2 + 0.5, r1 + 0.5, 0.5))
        axes.set_title(name, fontsize=7)
    figure.colorbar(image, ax=figure.axes, label="phi: i down, j across")
    names = "-".join(Path(folder).name for folder in args.compare)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(args.out, f"compare-{names}.png"))
    return maps


# --- demo ---

GOOD, BAD = ["lovely", "superb", "moving", "witty"], ["dull", "awful", "clumsy", "stale"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "music", "but", "story", *GOOD, *BAD]


def write_demo(folder, seed, train=1500, validation=500):
    """Write an untrained BERT (base/) and sentences whose label is whether the story is good."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(folder / "base")
    vocab = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocab).save_pretrained(folder / "base")
    rng = random.Random(seed)
    for split, count in [("train", train), ("validation", validation)]:
        text = "sentence\tlabel\n"
        for _ in range(count):
            music, story = rng.choices(GOOD + BAD, k=2)
            text += f"{music} music but {story} story\t{int(story in GOOD)}\n"
        (folder / f"{split}.tsv").write_text(text)


def demo(seed):
    """Teach an untrained encoder to judge the story, not the music."""
    folder = Path("demo-sst2")
    torch.set_num_threads(1)  # on a busy CPU more threads are five times slower
    write_demo(folder, seed)
    (folder / "sst2.jsonl").unlink(missing_ok=True)
    flags = (f"--model {folder}/base --data {folder} --out {folder} --seeds {seed} {seed + 1} "
             "--ranks 1 4 --lr 1e-2 --full-finetune --full-lr 1e-3 --epochs 2 --device cpu "
             "--dtype float32")
    return main(parse_args(flags.split()))


# --- main ---

def main(args):
    """Run the demo, score, compare, or make the runs that the folder lacks and report all."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.demo:
        return demo(args.seeds[0])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("one process only: start it without torchrun")
    settle(args)
    if args.adapter:
        return score_adapter(args)
    if args.compare:
        return compare(args)
    args.model = args.model or BASE
    data = {split: read_data(args, split) for split in ("train", "validation")}
    path = Path(args.out, "sst2.jsonl")
    runs = read_runs(args, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for r, seed in itertools.product(args.ranks + [None] * args.full_finetune, args.seeds):
        if (r, seed) not in [(run["r"], run["seed"]) for run in runs]:
            run = train(args, data, r, seed)[0]  # frees the model
            runs.append(run)
            with open(path, "a") as file:
                file.write(json.dumps(run) + "\n")
    report(runs, path.with_suffix(".png"))
    return runs


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
