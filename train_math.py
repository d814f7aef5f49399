"""LoRA fine-tuning of TinyLlama-1.1B on MetaMathQA, planned for one 4 GB card.

    python train_math.py                                           # 10,000 problems, 3 epochs, r=8
    python train_math.py --demo                                    # about a minute, no download
    python train_math.py --model DIR --data train.jsonl --r 16     # your own model and data
    python eval_gsm8k.py --adapter checkpoints/lora-r8-MetaMathQA  # score every checkpoint
    torchrun --nproc-per-node 2 -- train_math.py                   # the same run on two GPUs

Written: checkpoints/RUN/step_000500/ (adapter in PEFT's format, trainer's state) and runs/RUN/
(metrics.jsonl with a line per step, TensorBoard events, loss.png). Start reading at train().
"""
import hashlib
import io
import json
import math
import random
import re
import shutil
import signal
import sys
import time
import warnings
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import eval_gsm8k
from eval_gsm8k import (BASE_MODEL, RANK, WORLD, Parser, check_ids, checkpoints, encode_prompt,
                        first_line, format_prompt, gather, join_processes, load_model, number,
                        peak_memory, pick_device, pick_dtype, read_rows, run_script)
from lora import LoRAConfig, count_parameters, inject_lora, load_adapter, save_adapter

GiB = 2**30


# --- command line ---

def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--model", default=BASE_MODEL, help="Hub id or folder of the base model")
    add("--data", default="meta-math/MetaMathQA", help="Hub id, or .jsonl/.json/.parquet/.csv")
    add("--nb-samples", type=count, default=10000, help="train on the first N rows")
    add("--epochs", type=count, default=3)
    add("--max-steps", type=count, help="stop after N steps, the schedule ending there")
    add("--r", type=int, default=8, help="rank (Sec. 4.1)")
    add("--alpha", type=float, default=16.0, help="the update is scaled by alpha / r")
    add("--dropout", type=float, default=0.05, help="on the adapter's input")
    add("--targets", nargs="+", default=["q_proj", "v_proj"], help="name endings, or all-linear")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    add("--lr", type=number(float, 1e-12, 1), default=3e-4, help="at the peak")
    add("--warmup-steps", type=number(int, 0), default=100, help="at most a tenth of all steps")
    add("--weight-decay", type=number(float, 0, 1), default=0.0)
    add("--clip", type=number(float, 1e-6), default=1.0, help="largest gradient norm")
    add("--batch-size", type=count, default=1, help="rows per micro-batch")
    add("--grad-accum", type=count, default=8, help="micro-batches per step")
    add("--max-length", type=number(int, 2), default=512, help="longer rows are dropped")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--nf4", action="store_true", help="hold the base's linear layers in 4 bits (QLoRA)")
    add("--checkpoint-activations", action=BooleanOptionalAction, help="default: as the plan says")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--vram", type=number(float, 0.6), help="act as a card of N GiB; CUDA takes 0.5")
    add("--run-name", help="default: lora-r{r}-{data}")
    add("--save-every", type=count, default=500, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the newest whole checkpoint")
    add("--seed", type=number(int, 0, 2**31), default=0, help="order of the data, A, dropout")
    add("--demo", action="store_true", help="train and score a tiny model; takes --seed alone")
    args = parser.parse_args(argv)
    name = args.run_name or f"lora-r{args.r}-{Path(args.data).stem}"
    args.run_name = re.sub(r"^\.|[^\w.-]", "_", name)  # no / and no leading dot
    return args


# --- data: token ids, batches of like length ---

def encode(rows, tokenizer, max_length):
    """Return [(token ids, how many of them are prompt)].

    Rows over max_length are dropped, not cut: without its EOS a row would teach not to stop.
    """
    examples = []
    for question, answer in rows:
        text = format_prompt(question)
        prompt = encode_prompt(tokenizer, text)
        ids = encode_prompt(tokenizer, f"{text} {answer}")
        if ids[:len(prompt)] != prompt:  # a token spans both: generation cannot produce it
            ids = prompt + tokenizer(f" {answer}", add_special_tokens=False).input_ids
        if len(ids) < max_length:
            examples.append(([*ids, tokenizer.eos_token_id], len(prompt)))
    if not examples:
        raise ValueError(f"--max-length {max_length} leaves none of {len(rows)} rows")
    return examples


def length(example):
    return len(example[0])


def epoch_batches(examples, batch_size, seed, epoch):
    """Return the batches of an epoch: a function of (seed, epoch), so that a run can resume."""
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(examples, len(examples))
    batches = []
    # Sorted by length within pools of 50 batches, to save padding.
    size = 50 * batch_size
    for start in range(0, len(order), size):
        pool = sorted(order[start:start + size], key=length)
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    # The largest first: out-of-memory comes at once, not in the third hour.
    largest = max(batches, key=lambda batch: len(batch) * max(map(length, batch)))
    place = batches.index(largest)
    batches[0], batches[place] = largest, batches[0]
    return batches


def collate(examples, device):
    """Return ids (batch, longest), and the rows and columns of the targets: answers and their EOS.

    Padding is on the right, where causal attention never looks. Targets are known by length: the
    final EOS is one, also where pad == eos.
    """
    longest = max(len(ids) for ids, _ in examples)
    padded = [ids + [0] * (longest - len(ids)) for ids, _ in examples]
    targets = [(row, column) for row, (ids, prompt) in enumerate(examples)
               for column in range(prompt, len(ids))]
    rows, columns = torch.tensor(targets, device=device).T
    return torch.tensor(padded, device=device), rows, columns


# --- loss scaling, schedule ---

class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740, Sec. 3.2).

    Gradients below 6e-8 vanish in fp16: the loss is multiplied by `scale`, and the adapter's fp32
    gradients are divided by it. If one is not finite, the step is skipped and the scale halves;
    after `interval` good steps in a row it doubles. In bf16 and fp32 it is 1.
    """

    def __init__(self, enabled, scale=2.0**16, interval=2000):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.interval = interval
        self.good_steps = self.skipped = self.skipped_in_a_row = 0

    def unscale(self, parameters):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.scale)  # in fp32: nothing underflows here

    def update(self, finite):
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.good_steps = self.good_steps + 1 if finite else 0
        if self.enabled and not finite:
            self.scale /= 2
        elif self.enabled and self.good_steps % self.interval == 0:
            self.scale *= 2


def learning_rate_at(step, steps, warmup, peak):
    """Warm up linearly over at most a tenth of the steps, then cosine (arXiv:1608.03983) to 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# --- the loss: attention, logits in chunks ---

def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Return (softmax(scaling Q K^T + causal bias) V, None): (b, n, h, c), and no weights.

    query (b, h, n, c); key and value (b, g, n, c), h a multiple of g; attention_mask, where causal
    is not enough, (b, 1, n, n), True where to look.
    """
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("a cap, sinks or a position bias")
    b, h, n, c = query.shape
    group = h // key.shape[1]
    if query.device.type != "cpu":
        # Below compute capability 8 torch's fused kernels take no grouped heads: without this,
        # scores of (b, h, n, n) would be in memory.
        if group > 1:
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout,
                                             is_causal=attention_mask is None, scale=scaling)
    else:
        # The fused kernel's backward is slow here. The query heads of a group are stacked in the
        # rows, so that K and V are not repeated.
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
        bias = torch.where(attention_mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
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


CHUNK = 2**22  # logits at once: 131 positions of a 32,000-word vocabulary, whatever the batch


def backward_loss(model, batch, weight=1.0):
    """Add the gradients of weight * loss; return the loss: a sum over the targets, in fp32.

    Logits exist only at targets, a chunk at a time: each chunk goes forward and backward through
    the output head, down to its hidden states. Their gradient then goes through the blocks at once.
    """
    ids, rows, columns = batch
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = hidden[rows, columns - 1]  # (batch, longest, width) -> (targets, width)
    targets = ids[rows, columns]
    head = model.get_output_embeddings()
    size = CHUNK // len(head.weight)
    total, gradients = 0.0, []
    for h, t in zip(hidden.detach().split(size), targets.split(size)):
        h.requires_grad_()
        logits = head(h.to(head.weight.dtype)).float()  # (chunk, width) -> (chunk, vocabulary)
        loss = F.cross_entropy(logits, t, reduction="sum")
        (loss * weight).backward()
        gradients.append(h.grad)
        total = total + loss.detach()
    if hidden.requires_grad:  # not where only the head is adapted
        hidden.backward(torch.cat(gradients))
    return total


@torch.no_grad()
def check_head(model, ids):
    """Raise ValueError unless the loss above sees this model's logits.

    Then set the attention above, unless that changes them. ids: the longest row, so that sliding
    windows take effect.
    """
    ids = torch.tensor([ids], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[:, -16:].float()
    head = model.get_output_embeddings()
    fp32 = model.dtype == torch.float32

    def agrees(tolerance):
        try:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -16:]
        except (AttributeError, NotImplementedError):  # no hidden states; a cap or sinks
            return False
        logits = head(hidden.to(head.weight.dtype)).float()
        return bool((logits - own).norm() <= tolerance * own.norm())  # False for NaN

    if not agrees(1e-5 if fp32 else 0.01):  # the rounding of one product
        raise ValueError(f"{type(model).__name__} scales or caps its logits or shows no hidden "
                         f"states (not supported here), or overflows in {model.dtype}")
    before = model.config._attn_implementation
    use_attention(model)
    if not agrees(1e-4 if fp32 else 0.05):  # of all blocks: 0.01 in bf16 over 30 of them
        model.set_attn_implementation(before)


# --- memory: recomputation, the plan ---

def blocks(model):
    """Return the transformer blocks: the model's module list with most weights."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def checkpoint_blocks(model):
    """Keep each block's input alone, and run the block again in backward (arXiv:1604.06174)."""
    for block in blocks(model):  # with use_reentrant=True nothing trains behind frozen embeddings
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def kept_by_block(model, length):
    """Return bytes of (a block's input, all that it keeps for backward) for a row of `length`."""
    block, calls, kept = blocks(model)[0], [], {}
    hook = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    hook.remove()
    hidden, *shared = [x for x in tree_leaves(calls[0]) if isinstance(x, torch.Tensor)]

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    args, kwargs = calls[0]
    hidden.requires_grad_()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block.forward(*args, **kwargs)
    for tensor in [*shared, *model.parameters()]:  # shared by all blocks, such as the mask
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return hidden.nbytes, sum(kept.values())


def plan_memory(model, args, longest):
    """Make the blocks recompute if flags or plan say so; print and return the planned GiB."""
    n = len(blocks(model))
    free = free_memory(model.device)
    # All blocks count as the first: too low where later ones are larger (experts).
    block_input, kept = (args.batch_size * size for size in kept_by_block(model, longest))
    plan = {"gradients and AdamW's moments": 12 * count_parameters(model)[0],  # three in fp32
            "activations": n * kept,
            # A chunk's logits at 20 bytes each, or half of what a block keeps.
            "other gradients": max(20 * CHUNK, kept // 2)}
    need = sum(plan.values())
    recompute = args.checkpoint_activations
    mps = model.device.type == "mps"  # torch would recompute with other dropout masks there
    if recompute and mps:
        raise ValueError("--checkpoint-activations cannot be used on mps")
    if recompute is None:
        recompute = 1.25 * need > free and not mps
    if recompute:
        checkpoint_blocks(model)
        plan["activations"] = (n - 1) * block_input + kept
    plan["weights"] = model.get_memory_footprint()
    if model.device.type != "cuda":
        process = read_number("/proc/self/status", "VmRSS:", 1024)
        plan["Python and libraries"] = max(0, process - plan["weights"])
    total = sum(plan.values()) / GiB
    print("memory plan, GiB:")
    for what, size in plan.items():
        print(f"{size / GiB:9.3f} {what}")
    print(f"{total:9.3f} in all, with activations {'recomputed' if recompute else 'kept'}: keeping "
          f"takes {need / GiB:.2f} beside the weights, of {free / GiB:.2f} free", flush=True)
    return total


def free_memory(device):
    """Return the bytes that can still be allocated, or 0 if that is unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)  # --vram
        within = min(free + torch.cuda.memory_reserved(device), limit)
        return within - torch.cuda.memory_allocated(device)
    free = read_number("/proc/meminfo", "MemAvailable:", 1024)
    limit = read_number("/sys/fs/cgroup/memory.max")  # of a container
    used = read_number("/proc/self/status", "VmRSS:", 1024)
    return min(free, limit - used) if limit else free


def read_number(path, name="", unit=1):
    """Return a number that Linux tells in a file, 0 if there is none."""
    match = re.search(rf"{name}\s*(\d+)", Path(path).read_text()) if Path(path).exists() else None
    return unit * int(match[1]) if match else 0


# --- checkpoints ---

MAY_CHANGE_ON_RESUME = {"device", "vram", "save_every", "resume", "checkpoint_activations"}


def save_checkpoint(folder, model, config, state):
    """Write adapter and trainer_state.pt to FOLDER.part, then rename: never a partial checkpoint.

    Every adapter is kept, but the state, twice as large, for the newest two alone.
    """
    part = folder.with_name(folder.name + ".part")
    save_adapter(model, part)
    content = io.BytesIO()  # to a file, torch.save would hide that a disk is full
    torch.save(state, content)
    (part / "trainer_state.pt").write_bytes(content.getvalue())
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, after --resume
    part.rename(folder)
    steps = checkpoints(folder.parent)
    for old in steps[:steps.index(folder)][:-1]:  # not the one before
        (old / "trainer_state.pt").unlink(missing_ok=True)


def newest_state(folder):
    """Return (folder, trainer state) of the newest checkpoint that can be read."""
    for path in reversed(checkpoints(folder)):
        try:
            load_file(path / "adapter_model.safetensors")
            json.loads((path / "adapter_config.json").read_bytes())
            return path, torch.load(path / "trainer_state.pt", "cpu", weights_only=True)
        except Exception as error:  # damaged, or an older one without its state
            warnings.warn(f"{path} is passed over ({first_line(error)})")
    raise ValueError(f"--resume: {folder} has no whole checkpoint to continue from")


# --- training ---

def train(model, examples, args, config=None, state=None):
    """Train what requires grad, from a state if given; with a config, save checkpoints."""
    state = state or {"step": 0}
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    scaler = LossScaler(enabled=model.dtype == torch.float16)
    batches = []
    for epoch in range(args.epochs):
        batches += epoch_batches(examples, args.batch_size, args.seed, epoch)
    steps = min(math.ceil(len(batches) / args.grad_accum), args.max_steps or math.inf)
    step = state["step"]
    if step:
        optimizer.load_state_dict(state["optimizer"])
        vars(scaler).update(state["scaler"])
    stop = False
    log = open_log(Path("runs", args.run_name, "metrics.jsonl"), step)
    with (catch_signals() as caught,
          tqdm(total=steps, initial=step, unit="step", disable=RANK > 0 or None) as bar):
        while step < steps and not stop:
            start = time.perf_counter()

            # 1. Learning rate. A skipped step does not advance the schedule.
            lr = learning_rate_at(step - scaler.skipped, steps, args.warmup_steps, args.lr)
            optimizer.param_groups[0]["lr"] = lr

            # 2. Forward and backward, one micro-batch at a time. Each loss is divided by the
            #    targets of the whole window, so 8 x 1 or 1 x 8 of the same rows give one gradient.
            first = step * args.grad_accum
            window = batches[first:first + args.grad_accum]
            targets = sum(len(ids) - prompt for batch in window for ids, prompt in batch)
            loss = 0.0
            for n in range(RANK, len(window), WORLD):
                # Dropout follows from seed and micro-batch. A CPU's generator takes 32 bits.
                torch.manual_seed(random.Random(f"{args.seed} {first + n}").getrandbits(32))
                batch = collate(window[n], model.device)
                loss += backward_loss(model, batch, scaler.scale / targets)
            loss, stop = sum_over_processes(parameters, float(loss) / targets, bool(caught))
            idle = [name for name, p in zip(names, parameters) if p.grad is None]
            if idle and step == state["step"]:  # what the text does not reach: a vision tower
                bar.write(f"{len(idle)} weights had no gradient, such as {idle[0]}")

            # 3. Unscale and clip, in fp32.
            scaler.unscale(parameters)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, args.clip))

            # 4. Step, or skip after an overflow, leaving weights and moments untouched.
            finite = math.isfinite(loss + norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scaler.update(finite)
            step += 1
            if scaler.skipped_in_a_row == (20 if scaler.enabled else 1):
                raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}: try a lower "
                                 "--lr, or --dtype float32, and another --run-name")

            # 5. Log and save.
            tokens = sum(len(ids) for batch in window for ids, _ in batch)
            speed = tokens / (time.perf_counter() - start)
            peak = peak_memory(model.device) / GiB
            log({"step": step, "loss": loss, "lr": lr, "grad_norm": norm,
                 "loss_scale": scaler.scale, "tokens": tokens, "tokens_per_s": speed,
                 "peak_memory_gb": peak, "skipped": not finite})
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}  lr {lr:.1e}  {speed:.0f} tok/s  {peak:.2f} GiB")
            if step % max(1, steps // 10) == 0:
                bar.write(f"step {step:5d}/{steps}  {bar.postfix}")
            if config and (step % args.save_every == 0 or step == steps or stop):
                folder = Path("checkpoints", args.run_name, f"step_{step:06d}")
                if RANK == 0:
                    save_checkpoint(folder, model, config, {
                        **state, "step": step, "scaler": vars(scaler),
                        "optimizer": optimizer.state_dict()})
    gather(None)  # rank 0 may still be saving, and torchrun ends all when one exits
    if stop and step < steps:
        if config:
            print(f"stopped: the same command with --resume goes on from {folder}")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])  # 130 for Ctrl-C, 143 for SIGTERM


def sum_over_processes(parameters, loss, stop):
    """Sum the gradients, in place, and two numbers over all processes."""
    if WORLD == 1:
        return loss, stop
    reached = [p.grad is not None for p in parameters]
    numbers = torch.tensor([loss, stop, *reached], device=parameters[0].device)
    dist.all_reduce(numbers)
    loss, stop, *reached = numbers.tolist()
    for p, anywhere in zip(parameters, reached):
        if anywhere:  # in a short window not every process has a micro-batch
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    return loss, stop


def open_log(path, step):
    """Return log(line): to TensorBoard and metrics.jsonl, cut back to its first `step` lines."""
    if RANK > 0:
        return lambda line: None
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:step]))
    try:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(path.parent, purge_step=step + 1)  # hides what it has of later steps
    except ImportError:
        board = None

    def log(line):
        if board:
            for key, value in line.items():
                board.add_scalar(key, value, line["step"])
            board.flush()
        line = {key: x if math.isfinite(x) else None for key, x in line.items()}  # JSON has no NaN
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    return log


def plot_loss(path):
    """Draw the losses of metrics.jsonl and their running mean, where matplotlib is installed."""
    try:
        import pandas  # comes with datasets
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = map(json.loads, open(path))
    losses = pandas.Series([line["loss"] for line in lines if not line["skipped"]], dtype=float)
    axes = Figure().subplots()
    axes.plot(losses, color="0.8")
    axes.plot(losses.ewm(alpha=0.05).mean())
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target)")
    axes.figure.savefig(path.with_name("loss.png"))


@contextmanager
def catch_signals():
    """Yield a list that notes Ctrl-C and SIGTERM, for train() to stop. A second one ends it."""
    def note(signum, _):
        caught.append(signum)
        signal.signal(signum, before[signum])

    caught = []
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# --- a run, from flags to files ---

def main(args):
    """Run the experiment and return the last checkpoint's folder, or run the demo."""
    if args.demo:
        return demo(args.seed)
    config = LoRAConfig(args.r, args.alpha, args.dropout, args.targets, rslora=args.rslora)
    folder = Path("checkpoints", args.run_name)
    state = {"step": 0}
    if args.resume:
        begun, state = newest_state(folder)
    elif checkpoints(folder):
        raise ValueError(f"{folder} has checkpoints: add --resume, or give another --run-name")
    device = join_processes(pick_device(args.device))
    if args.vram:  # a big card runs out of memory where a small one would
        share = (args.vram - 0.5) * GiB / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(share, device)
    dtype, reason = pick_dtype(args.dtype, device)
    args.dtype = str(dtype)[6:]
    rows = read_rows(args.data, "train", args.nb_samples)
    model, tokenizer = load_model(args.model, dtype, device, args.nf4)
    examples = encode(rows, tokenizer, args.max_length)
    encoded = [ids for ids, _ in examples]
    longest = max(encoded, key=len)
    check_ids(model, encoded)
    check_head(model, longest)

    state["identity"] = check_identity(model, examples, args, state)
    torch.manual_seed(args.seed)
    names = inject_lora(model, config)
    if args.resume:
        load_adapter(model, begun)

    trainable, total = count_parameters(model)
    print(f"{args.model} in {args.dtype}{' over NF4' * args.nf4} on {device} ({reason})\n"
          f"{len(names)} layers adapted: {trainable:,} of {total:,} parameters train "
          f"({trainable / total:.2%}), in float32\n"
          f"{len(encoded):,} rows, {len(rows) - len(encoded):,} dropped: over {args.max_length}")
    model.train()
    planned = plan_memory(model, args, len(longest))
    train(model, examples, args, config, state)
    last = checkpoints(folder)[-1]
    metrics = Path("runs", args.run_name, "metrics.jsonl")
    print(f"peak memory {peak_memory(device) / GiB:.2f} GiB, planned {planned:.2f}. Written: "
          f"{last}/, {metrics}")
    if RANK == 0:
        plot_loss(metrics)
    return last


def check_identity(model, examples, args, state):
    """Return what must not change on resuming: flags, data, 64 weights of each base tensor.

    Raises ValueError if it is not what rank 0 has, or had when the resumed run began.
    """
    identity = {f"--{key.replace('_', '-')}": value for key, value in vars(args).items()
                if key not in MAY_CHANGE_ON_RESUME}
    weights = [tensor.flatten()[:64].tolist() for tensor in [*model.parameters(), *model.buffers()]]
    for name, value in (("data", examples), ("base", weights)):
        identity[name] = hashlib.sha256(repr(value).encode()).hexdigest()[:12]
    run = {**identity, "step": state["step"]}
    begun_as = gather(run | state.get("identity", {}))[0]
    for key, value in run.items():
        if begun_as[key] != value:
            raise ValueError(f"{key} of this run was {begun_as[key]}, is {value}: go back, or "
                             "give another --run-name")
    return identity


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
    """Return a Llama of 1M random weights, and a tokenizer with just the words of these texts."""
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
    if Path("demo/one-step-train.jsonl").exists():  # the last demo's
        shutil.rmtree("demo/merged", ignore_errors=True)
        shutil.rmtree("checkpoints/demo", ignore_errors=True)
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
    args = parse_args(f"--run-name demo-base --epochs 6 --batch-size 64 {common}".split())
    rows = read_rows("demo/one-step-train.jsonl", "train")
    model, tokenizer = demo_base([f"{format_prompt(q)} {a}" for q, a in rows], seed)
    train(model, encode(rows, tokenizer, 512), args)
    model.save_pretrained("demo/base")
    tokenizer.save_pretrained("demo/base")

    flags = ("--model demo/base --data demo/two-step-train.jsonl --run-name demo "
             f"--targets all-linear --epochs 3 --batch-size 32 {common}")
    print(f"2. Adapt it to two-step problems: train_math.py {flags}")
    last = main(parse_args(flags.split()))

    for task, merge in (("two-step", "--save-merged demo/merged"), ("one-step", "")):
        flags = (f"--model demo/base --adapter {last} --data demo/{task}-test.jsonl {merge} "
                 f"--batch-size 200 --max-new-tokens 40 {cpu}")
        print(f"3. Score held-out {task} problems: eval_gsm8k.py {flags}")
        eval_gsm8k.main(eval_gsm8k.parse_args(flags.split()))


if __name__ == "__main__":
    run_script("train_math.py", main, parse_args)
