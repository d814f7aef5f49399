"""LoRA and full fine-tuning of RoBERTa, DistilBERT or BERT on SST-2 (Hu et al. 2021, Sec. 5, 7).

    python train_sst2.py                               # RoBERTa-base, r=8 on query and value
    python train_sst2.py --ranks 1 2 4 8 --seeds 0 1 2 --full-finetune      # the rank ablation
    python train_sst2.py --demo                        # half a minute on a CPU, no download
    python train_sst2.py --adapter runs/sst2/r8-s0     # score a saved adapter
    python train_sst2.py --adapter runs/sst2/r8-s0 --predict "A joy." "Tedious."
    python bench/section7.py runs/sst2/r4-s0 runs/sst2/r8-s1                # what was learned

An experiment is a folder, --out. sst2.jsonl has a line per finished run (which is not run again),
sst2.png the curves, r8-s0/ the adapter and head of r=8 and seed 0 after the last step, in PEFT's
format (with few sentences an earlier step may have had a lower validation loss). Own data is a
folder with one train and one validation file, .jsonl, .json, .parquet, .csv or, without quotes,
.tsv, with the columns sentence and label (0 or 1).

Weights are in float32 and products in --dtype, by autocast: an encoder is small, and full
fine-tuning needs float32 weights. (train_math.py holds its base in --dtype, to fit a small card.)
SST-2's validation has 872 rows: at 93% one run's 95% interval is +/- 1.7 points. All runs share one
alpha and lr. The update is scaled by alpha / r, so that a comparison of ranks (Sec. 7.2), or of
targets at one budget (Sec. 7.1), compares scales too.
"""
import csv
import itertools
import json
import math
import random
import statistics
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pandas  # comes with datasets
import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval_gsm8k import refuse_other_settings, wilson_interval
from lora import (LoRAConfig, count_parameters, inject_lora, load_adapter, lora_layers,
                  save_adapter)
from train_math import (FILES, WORLD, GiB, LossScaler, Parser, add_flag, agree, base_hash,
                        check_ids, chunks, epoch_batches, hash_of, length, loading, locked,
                        no_effect, number, open_table, peak_memory, pick_device, pick_dtype,
                        plain_text, run_script, trained_with, write_whole)

BASE = "roberta-base"


# --- flags ---

def parse_args(argv=None):
    parser, positive, count = Parser(description=__doc__), number(float, 1e-12), number(int, 1)
    add = partial(add_flag, parser)
    add("--model", None, f"Hub id or folder (default: the adapter's, or {BASE})")
    add("--data", "nyu-mll/glue", "Hub id or folder")
    add("--targets", None, "layers to adapt (default: query and value)", nargs="+")
    add("--head", None, "modules trained in full (default: the classifier)", nargs="+")
    add("--adapter", None, "score a saved adapter", metavar="DIR")
    add("--predict", None, "print label and probability of sentences", nargs="+", metavar="TEXT")
    add("--ranks", [8], "ranks to train; none for --full-finetune alone", nargs="*", **count)
    add("--seeds", [0], "a run for each rank and seed", nargs="+", **number(int, 0))
    add("--alpha", 16.0, "updates are scaled by alpha / r; 8 in Table 9", **positive)
    add("--dropout", 0.05, "on the adapter's input", **number(float, 0, 0.99))
    add("--lr", 5e-4, "at the peak, as in Table 9", **positive)
    add("--full-finetune", False, "train every weight too, to compare", action="store_true")
    add("--full-lr", 5e-5, "of full fine-tuning", **positive)
    add("--epochs", 3, "passes over the training sentences", **count)
    add("--batch-size", 32, "sentences per batch", **count)
    add("--grad-accum", 1, "batches per step", **count)
    add("--checkpoint-activations", False, "less memory, more time", action="store_true")
    add("--max-length", 128, "tokens", **number(int, 3))
    add("--nb-samples", None, "training sentences, drawn with seed 0 (default: all)", **count)
    add("--dtype", "auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--out", "runs/sst2", "folder of the experiment")
    add("--demo", False, "half a minute on a CPU; writes demo-sst2/", action="store_true")
    args = parser.parse_args(argv)
    if not args.ranks and not args.full_finetune:
        parser.error("--ranks: give a rank, or --full-finetune")
    if args.predict and args.adapter is None:
        parser.error("--predict needs --adapter, which makes the predictions")
    if args.full_lr != parser.get_default("full_lr") and not args.full_finetune:
        parser.error("--full-lr has no effect without --full-finetune")
    message = ""
    if args.demo:
        message = no_effect(parser, args, "--demo")
    elif args.adapter is not None:  # it is used as it is, not trained
        message = no_effect(parser, args, "--adapter", "predict", "model", "data",
                            "max_length", "dtype", "device")
    if message:
        raise ValueError(message)
    for text in args.predict or ():
        plain_text(text, "--predict")
    return args


# --- data and model ---

def read_sentences(data, split):
    """Return [(sentence, 0 or 1)] of a split. Raise ValueError for what cannot be read."""
    files = [path for suffix in (".tsv", *FILES) if (path := Path(data, split + suffix)).exists()]
    with loading("--data", data):
        if Path(data).exists() and len(files) != 1:
            raise ValueError(f"expected a folder with one {split}.jsonl, .json, .parquet, .csv or "
                             f".tsv, found {', '.join(path.name for path in files) or 'none'}")
        if files and files[0].suffix == ".tsv":
            # GLUE's own files quote nothing: a row may begin with a lone quotation mark.
            table = csv.DictReader(files[0].read_text(encoding="utf-8-sig").split("\n"),
                                   delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            table = open_table(str(files[0]) if files else data, split)
        rows = []
        for place, row in enumerate(table, 1):
            known = isinstance(row, dict) and None not in row and "sentence" in row
            if not known or str(row.get("label")) not in ("0", "1"):
                raise ValueError(f"{split}, row {place}: expected sentence, and label 0 or 1, "
                                 f"found {row!r:.100}")
            sentence = plain_text(row.get("sentence"), f"{split}, row {place}: sentence")
            rows.append((sentence, int(row["label"])))
        if not rows:
            raise ValueError(f"{split} has no rows")
    return rows


def encode(args, sentences):
    """Return token ids. A long sentence is cut: its label still holds."""
    with loading("--model", args.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    longest = min(args.max_length, tokenizer.model_max_length)
    return tokenizer(list(sentences), truncation=True, max_length=longest).input_ids


def read_data(args, split):
    """Return [(token ids, label)]."""
    rows = read_sentences(args.data, split)
    if split == "train" and args.nb_samples:
        rows = random.Random(0).sample(rows, min(args.nb_samples, len(rows)))
    sentences, labels = zip(*rows)
    return list(zip(encode(args, sentences), labels))


def load_encoder(args, r, seed):
    """Return the pretrained encoder under a fresh head, with an adapter of rank r unless None."""
    # This seeds the head, A and the dropout masks. torch's CPU generator takes 32 bits of a seed.
    torch.manual_seed(random.Random(seed).getrandbits(32))
    with loading("--model", args.model):
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            args.model, dtype=torch.float32, output_loading_info=True)
        if model.config.num_labels != 2:
            raise ValueError(f"a classifier of {model.config.num_labels} classes, expected 2")
    head = args.head
    if head is None:
        head = [name for name, module in model.named_children()
                if module is not model.base_model and list(module.parameters())]
    for key in info["missing_keys"]:
        if not any(f".{module}." in f".{key}" for module in head):
            raise ValueError(f"--model {args.model} has no {key}: expected it there or in a module "
                             f"trained in full (--head), found {', '.join(head) or 'none'}")
    model.to(args.device)
    if r:
        distilbert = model.config.model_type == "distilbert"
        targets = args.targets or (["q_lin", "v_lin"] if distilbert else ["query", "value"])
        inject_lora(model, LoRAConfig(r, args.alpha, args.dropout, targets, also_train=head))
    if args.checkpoint_activations:
        model.activation_checkpointing_enable()
    return model


def load_adapted(args):
    """Return --adapter on its base: --model, or else the one it was trained on."""
    with loading("--adapter", args.adapter):
        trained = trained_with(args.adapter, "SEQ_CLS")
    own = {"model": args.model or trained.get("model", BASE), "head": trained["head"]}
    model = load_encoder(Namespace(**vars(args) | own), None, 0)
    load_adapter(model, args.adapter)
    return model.eval()


# --- batches, loss, accuracy ---

def logits_of(model, rows, dtype):
    """Return the logits of rows of token ids, (rows, 2) in float32. Products run in dtype."""
    # The pad id is the model's own: by it a decoder finds a row's end, and RoBERTa its positions.
    device, pad = model.device, model.config.pad_token_id or 0
    ids = pad_sequence([torch.tensor(row) for row in rows], True, pad).to(device)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], True).to(device)
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        return model(input_ids=ids, attention_mask=mask).logits.float()


def classify(model, batch, dtype):
    """Return (summed cross-entropy, number right) of [(token ids, label)]."""
    labels = torch.tensor([label for _, label in batch], device=model.device)
    logits = logits_of(model, [row for row, _ in batch], dtype)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return loss, (logits.argmax(-1) == labels).sum()


@torch.no_grad()
def evaluate(model, examples, dtype):
    """Return (accuracy, mean cross-entropy)."""
    model.eval()
    right, loss = 0, 0.0
    for batch in chunks(sorted(examples, key=length), 64):  # less padding
        batch_loss, batch_right = classify(model, batch, dtype)
        right += int(batch_right)
        loss += float(batch_loss)
    return right / len(examples), loss / len(examples)


@torch.no_grad()
def check_rows(model, examples):
    """Raise ValueError for ids without an embedding, or if padding changes the logits of a row.

    Padding is tried on one half of the longest row.
    """
    check_ids(model, [ids for ids, _ in examples])
    row = max(examples, key=length)[0]
    half = row[:(len(row) + 1) // 2]
    model.eval()
    alone = logits_of(model, [half], "float32")[0]
    padded = logits_of(model, [half, row], "float32")[0]
    if not agree(padded, alone, 1e-3):
        raise ValueError(f"{type(model).__name__} gives a row other logits when it is padded: "
                         "it cannot be trained in batches here")


# --- one run ---

def rank_name(r):
    return f"r={r}" if r else "full"


def train(args, data, r, seed):
    """Train and evaluate LoRA of rank r, or every weight. Return (line of sst2.jsonl, model)."""
    model = load_encoder(args, r, seed)
    trainable, total = count_parameters(model)
    adapter = sum(layer.lora_A.numel() + layer.lora_B.numel() for _, layer in lora_layers(model))
    print(f"{rank_name(r)}, seed {seed}: {adapter:,} adapter + {trainable - adapter:,} other "
          f"weights train, {trainable / total:.2%} of {total:,}")
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    peak_lr = args.lr if r else args.full_lr
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Weight decay leaves biases and LayerNorm out, as is usual.
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr)
    scaler = LossScaler(enabled=args.dtype == "float16")
    size = args.batch_size * args.grad_accum  # sentences a step, in micro-batches
    windows = [chunks(window, args.batch_size) for epoch in range(args.epochs)
               for window in epoch_batches(data["train"], size, seed, epoch)]
    steps = len(windows)
    warmup = max(1, min(100, 0.06 * steps))
    quarters = {round(steps * n / (4 * args.epochs)) for n in range(1, 4 * args.epochs + 1)}
    history, losses, seconds = [], [], 0.0

    for step, window in enumerate(bar := tqdm(windows, unit="step", disable=None), 1):
        start = time.perf_counter()
        model.train()

        # 1. Learning rate: linear warm-up over 6% of the steps (Table 9), at most 100, and linear
        #    decay from step 0 on. The lower of the two holds. Skipped steps do not count.
        done = step - 1 - scaler.skipped
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min((done + 1) / warmup, (steps - done) / steps)

        # 2. Forward and backward. Each loss is divided by the sentences of the whole window: 4 x 8
        #    gives the gradients of 1 x 32, without dropout and up to rounding.
        sentences = sum(len(batch) for batch in window)
        loss = 0.0
        for batch in window:
            batch_loss, _ = classify(model, batch, args.dtype)
            (batch_loss * (scaler.scale / sentences)).backward()
            loss += batch_loss.detach()
        loss = float(loss) / sentences

        # 3. Unscale and clip, in float32.
        scaler.unscale(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))

        # 4. Step, or after an overflow skip: weights and moments stay.
        finite = math.isfinite(loss + norm)
        if finite:
            optimizer.step()
            losses.append(loss)
        optimizer.zero_grad(set_to_none=True)
        scaler.update(finite)
        if scaler.diverged:
            raise ValueError(f"loss {loss:g}, gradient norm {norm:g} at step {step}: "
                             "try a lower learning rate")
        seconds += time.perf_counter() - start
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        # 5. Evaluate after each quarter of an epoch.
        if step in quarters:
            accuracy, val_loss = evaluate(model, data["validation"], args.dtype)
            history.append({"epoch": step * args.epochs / steps, "accuracy": accuracy,
                            "train_loss": statistics.fmean(losses or [loss]),
                            "val_loss": val_loss})
            bar.write("  ".join(f"{key} {value:.3f}" for key, value in history[-1].items()))
            losses = []

    if r:
        save_adapter(model, Path(args.out, f"r{r}-s{seed}"))
    flags = ("model data head epochs batch_size grad_accum max_length nb_samples dtype "
             + ("lr alpha dropout targets" if r else "full_lr"))
    n = len(data["validation"])
    run = {flag: getattr(args, flag) for flag in flags.split()}
    run |= {"r": r, "seed": seed, "adapter_parameters": adapter,
            "trainable": trainable, "total": total, **history[-1], "n": n,
            "ci95": list(wilson_interval(history[-1]["accuracy"] * n, n)),
            "skipped": scaler.skipped, "seconds": seconds,
            "peak_memory_gib": peak_memory(args.device) / GiB,  # on a CPU since the script began
            "history": history}
    labels = [label for _, label in data["validation"]]
    majority = max(labels.count(0), labels.count(1)) / n  # what always the same label would score
    if run["ci95"][0] <= majority:
        print(f"{rank_name(r)}, seed {seed} ends within chance ({majority:.1%} by one label): try "
              f"{'--lr' if r else '--full-lr'} three times as high or low, a smaller --batch-size, "
              f"more --epochs{' or --targets all-linear' if r else ''}")
    return run, model


# --- one experiment: its folder, table and picture ---

def read_runs(path, settings):
    """Return {(r, seed): finished run}. Raises ValueError for runs of another experiment."""
    runs = {}
    with loading("--out", path):
        for line in path.read_text().splitlines() if path.exists() else []:
            run = json.loads(line)
            refuse_other_settings(run, settings)
            runs[run["r"], run["seed"]] = run
    return runs


def report(runs, picture):
    """Print a row per rank. Draw its seeds' mean in a band from lowest to highest."""
    table = pandas.DataFrame(runs)
    table["rank"] = [rank_name(run["r"]) for run in runs]
    ranks = table.groupby("rank", sort=False)
    print(ranks.agg(
        adapter_weights=("adapter_parameters", "first"), trained=("trainable", "first"),
        seconds=("seconds", "mean"), val_loss=("val_loss", "mean"), accuracy=("accuracy", "mean"),
        std=("accuracy", "std"), seeds=("accuracy", "count")
    ).to_string(float_format="{:.4g}".format, na_rep="-"))
    half = max(high - low for low, high in table.ci95) / 2
    print(f"{runs[0]['n']} sentences: one run's 95% interval is at most +/- {half:.3f}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        return
    figure = Figure(figsize=(14, 4), layout="constrained")
    model, data = (Path(runs[0][name]).name for name in ("model", "data"))
    figure.suptitle(f"{model} on {data}, {runs[0]['n']} validation sentences")
    panels = {"train_loss": "training loss (nats)", "val_loss": "validation loss (nats)",
              "accuracy": "validation accuracy"}
    for axes, (key, label) in zip(figure.subplots(1, 3), panels.items()):
        for name, rank in ranks:
            curves = pandas.concat(map(pandas.DataFrame, rank["history"])).groupby("epoch")[key]
            mean = curves.mean()
            axes.plot(mean, label=name)
            axes.fill_between(mean.index, curves.min(), curves.max(), alpha=0.2)
        axes.set(xlabel="epoch", ylabel=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if (best := table.accuracy.max()) > 0.7:  # a run at chance would fill the axis
        axes.set_ylim(bottom=max(0.45, best - 0.15))
    axes.legend()
    figure.savefig(picture, dpi=120)


# --- a saved adapter ---

@torch.no_grad()
def predict(args, model):
    """Print label and probability of each sentence; return the probabilities of label 1."""
    encoded = encode(args, args.predict)
    check_ids(model, encoded)
    probabilities = logits_of(model, encoded, args.dtype).softmax(-1)[:, 1].tolist()
    for text, p in zip(args.predict, probabilities):
        print(f"label {int(p > 0.5)} {max(p, 1 - p):.1%}  {text}")
    return probabilities


def score_adapter(args, model):
    examples = read_data(args, "validation")
    check_rows(model, examples)
    accuracy, loss = evaluate(model, examples, args.dtype)
    low, high = wilson_interval(accuracy * len(examples), len(examples))
    print(f"accuracy {accuracy:.2%} [{low:.2%}, {high:.2%}] of {len(examples)}, loss {loss:.3f}")
    return accuracy, loss


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


def demo():
    """Teach an untrained encoder to judge the story, not the music."""
    folder = Path("demo-sst2")
    torch.set_num_threads(1)  # on a busy CPU more threads are five times slower
    write_demo(folder, 0)
    (folder / "sst2.jsonl").unlink(missing_ok=True)
    flags = (f"--model {folder}/base --data {folder} --out {folder} --seeds 0 1 --ranks 1 4 "
             "--lr 1e-2 --full-finetune --full-lr 1e-3 --epochs 2 --device cpu --dtype float32")
    return main(parse_args(flags.split()))


# --- main ---

def main(args):
    """Run the demo, use an adapter, or train the missing runs and report all."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.demo:
        return demo()
    if WORLD > 1:
        raise ValueError("one process only: start it without torchrun")
    args.device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, args.device)
    args.dtype = str(dtype).removeprefix("torch.")
    print(f"{args.device}: float32 weights, matrix products in {args.dtype} ({reason})")
    if args.device.type == "mps" and args.checkpoint_activations:
        raise ValueError("--checkpoint-activations: on MPS torch recomputes other dropout masks")
    if args.adapter is not None:
        model = load_adapted(args)
        args.model = model.name_or_path  # the tokenizer's folder too
        return predict(args, model) if args.predict else score_adapter(args, model)

    args.model = args.model or BASE
    data = {split: read_data(args, split) for split in ("train", "validation")}
    base = load_encoder(args, None, 0)
    check_rows(base, data["train"] + data["validation"])
    hashes = {"data_hash": hash_of(data), "base_hash": base_hash(base.base_model)}
    del base
    settings = vars(args) | hashes
    del settings["model"], settings["data"]  # their contents are compared, not their names
    path = Path(args.out, "sst2.jsonl")
    with locked(path.parent, "--out"):
        runs = read_runs(path, settings)
        for r, seed in itertools.product(args.ranks + [None] * args.full_finetune, args.seeds):
            if (r, seed) not in runs:
                runs[r, seed] = train(args, data, r, seed)[0] | hashes  # [0]: the model is freed
                lines = [json.dumps(run) + "\n" for run in runs.values()]
                write_whole(path, "".join(lines).encode())
        report([*runs.values()], path.with_suffix(".png"))
    return [*runs.values()]


if __name__ == "__main__":
    run_script("train_sst2.py", main, parse_args, "--checkpoint-activations, a smaller "
               "--batch-size or a smaller --max-length take less memory")
