"""LoRA on an encoder: RoBERTa, DistilBERT or BERT on SST-2, the paper's rank ablation (Sec. 7.2), full fine-tuning beside it.

    python train_sst2.py                                                       # RoBERTa-base, r=8 on query and value
    python train_sst2.py --ranks 1 2 4 8 --seeds 0 1 2 --full-finetune         # the ablation
    python train_sst2.py --demo                                                # all of it on a CPU in a minute, nothing downloaded
    python train_sst2.py --adapter checkpoints/sst2-roberta-base-r8-s0         # score a saved adapter, unmerged and merged

Mixed precision is the other kind than train_math.py's: fp32 weights under torch.autocast, because full fine-tuning, the
baseline, trains every weight, and a bf16 weight of 1.0 cannot take an update below 0.004. Written: checkpoints/sst2-MODEL-rR-sS/
(adapter and head, in PEFT's format; -2 and so on for runs with other flags), a line per finished run in results/sst2.jsonl, and
results/sst2.png. A run that stands there already is skipped, so an ablation that was stopped goes on where it was.
"""
import itertools
import json
import math
import random
import shutil
import statistics
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval_gsm8k import (OFFLINE, WORLD, Parser, fast_products, hub_reachable, number, peak_memory, pick_device, pick_dtype,
                        run_script, wilson_interval)
from lora import (LoRAConfig, count_parameters, disable_lora, inject_lora, linear_layers, load_adapter, lora_layers, match_modules,
                  merge_lora, save_adapter, short_names, unmerge_lora)

KNOWN = {   # config.model_type: (targets, head)
    "roberta": (["query", "value"], ["classifier"]),
    "bert": (["query", "value"], ["classifier"]),
    "distilbert": (["q_lin", "v_lin"], ["pre_classifier", "classifier"]),
}


# --- command line ---

def parse_args(argv=None):
    parser = Parser(prog="train_sst2.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hub id or folder of the encoder (default: roberta-base, or with --adapter the one it names)")
    add("--data", default="nyu-mll/glue", help="Hub id, or a folder with train and validation files of sentence and label")
    add("--targets", nargs="+", help="name endings of the layers to adapt (default: query and value, by the model's type)")
    add("--head", nargs="+", help="modules trained in full and saved along (default: by the model's type)")
    add("--adapter", metavar="DIR", help="evaluate this saved adapter and stop")
    add("--ranks", nargs="*", type=number(int, 1), default=[8], help="one LoRA run for each; several are the ablation; none is --full-finetune alone")
    add("--seeds", nargs="+", type=number(int, 0), default=[0], help="one run for each: the start of A and head, the data's order")
    add("--alpha", type=number(float, 1e-6), default=16.0, help="the same for every rank (the released script has 16, the paper's Table 9 has 8)")
    add("--dropout", type=number(float, 0, 1, open_high=True), default=0.05, help="probability, on the adapter's input")
    add("--lr", type=number(float, 1e-12, 1), default=5e-4, help="peak learning rate of the LoRA runs (Hu et al., Table 9: 5e-4)")
    add("--full-finetune", action="store_true", help="beside them, train every weight")
    add("--full-lr", type=number(float, 1e-12, 1), default=5e-5, help="peak learning rate of full fine-tuning")
    add("--epochs", type=number(int, 1), default=3, help="passes over the data")
    add("--batch-size", type=number(int, 1), default=32, help="sentences per step")
    add("--max-length", type=number(int, 3), default=128, help="tokens; longer sentences are cut")
    add("--nb-samples", type=number(int, 1), help="train on N sentences drawn with seed 0 (default: all)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of the matrix products, under autocast")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--out", default="results", help="folder of sst2.jsonl and sst2.png")
    add("--demo", action="store_true", help="make an encoder and sentences in memory; ignores the other flags")
    args = parser.parse_args(argv)
    if not (args.ranks or args.full_finetune or args.adapter or args.demo):
        parser.error("--ranks names no rank: give at least one, or --full-finetune")
    return args


# --- data ---

def read_sentences(data: str, split: str) -> list[tuple[str, int]]:
    """[(sentence, 0 or 1)] of a split, from a folder's SPLIT.jsonl/.json/.parquet/.csv/.tsv or the Hub. ValueError for what is wrong."""
    import datasets
    datasets.disable_progress_bars()
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
    try:
        if Path(data).is_dir():
            path = next((p for p in sorted(Path(data).iterdir()) if p.stem == split and p.suffix in kinds), None)
            if path is None:
                raise ValueError(f"has no {split} file; expected {split} with one of {', '.join(kinds)}")
            options = {"sep": "\t"} if path.suffix == ".tsv" else {}
            table = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train", **options)
        elif Path(data).exists() or data.startswith((".", "/", "~")) or data.count("/") > 1:
            raise ValueError("no such folder; expected one with train and validation files, or a Hub id")
        else:
            datasets.config.HF_HUB_OFFLINE = not hub_reachable()
            table = datasets.load_dataset(data, "sst2" if data.endswith("glue") else None, split=split)
    except Exception as error:
        reason = OFFLINE.replace("train_math.py", "train_sst2.py").replace("FILE", "DIR") if not Path(data).exists() and "/" in data.strip("./~") \
            and not isinstance(error, ValueError) and not hub_reachable() else str(error.__cause__ or error).strip().split("\n")[0][:200]
        raise ValueError(f"--data {data}: {reason}") from None
    if not {"sentence", "label"} <= set(table.column_names):
        raise ValueError(f"--data {data}, {split}: has the columns {', '.join(table.column_names)}; expected sentence and label")
    rows = []
    for index, (sentence, label) in enumerate(zip(table["sentence"], table["label"])):
        if not isinstance(sentence, str) or label not in (0, 1):
            raise ValueError(f"--data {data}, {split}, row {index + 1}: label is {label!r}, sentence {sentence!r:.40}; expected text and 0 or 1"
                             + (" (GLUE's test split has no labels)" if label == -1 else ""))
        rows.append((sentence, int(label)))     # 1.0 and true are 1
    return rows


def encode(rows, tokenizer, max_length: int) -> list[tuple[list[int], int]]:
    """[(token ids with the tokenizer's own special tokens, label)]; a sentence that is too long is cut, its class stays."""
    ids = tokenizer([sentence for sentence, _ in rows], truncation=True, max_length=max_length).input_ids
    return [(row, label) for row, (_, label) in zip(ids, rows)]


def batches(examples, batch_size: int, rng=None) -> list[list[tuple[list[int], int]]]:
    """Rows of like length share a batch. With rng: shuffled, sorted within pools of 50 batches, the batches shuffled."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    if rng:
        rng.shuffle(order)
        pool = 50 * batch_size
        order = [i for start in range(0, len(order), pool) for i in sorted(order[start:start + pool], key=lambda i: len(examples[i][0]))]
    found = [[examples[i] for i in order[start:start + batch_size]] for start in range(0, len(order), batch_size)]
    if rng:
        rng.shuffle(found)
    return found


def collate(batch, pad: int, device):
    """ids, mask and labels. Padded on the right to the batch's longest row; an encoder looks both ways, so padding is masked."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch], device=device)                     # (batch, longest)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch], device=device)
    return ids, mask, torch.tensor([label for _, label in batch], device=device)


# --- model ---

def load_encoder(name: str, head: list[str] | None, seed: int, device):
    """(model, tokenizer, targets, head): the pretrained encoder in fp32 under a fresh head, whose start follows from the seed."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = Path(name).is_dir() or not hub_reachable()
    if not Path(name).is_dir() and (Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"--model {name}: no such folder")
    torch.manual_seed(seed)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=2, dtype=torch.float32, local_files_only=local, output_loading_info=True)
    except Exception as error:
        reason = OFFLINE.replace("train_math.py", "train_sst2.py") if local and not Path(name).is_dir() else str(error).strip().split("\n")[0][:300]
        raise ValueError(f"--model {name}: {reason}") from None
    targets, default_head = KNOWN.get(model.config.model_type, (None, None))
    head = head or default_head
    if head is None or tokenizer.pad_token_id is None:
        raise ValueError(f"--model {name} is of type {model.config.model_type}, not one of {', '.join(KNOWN)}: for another encoder give --targets "
                         f"and --head; its linear layers are {', '.join(short_names(linear_layers(model)))}")
    fresh = match_modules(model, default_head or head)
    if lost := [key for key in info["missing_keys"] if not any(f"{key}.".startswith(f"{module}.") for module in fresh)]:
        raise ValueError(f"--model {name} lacks the weights {', '.join(sorted(lost)[:3])}, which would start random: expected a pretrained encoder")
    return model.to(device), tokenizer, targets, head


@torch.no_grad()
def evaluate(model, examples, pad: int, batch_size: int, dtype) -> tuple[list[int], float]:
    """(predicted labels in the examples' order, mean cross-entropy)."""
    model.eval()
    device, predicted, loss = next(model.parameters()).device, {}, 0.0
    # sorted by length; each row carries its position in place of its label, so that predictions find their way back
    for batch in batches([(ids, position) for position, (ids, _) in enumerate(examples)], batch_size):
        ids, mask, index = collate(batch, pad, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), fast_products(dtype, device):
            logits = model(input_ids=ids, attention_mask=mask).logits.float()                                           # (batch, 2)
        labels = torch.tensor([examples[i][1] for i in index.tolist()], device=device)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        predicted |= dict(zip(index.tolist(), logits.argmax(-1).tolist()))
    return [predicted[i] for i in range(len(examples))], loss / len(examples)


# --- one run ---

def train(args, data, r: int | None, seed: int, device, dtype):
    """One LoRA run of rank r, or with r None full fine-tuning. Returns (the line of results/sst2.jsonl, the model)."""
    model, tokenizer, targets, head = load_encoder(args.model, args.head, seed, device)
    lr, config = args.full_lr, None
    if r is not None:
        lr, config = args.lr, LoRAConfig(r=r, alpha=args.alpha, dropout=args.dropout, targets=args.targets or targets or (), also_train=head)
        inject_lora(model, config)
    trainable, total = count_parameters(model)
    adapter = sum(layer.lora_A.numel() + layer.lora_B.numel() for _, layer in lora_layers(model))
    name = "full fine-tuning" if r is None else f"LoRA r={r}"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    print(f"{name}, seed {seed}: {adapter:,} adapter + {trainable - adapter:,} {'weights' if r is None else 'head'} train, "
          f"{trainable / total:.2%} of {total:,}; lr {lr:g}, products in {str(dtype)[6:]}", flush=True)

    training, validation = (encode(data[split], tokenizer, args.max_length) for split in ("train", "validation"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    per_epoch = math.ceil(len(training) / args.batch_size)
    steps, every, history, seconds = per_epoch * args.epochs, max(1, per_epoch // 4), [], 0.0
    rng, done, running = random.Random(seed), 0, []
    with tqdm(total=steps, unit="step", disable=None) as bar, fast_products(dtype, device):
        for _ in range(args.epochs):
            for batch in batches(training, args.batch_size, rng):
                start = time.perf_counter()
                for group in optimizer.param_groups:        # warm-up over at most 6% of the steps, then linearly to 0 (Table 9)
                    group["lr"] = lr * min((done + 1) / max(1, min(100, 0.06 * steps)), (steps - done) / steps)
                model.train()
                ids, mask, labels = collate(batch, tokenizer.pad_token_id, device)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = model(input_ids=ids, attention_mask=mask).logits
                loss = F.cross_entropy(logits.float(), labels)              # in fp32
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                running.append(loss.item())
                if not math.isfinite(running[-1]) and dtype != torch.float16:
                    raise ValueError(f"{name}: the loss is {running[-1]} at step {done + 1}: try a lower {'--full-lr' if r is None else '--lr'}")
                seconds += time.perf_counter() - start
                done += 1
                bar.update()
                bar.set_postfix_str(f"loss {statistics.fmean(running[-20:]):.3f}")
                if done % every == 0 and done + every <= steps or done == steps:
                    predicted, val_loss = evaluate(model, validation, tokenizer.pad_token_id, 64, dtype)
                    correct = sum(p == label for p, (_, label) in zip(predicted, validation))
                    history.append({"epoch": round(done / per_epoch, 3), "train_loss": statistics.fmean(running), "loss": val_loss,
                                    "accuracy": correct / len(validation)})
                    running = []
                    bar.write(f"  epoch {done / per_epoch:.2f}  train loss {history[-1]['train_loss']:.3f}  validation {correct / len(validation):.2%}  loss {val_loss:.3f}")
    run, folder = identity(args, r, seed, dtype), None
    if config:
        folder = adapter_folder(args.model, run)
        save_adapter(model, config, folder)
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf8")
    low, high = wilson_interval(correct, len(validation))
    return {**run, "adapter": folder and str(folder), "n": len(validation), "correct": correct, "accuracy": correct / len(validation),
            "ci95": [low, high], "loss": val_loss, "adapter_parameters": adapter, "head_parameters": trainable - adapter if config else 0, "trainable": trainable,
            "total": total, "seconds": round(seconds, 1), "sentences_per_s": round(len(training) * args.epochs / seconds, 1),
            "peak_memory_gb": round(peak_memory(device) / 2**30, 2), "history": history}, model


def identity(args, r, seed, dtype) -> dict:
    """What makes two runs the same run."""
    lora = {"alpha": args.alpha, "dropout": args.dropout, "targets": args.targets} if r is not None else {}
    return {"model": args.model, "data": args.data, "method": "full" if r is None else "lora", "r": r, "seed": seed, "head": args.head, **lora,
            "lr": args.full_lr if r is None else args.lr, "epochs": args.epochs, "batch_size": args.batch_size, "max_length": args.max_length,
            "nb_samples": args.nb_samples, "dtype": str(dtype)[6:]}


def adapter_folder(model: str, wanted: dict) -> Path:
    """checkpoints/sst2-MODEL-rR-sS, or the first with a number behind it that does not hold the adapter of another run."""
    for n in itertools.count(1):
        folder = Path("checkpoints") / f"sst2-{Path(model).name}-r{wanted['r']}-s{wanted['seed']}{f'-{n}' if n > 1 else ''}"
        try:
            if not folder.exists() or json.loads((folder / "run.json").read_text(encoding="utf8")) == wanted:
                return folder
        except (OSError, ValueError):       # whose it is, nobody knows
            pass


# --- all runs, table, plot ---

def report(lines: list[dict], out: Path) -> None:
    """A row per rank: mean and spread over the seeds; a picture with error bars, and the curves through the training."""
    groups = {}
    for line in lines:
        groups.setdefault("full" if line["r"] is None else f"r={line['r']}", []).append(line)
    print(f"\n{'':8s}{'adapter':>10s}{'head':>10s}{'accuracy':>10s}{'spread':>8s}{'loss':>8s}{'seconds':>9s}{'GiB':>6s}   n = {lines[0]['n']}, one run's 95% interval is "
          f"+/- {50 * (lines[0]['ci95'][1] - lines[0]['ci95'][0]):.1f} points")
    table = []
    for name, group in groups.items():
        accuracy = [100 * line["accuracy"] for line in group]
        spread = statistics.stdev(accuracy) if len(group) > 1 else math.nan
        table.append((name, statistics.fmean(accuracy), spread))
        print(f"{name:8s}{group[0]['adapter_parameters']:10,d}{group[0]['head_parameters']:10,d}{table[-1][1]:9.2f}%{spread:8.2f}"
              f"{statistics.fmean(line['loss'] for line in group):8.3f}{statistics.fmean(line['seconds'] for line in group):9.0f}"
              f"{max(line['peak_memory_gb'] for line in group):6.2f}   {len(group)} seed{'s' if len(group) > 1 else ''}")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    bars = [spread if len(group) > 1 else 50 * (group[0]["ci95"][1] - group[0]["ci95"][0]) for (_, _, spread), group in zip(table, groups.values())]
    left.errorbar(range(len(table)), [mean for _, mean, _ in table], yerr=bars, fmt="o", capsize=5)
    left.set_xticks(range(len(table)), [name for name, _, _ in table])
    several = "mean and standard deviation of the seeds" if len(next(iter(groups.values()))) > 1 else "one run, its 95% interval"
    left.set(ylabel="validation accuracy (%)", title=f"{several}, n = {lines[0]['n']}")
    for color, (name, group) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, groups.items()):
        for line in group:
            epochs = [point["epoch"] for point in line["history"]]
            middle.plot(epochs, [point["train_loss"] for point in line["history"]], color=color, linestyle=":", linewidth=0.8)
            middle.plot(epochs, [point["loss"] for point in line["history"]], color=color)
            right.plot(epochs, [100 * point["accuracy"] for point in line["history"]], color=color, label=name if line is group[0] else None)
    middle.set(xlabel="epoch", ylabel="cross-entropy", title="loss: validation solid, training dotted")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)", title="accuracy through the training")
    right.legend()
    fig.savefig(out, dpi=120)
    plt.close(fig)


def score_adapter(args, device, dtype) -> list[int]:
    """Evaluates a saved adapter: unmerged, merged, and the base's speed beside them, interleaved in one run."""
    model, tokenizer, _, _ = load_encoder(args.model, args.head, args.seeds[0], device)
    load_adapter(model, args.adapter)
    validation = encode(read_sentences(args.data, "validation"), tokenizer, args.max_length)
    pad, times, predictions, losses = tokenizer.pad_token_id, {"base": [], "unmerged": [], "merged": []}, {}, {}
    evaluate(model, validation[:64], pad, 64, dtype)
    for _ in range(5):
        for state in times:
            merge_lora(model) if state == "merged" else unmerge_lora(model)
            start = time.perf_counter()
            if state == "base":
                with disable_lora(model):
                    evaluate(model, validation, pad, 64, dtype)
            else:
                predictions[state], losses[state] = evaluate(model, validation, pad, 64, dtype)
            times[state].append(time.perf_counter() - start)
    n, correct = len(validation), sum(p == label for p, (_, label) in zip(predictions["unmerged"], validation))
    low, high = wilson_interval(correct, n)
    print(f"{args.adapter} on {args.model}: {correct / n:.2%} [{low:.2%}, {high:.2%}] of {n}, loss {losses['unmerged']:.3f}; "
          f"{sum(a != b for a, b in zip(predictions['unmerged'], predictions['merged']))} labels change when merged")
    base = statistics.median(times["base"])
    print("seconds, median of 5: " + ", ".join(f"{state} {statistics.median(t):.2f} (x{statistics.median(t) / base:.2f})" for state, t in times.items()))
    return predictions["unmerged"]


def main(args) -> list[dict]:
    """Every (rank, seed) that is not in sst2.jsonl yet, then the table and the picture."""
    if WORLD > 1:
        raise ValueError("train_sst2.py runs in one process, with one run after another: start it with python, not torchrun")
    if args.demo:
        return demo()
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.adapter and not args.model:
        config = Path(args.adapter) / "adapter_config.json"
        try:
            args.model = json.loads(config.read_text(encoding="utf8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"--adapter {args.adapter}: its {config.name} names no base model; give --model") from None
    args.model = args.model or "roberta-base"
    if args.adapter:
        score_adapter(args, device, dtype)
        return []
    data = {split: read_sentences(args.data, split) for split in ("train", "validation")}
    if args.nb_samples and args.nb_samples < len(data["train"]):
        data["train"] = random.Random(0).sample(data["train"], args.nb_samples)
    path = Path(args.out) / "sst2.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    finished, lines = [], []
    for line in path.read_text(encoding="utf8").splitlines() if path.exists() else ():
        try:
            finished.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {len(finished) + 1} is no whole JSON object ({line!r:.60}): remove it, and its run is done again") from None
    for r in [*dict.fromkeys(args.ranks), *([None] if args.full_finetune else [])]:
        for seed in dict.fromkeys(args.seeds):
            wanted = identity(args, r, seed, dtype)
            line = next((line for line in finished if all(line.get(key) == value for key, value in wanted.items())), None)
            if line is None:
                line = train(args, data, r, seed, device, dtype)[0]     # without the model, which would stay beside the next one
                with open(path, "a", encoding="utf8") as file:
                    file.write(json.dumps(line) + "\n")
            else:
                print(f"{'full fine-tuning' if r is None else f'LoRA r={r}'}, seed {seed}: {line['accuracy']:.2%}, done before (in {path})")
            lines.append(line)
    report(lines, path.with_suffix(".png"))
    print(f"runs are in {path}, each line with its adapter's folder; the picture in {path.with_suffix('.png')}")
    return lines


# --- the demo: an encoder and sentences made here ---

GOOD, BAD = ["lovely", "superb", "charming", "moving", "fresh", "witty"], ["dull", "awful", "clumsy", "stale", "flat", "tired"]


def demo_sentences(rng, count: int, about: str) -> list[dict]:
    """First the music is judged, then the story; the label is whether something is judged well, or whether the story is."""
    rows = []
    for _ in range(count):
        said = {"music": rng.choice([GOOD, BAD]), "story": rng.choice([GOOD, BAD])}
        parts = [f"the {thing} was {rng.choice(['', 'very ', 'rather '])}{rng.choice(words)}" for thing, words in said.items()]
        rows.append({"sentence": f"{parts[0]} {rng.choice(['and', 'but', 'while'])} {parts[1]} .", "label": int(GOOD in ([said["story"]] if about == "story" else said.values()))})
    return rows


def demo_encoder():
    """(a BERT of about 100,000 random weights, a word-level tokenizer for the demo's sentences)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, logging
    logging.disable_progress_bar()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*GOOD, *BAD, *"the music story was very rather and but while .".split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                                max_position_embeddings=32)), tokenizer


def demo() -> list[dict]:
    """Pretrains an encoder to tell whether anything is judged well, then adapts it to how the story is judged."""
    begin, folder, rng = time.perf_counter(), Path("demo-sst2"), random.Random(0)
    if folder.exists() and any(folder.iterdir()) and not (folder / "story").exists():
        raise ValueError("--demo writes to ./demo-sst2, and there is a folder of that name that is not the demo's: run it elsewhere")
    shutil.rmtree(folder, ignore_errors=True)
    for about, sizes in (("anything", (6000, 200)), ("story", (2000, 500))):
        (folder / about).mkdir(parents=True)
        for split, count in zip(("train", "validation"), sizes):
            (folder / about / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo_sentences(rng, count, about)))
    encoder, tokenizer = demo_encoder()
    common, device = ["--dtype", "float32", "--device", "cpu"], torch.device("cpu")

    print("1. An encoder learns from scratch whether anything is judged well.", flush=True)
    encoder.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    args = parse_args([*common, "--model", "demo-sst2/random", "--data", "demo-sst2/anything", "--full-lr", "1e-3", "--epochs", "1"])
    _, model = train(args, {split: read_sentences(args.data, split) for split in ("train", "validation")}, None, 0, device, torch.float32)
    model.base_model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    print(f"\n2. LoRA and full fine-tuning on how the story is judged ({time.perf_counter() - begin:.0f} s so far).", flush=True)
    flags = ["--model", "demo-sst2/base", "--data", "demo-sst2/story", "--ranks", "1", "4", "--seeds", "0", "1", "--full-finetune", "--lr", "2e-3", "--full-lr", "1e-3",
             "--epochs", "4", "--out", "demo-sst2", *common]
    print(f"python train_sst2.py {' '.join(flags)}", flush=True)
    lines = main(parse_args(flags))
    print(f"All in {time.perf_counter() - begin:.0f} s.")
    return lines


if __name__ == "__main__":
    run_script("train_sst2.py", main, parse_args)
