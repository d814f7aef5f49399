"""LoRA fine-tuning of TinyLlama-1.1B on MetaMathQA, planned for one 4 GB card.

    python train_math.py                                           # 10,000 problems, 3 epochs, r=8
    python train_math.py --demo                                    # a good minute, no download
    python train_math.py --model DIR --data train.jsonl --r 16     # your own model and data
    python eval_gsm8k.py --adapter checkpoints/lora-r8-MetaMathQA  # score every checkpoint
    torchrun --nproc-per-node 2 -- train_math.py                   # the same run on two GPUs

Written are checkpoints/RUN/step_000500/ (the adapter in PEFT's format, and the trainer's state)
and runs/RUN/ (metrics.jsonl with a line per step, TensorBoard events, loss.png).

Start reading at train(): the loop is one screen, and what it calls is written by hand.
"""
import hashlib
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
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import eval_gsm8k
from eval_gsm8k import (BASE_MODEL, RANK, WORLD, Parser, check_ids, checkpoints, encode_prompt,
                        first_line, format_prompt, gather, join_processes, load_model, number,
                        peak_memory, pick_device, pick_dtype, read_rows, run_script)
from lora import (LoRAConfig, NF4Linear, count_parameters, disable_lora, inject_lora, load_adapter,
                  save_adapter)

GiB = 2**30


# --- command line ---

def parse_args(argv=None):
    parser = Parser(prog="train_math.py", description=__doc__,
                    formatter_class=RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--model", default=BASE_MODEL, help="Hub id or folder of the base model")
    add("--data", default="meta-math/MetaMathQA", help="Hub id, or .jsonl/.json/.parquet/.csv")
    add("--nb-samples", type=count, default=10000, help="train on the first N rows")
    add("--epochs", type=count, default=3, help="passes over the data")
    add("--max-steps", type=count, help="stop after N steps, the schedule ending there")
    add("--r", type=number(int, 1, 2**16), default=8, help="rank (Hu et al., Sec. 4.1)")
    add("--alpha", type=number(float, 1e-6), default=16.0, help="the update is scaled by alpha / r")
    add("--dropout", type=number(float, 0, 0.99), default=0.05, help="on the adapter's input")
    add("--targets", nargs="+", default=["q_proj", "v_proj"],
        help="name endings of the layers to adapt, or all-linear")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r) (arXiv:2312.03732)")
    add("--lr", type=number(float, 1e-12, 1), default=3e-4, help="peak learning rate of AdamW")
    add("--warmup-steps", type=number(int, 0), default=100, help="at most a tenth of all steps")
    add("--weight-decay", type=number(float, 0, 1), default=0.0, help="AdamW's, on what trains")
    add("--clip", type=number(float, 1e-6), default=1.0, help="largest norm of the gradient")
    add("--batch-size", type=count, default=1, help="rows per micro-batch")
    add("--grad-accum", type=count, default=8, help="micro-batches per optimizer step")
    add("--max-length", type=number(int, 2), default=512, help="tokens; longer rows are dropped")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="storage and compute of the frozen base")
    add("--nf4", action="store_true", help="hold the base's linear layers in 4 bits (QLoRA)")
    add("--checkpoint-activations", action=BooleanOptionalAction,
        help="recompute each block in backward (default: if its activations would not fit)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--vram", type=number(float, 0.6), metavar="GB",
        help="pretend that the card has GB, of which context and driver take 0.5")
    add("--run-name", help="default: lora-r{r}-{data}")
    add("--save-every", type=count, default=500, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue this run from its newest whole checkpoint")
    add("--seed", type=number(int, 0, 2**31), default=0, help="order of the data, A, dropout")
    add("--demo", action="store_true", help="train and score a tiny model; takes --seed alone")
    args = parser.parse_args(argv)
    name = args.run_name or f"lora-r{args.r}-{Path(args.data).stem}"
    args.run_name = re.sub(r"[^A-Za-z0-9._-]", "_", name)  # one folder
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


def epoch_batches(lengths, batch_size, seed, epoch):
    """Return the batches of an epoch as row numbers: a function of (seed, epoch), so resumable."""
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    # Rows of like length share a batch, to save padding: sorted within pools of 50 batches.
    for start in range(0, len(order), 50 * batch_size):
        pool = sorted(order[start:start + 50 * batch_size], key=lambda row: lengths[row])
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    # The largest first: out-of-memory comes in the first minute, not in the third hour.
    sizes = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    largest = sizes.index(max(sizes))
    batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def collate(examples, device):
    """Return ids (batch, longest), and the rows and columns of the targets: answers and their EOS.

    Padding is on the right, where causal attention never looks: no mask is needed. Targets are
    known by length, so that the final EOS is one also where pad == eos.
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

    Gradients below 6e-8 vanish in fp16: the loss is multiplied by `scale` before backward, and the
    adapter's fp32 gradients are divided by it. If one is not finite, the step is skipped and the
    scale halves; after `interval` good steps in a row it doubles. In bf16 and fp32 it is 1.
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
        elif self.enabled and self.good_steps == self.interval:
            self.scale *= 2
            self.good_steps = 0


def learning_rate_at(step, steps, warmup, peak):
    """Warm up linearly over at most a tenth of the steps, then cosine (arXiv:1608.03983) to 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# --- the loss: attention, logits in chunks ---

def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Return (softmax(scaling Q K^T + causal bias) V, None): (b, n, h, c), and no weights.

    query (b, h, n, c); key and value (b, g, n, c), h a multiple of g; attention_mask, if a causal
    one is not enough, (b, 1, n, n), True where to look.
    """
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention with a cap, sinks or a position bias")
    b, h, n, c = query.shape
    g = key.shape[1]
    if query.device.type != "cpu":
        # Below compute capability 8 torch's fused kernels take no grouped heads: without this,
        # scores of (b, h, n, n) would be in memory.
        if h > g:
            key, value = (x.repeat_interleave(h // g, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout,
                                             is_causal=attention_mask is None, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    # On a CPU the fused kernel's backward is slow. The query heads of a group are stacked in the
    # rows, so that K and V are not repeated.
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    bias = torch.zeros_like(attention_mask, dtype=query.dtype)
    bias = bias.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    bias = bias[:, 0].repeat(1, h // g, 1)  # (1 or b, h/g n, n)
    if len(bias) > 1:
        bias = bias.repeat_interleave(g, dim=0)  # (b g, h/g n, n)
    rows = query.reshape(b * g, h // g * n, c)
    columns = key.reshape(b * g, n, c).transpose(1, 2)
    scores = torch.baddbmm(bias, rows, columns, alpha=scaling or c**-0.5)  # (b g, h/g n, n)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    out = torch.bmm(weights, value.reshape(b * g, n, -1))
    return out.view(b, h, n, -1).transpose(1, 2).contiguous(), None


def use_attention(model):
    """Set the attention above, in place of transformers' own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("lora_training", attention)
    AttentionMaskInterface.register("lora_training", sdpa_mask)  # else the mask is silently None
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
    """Raise ValueError unless the loss above sees this model's logits; set the attention above.

    Where that gives other logits, the model keeps its own. ids: the longest training row, so that
    sliding windows take effect.
    """
    ids = torch.tensor([ids], device=model.device)
    head, last = model.get_output_embeddings(), slice(-16, None)  # positions to compare
    own = model(input_ids=ids, use_cache=False).logits[:, last].float()

    def agrees(in_fp32, in_half):
        try:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, last]
        except (AttributeError, NotImplementedError):  # no hidden states; a cap or sinks
            return False
        logits = head(hidden.to(head.weight.dtype)).float()
        tolerance = in_fp32 if model.dtype == torch.float32 else in_half
        return bool((logits - own).norm() <= tolerance * own.norm())  # False for NaN

    if not agrees(1e-5, 0.01):  # the rounding of one product
        raise ValueError(f"{type(model).__name__} changes what its output head gives (a scale, a "
                         f"cap: not supported here), or overflows in {model.dtype}")
    before = model.config._attn_implementation
    use_attention(model)
    if not agrees(1e-4, 0.05):  # of all blocks: 0.01 in bf16 over 30
        model.set_attn_implementation(before)


# --- memory: recomputation, the plan ---

def blocks(model):
    """Return the transformer blocks: of the model's module lists the one with most weights."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def checkpoint_blocks(model):
    """Keep each block's input alone, and run the block again in backward (arXiv:1604.06174)."""
    for block in blocks(model):  # with use_reentrant=True nothing trains behind frozen embeddings
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def kept_by_block(model, length):
    """Return bytes of (a block's input, all that it keeps for backward) for a row of `length`."""
    block, calls, kept = blocks(model)[0], [], {}
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    hook = block.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    hook.remove()
    _, (hidden, *args), kwargs = calls[0]  # several where layers share one block

    def keep(tensor):  # held until the end, so that no address comes twice
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block(hidden.requires_grad_(), *args, **kwargs)
    # Not counted: the weights, and what all blocks share, such as the mask.
    for tensor in [*model.parameters(), *tree_leaves((args, kwargs))]:
        if isinstance(tensor, torch.Tensor):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    return hidden.nbytes, sum(storage.nbytes() for storage in kept.values())


def memory_plan(model, batch_size, kept, whole):
    """Return {what: bytes} at the peak of a training step.

    A row leaves `kept` bytes in every block, and `whole` in the one whose backward runs. Both are
    block 0's: too low where later blocks are larger (experts).
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    item = model.get_output_embeddings().weight.element_size()
    packed = [m.out_features * m.in_features for m in model.modules() if isinstance(m, NF4Linear)]
    # log-softmax and its two gradients in fp32, logits and their gradient in the base's dtype
    logits = CHUNK * (12 + 2 * item)
    # half of what a block keeps is alive as gradients; a dequantised layer and its index
    gradients = batch_size * whole // 2 + max(packed, default=0) * (2 + item)
    return {
        "base weights": weights - trained,
        "trained weights": trained,
        "their gradients": trained,
        "AdamW's moments": 2 * trained,
        "activations": batch_size * ((len(blocks(model)) - 1) * kept + whole),
        "logits, or gradients in a block": max(logits, gradients),
    }


def plan_memory(model, args, longest, batch_size):
    """Choose between keeping and recomputing activations, print the plan; return it in GiB."""
    device, recompute = model.device, args.checkpoint_activations
    block_input, whole = kept_by_block(model, longest)
    plan = memory_plan(model, batch_size, whole, whole)
    weights = plan["base weights"] + plan["trained weights"]
    need, free = sum(plan.values()) - weights, free_memory(device, args.vram)
    # torch does not restore the random state of MPS: backward would see another dropout mask.
    other_masks = device.type == "mps" and args.dropout > 0
    if recompute is None:
        recompute = 1.25 * need > free and not other_masks
    elif recompute and other_masks:
        raise ValueError("--checkpoint-activations on mps needs --dropout 0")
    if recompute:
        checkpoint_blocks(model)
        plan = memory_plan(model, batch_size, block_input, whole)
    if device.type != "cuda":
        plan["Python and libraries"] = max(0, process_memory() - weights)
    total = sum(plan.values()) / GiB
    print("memory plan, GiB:", ", ".join(f"{what} {size / GiB:.3f}" for what, size in plan.items()))
    known = f"{free / GiB:.2f}" if free else "unknown"
    print(f"in all {total:.2f}, activations {'recomputed' if recompute else 'kept'}: keeping takes "
          f"{need / GiB:.2f} beside the weights, free: {known}", flush=True)
    return total


def free_memory(device, vram):
    """Return the bytes that can still be allocated, 0 if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        if vram:
            free = min(free, int((vram - 0.5) * GiB) - reserved)
        return free + reserved - torch.cuda.memory_allocated(device)
    free = 1024 * read_number("/proc/meminfo", r"MemAvailable: +(\d+)")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if limit := read_number(path):  # of a container
            free = min(free, limit - process_memory())
    return free


def process_memory():
    """Return the bytes that the process holds (Linux; elsewhere its peak so far)."""
    pages = read_number("/proc/self/statm", r" (\d+)")
    return pages * os.sysconf("SC_PAGE_SIZE") if pages else peak_memory(torch.device("cpu"))


def read_number(path, pattern=r"(\d+)"):
    """Return a number that Linux tells in a file, 0 if there is none."""
    match = re.search(pattern, Path(path).read_text()) if Path(path).exists() else None
    return int(match[1]) if match else 0


def limit_vram(gb, device):
    """Cap the allocator, so that a big card runs out of memory where a small one would."""
    own = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    if gb * GiB > own:
        raise ValueError(f"--vram {gb:g}: {device} has {own / GiB:.1f} GiB of GPU memory")
    torch.cuda.set_per_process_memory_fraction((gb - 0.5) * GiB / own, device.index)


# --- checkpoints ---

MAY_CHANGE_ON_RESUME = {"device", "vram", "save_every", "resume", "demo", "checkpoint_activations"}


def save_checkpoint(folder, model, config, state):
    """Write adapter and trainer_state.pt beside their place and rename: never a partial checkpoint.

    Every adapter stays; the state, twice as large, for the newest two.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    save_adapter(model, config, part)
    content = io.BytesIO()  # to a file, torch.save would hide that a disk is full
    torch.save(state, content)
    with open(part / "trainer_state.pt", "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    steps = checkpoints(folder.parent)  # later than this one are damaged ones, passed over
    for old in steps[:steps.index(folder)][:-1]:
        (old / "trainer_state.pt").unlink(missing_ok=True)


def newest_state(folder):
    """Return (folder, trainer state) of the newest checkpoint that can be read, or None."""
    for path in reversed(checkpoints(folder)):
        try:
            state = torch.load(path / "trainer_state.pt", map_location="cpu", weights_only=True)
            load_file(path / "adapter_model.safetensors")
            return path, state
        except Exception as error:  # cut off, half deleted, junk
            warnings.warn(f"{path} is damaged and passed over ({first_line(error)})")


# --- training ---

def train(model, examples, args, config=None, state=None):
    """Train what requires grad, on from a state; with a config, save. Return the last folder."""
    state = state or {"step": 0}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    scaler = LossScaler(enabled=model.dtype == torch.float16)
    lengths = [len(ids) for ids, _ in examples]
    order = [rows for epoch in range(args.epochs)
             for rows in epoch_batches(lengths, args.batch_size, args.seed, epoch)]
    steps = min(math.ceil(len(order) / args.grad_accum), args.max_steps or sys.maxsize)
    step = state["step"]
    if step:
        optimizer.load_state_dict(state["optimizer"])
        vars(scaler).update(state["scaler"])
    saved, stop = None, False
    model.train()
    with (open_log(args.run_name, step) as log, catch_signals() as caught,
          tqdm(total=steps, initial=step, unit="step", disable=RANK > 0 or None) as bar):
        while step < steps and not stop:
            start = time.perf_counter()

            # 1. Learning rate. A skipped step does not advance the schedule.
            lr = learning_rate_at(step - scaler.skipped, steps, args.warmup_steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 2. Forward and backward, one micro-batch at a time. Each loss is divided by the
            #    targets of the whole window, so 8 x 1, 4 x 2 and 1 x 8 give the same gradient.
            first = step * args.grad_accum
            window = [[examples[row] for row in rows]
                      for rows in order[first:first + args.grad_accum]]
            targets = sum(len(ids) - prompt for batch in window for ids, prompt in batch)
            loss = 0.0
            for n in range(RANK, len(window), WORLD):
                # Dropout follows from seed and micro-batch. A CPU's generator takes 32 bits.
                torch.manual_seed(random.Random(f"{args.seed} {first + n}").getrandbits(32))
                batch = collate(window[n], model.device)
                loss += backward_loss(model, batch, scaler.scale / targets)
            loss, stop = sum_over_processes(parameters, float(loss) / targets, bool(caught))
            if step == state["step"]:
                warn_untrained(model)

            # 3. Unscale and clip, in fp32.
            scaler.unscale(parameters)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, args.clip))

            # 4. Step, or skip after an overflow, leaving weights and moments untouched.
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scaler.update(finite)
            step += 1
            if scaler.skipped_in_a_row == (20 if scaler.enabled else 1):
                raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}: try a lower "
                                 "--lr, or --dtype bfloat16 or float32")

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
                saved = Path("checkpoints", args.run_name, f"step_{step:06d}")
                if RANK == 0:
                    save_checkpoint(saved, model, config, {
                        **state, "step": step, "scaler": vars(scaler),
                        "optimizer": optimizer.state_dict()})
    if stop and step < steps:
        print(f"stopped: the same command with --resume goes on from {saved}")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])  # 130 for Ctrl-C, 143 for SIGTERM
    return saved


def warn_untrained(model):
    """Name what the text did not reach: a vision tower, unused experts."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        warnings.warn(f"{len(idle)} weights had no gradient in the first window, such as {idle[0]}")


def sum_over_processes(parameters, loss, stop):
    """Sum the gradients, in place, and two numbers over all processes."""
    if WORLD == 1:
        return loss, stop
    for p in parameters:
        if p.grad is None:  # a process without a micro-batch in a short window
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
    numbers = torch.tensor([loss, stop], device=parameters[0].device)
    dist.all_reduce(numbers)
    loss, stop = numbers.tolist()
    return loss, bool(stop)


@contextmanager
def open_log(name, step):
    """Yield log(line): to metrics.jsonl, cut back to its first `step` lines, and to TensorBoard.

    At the end loss.png is drawn: each step's loss and a running mean.
    """
    if RANK > 0:
        yield lambda line: None
        return
    path = Path("runs", name, "metrics.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:step]))
    try:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(path.parent, purge_step=step + 1)  # hides what it has of later steps
    except ImportError:
        board = None

    def log(line):
        for key in ("loss", "lr", "grad_norm", "tokens_per_s"):
            if board:
                board.add_scalar(key, line[key], line["step"])
            if not math.isfinite(line[key]):
                line[key] = None  # NaN is not JSON
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    with board or nullcontext():
        yield log
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    losses = [line["loss"] for line in map(json.loads, open(path)) if not line["skipped"]]
    axes = Figure().subplots()
    axes.plot(losses, color="0.8")
    axes.plot(list(accumulate(losses, lambda mean, loss: 0.95 * mean + 0.05 * loss)))
    axes.set(title=name, xlabel="optimizer step", ylabel="loss and its mean (nats per target)")
    axes.figure.savefig(path.with_name("loss.png"))


@contextmanager
def catch_signals():
    """Yield a list that notes Ctrl-C and SIGTERM: the step is finished. A second one cuts it."""
    caught = []

    def note(signum, _):
        caught.append(signum)
        signal.signal(signum, before[signum])

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# --- a run, from flags to files ---

def main(args):
    """Run the experiment, or the demo. Return the folder of the last checkpoint."""
    if WORLD > (1 if args.demo else args.grad_accum):
        raise ValueError(f"{WORLD} processes: --demo takes one, --grad-accum N at most N")
    if args.demo:
        return demo(args.seed)
    folder = Path("checkpoints", args.run_name)
    if checkpoints(folder) and not args.resume:
        raise ValueError(f"{folder} has checkpoints: add --resume, or give another --run-name")
    begun, state = newest_state(folder) or (None, {"step": 0})
    if args.resume and not begun:
        raise ValueError(f"--resume: {folder} has no whole checkpoint to continue from")
    device = join_processes(pick_device(args.device))
    if args.vram:
        limit_vram(args.vram, device)
    dtype, reason = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    rows = read_rows(args.data, "train", args.nb_samples)
    model, tokenizer = load_model(args.model, dtype, device, args.nf4)
    examples = encode(rows, tokenizer, args.max_length)
    ids = [ids for ids, _ in examples]
    longest = max(ids, key=len)
    check_ids(model, ids)
    check_head(model, longest)

    # On resuming and in every process, the run must be the one that was begun, by rank 0.
    identity = run_identity(model, examples, args)
    state.setdefault("identity", identity)
    wanted = gather({**state["identity"], "step": state["step"]})[0]
    for key, value in {**identity, "step": state["step"]}.items():
        if wanted.get(key, value) != value:
            raise ValueError(f"{key} of this run was {wanted[key]}, is {value}: repeat the old "
                             "one, or give another --run-name")

    config = LoRAConfig(args.r, args.alpha, args.dropout, args.targets, rslora=args.rslora)
    torch.manual_seed(args.seed)
    names = inject_lora(model, config)
    if begun:
        load_adapter(model, begun)

    trainable, total = count_parameters(model)
    tokens, batch_size = sum(map(len, ids)), min(args.batch_size, len(ids))
    print(f"{args.model} in {args.dtype}{' over NF4' * args.nf4} on {device} ({reason}), "
          f"attention {model.config._attn_implementation}\n"
          f"{len(names)} layers adapted ({names[0]} ...): {trainable:,} of {total:,} parameters "
          f"train ({trainable / total:.2%}), in float32\n"
          f"{len(ids):,} rows, {len(rows) - len(ids):,} dropped over {args.max_length} tokens; "
          f"{tokens:,} tokens, about {tokens * batch_size * args.grad_accum // len(ids):,} a step")
    model.train()
    planned = plan_memory(model, args, len(longest), batch_size)
    last = train(model, examples, args, config, state) or begun  # a finished run has no step left
    print(f"peak memory {peak_memory(device) / GiB:.2f} GiB, planned {planned:.2f}. Written: "
          f"{last}/, runs/{args.run_name}/metrics.jsonl\nscore it:  python eval_gsm8k.py "
          f"--model {args.model} --adapter {folder} --dtype {args.dtype}{' --nf4' * args.nf4}")
    return last


def run_identity(model, examples, args):
    """Return what makes a run: flags, data, base weights."""
    flags = {f"--{key.replace('_', '-')}": value for key, value in vars(args).items()
             if key not in MAY_CHANGE_ON_RESUME}
    data = hashlib.sha256(repr(examples).encode())
    base = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:  # a little of each
        base.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return {**flags, "data": data.hexdigest()[:12], "base": base.hexdigest()[:12]}


# --- the demo: everything above, on a model and problems made here ---

def demo_problem(rng, two_steps):
    """Return a problem of one step, 7 + 5 = 12, or of two, 7 + 5 = 12, 12 - 3 = 9."""
    name = rng.choice(["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn"])
    thing = rng.choice(["apples", "books", "coins", "eggs", "pens", "shells"])
    have = rng.randint(0, 10 if two_steps else 15)  # each single step is one that the base has seen
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
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging
    logging.disable_progress_bar()
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>",
                                        eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(ids), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=1,
        bos_token_id=None)), tokenizer


def demo(seed):
    """Pretrain a base on one-step problems, adapt it to two-step ones, score, merge, switch off."""
    begin, ours = time.perf_counter(), Path("demo/one-step-train.jsonl").exists()
    for old in ("demo", "checkpoints/demo"):
        if Path(old).exists() and not ours:
            raise ValueError(f"--demo replaces ./{old}, and this is not its own: run it elsewhere")
        shutil.rmtree(old, ignore_errors=True)
    Path("demo").mkdir()
    rng, texts = random.Random(seed), []
    for name, held_out in (("one-step", 200), ("two-step", 400)):
        problems = {}
        while len(problems) < 3000 + held_out:  # keyed by question: none is in both files
            problem = demo_problem(rng, name == "two-step")
            problems[problem["question"]] = json.dumps(problem) + "\n"
            texts.append(f"{format_prompt(problem['question'])} {problem['answer']}")
        lines = list(problems.values())
        Path(f"demo/{name}-test.jsonl").write_text("".join(lines[:held_out]))
        Path(f"demo/{name}-train.jsonl").write_text("".join(lines[held_out:]))
    cpu = "--dtype float32 --device cpu"
    common = f"{cpu} --grad-accum 1 --dropout 0 --lr 3e-3 --seed {seed}"

    print("1. A base is pretrained on one-step problems, by the same loop")
    args = parse_args("--data demo/one-step-train.jsonl --run-name demo-base --epochs 6 "
                      f"--batch-size 64 {common}".split())
    model, tokenizer = demo_base(texts, seed)
    train(model, encode(read_rows(args.data, "train"), tokenizer, 512), args)
    model.save_pretrained("demo/base")
    tokenizer.save_pretrained("demo/base")

    flags = ("--model demo/base --data demo/two-step-train.jsonl --run-name demo "
             f"--targets all-linear --epochs 3 --batch-size 32 {common}")
    print(f"\n2. LoRA teaches it two-step problems\npython train_math.py {flags}", flush=True)
    last = main(parse_args(flags.split()))

    flags = (f"--model demo/base --adapter {last} --data demo/two-step-test.jsonl "
             f"--save-merged demo/merged --batch-size 200 --max-new-tokens 40 {cpu}")
    print(f"\n3. All are scored on held-out ones\npython eval_gsm8k.py {flags}", flush=True)
    eval_gsm8k.main(eval_gsm8k.parse_args(flags.split()))

    print("\n4. The base's own task, with the adapter on and off", flush=True)
    model, tokenizer = load_model("demo/base", torch.float32, torch.device("cpu"))
    load_adapter(model, last)
    rows = read_rows("demo/one-step-test.jsonl", "test")
    for name, switch in (("on ", nullcontext()), ("off", disable_lora(model))):
        with switch:
            records = eval_gsm8k.answer(model, tokenizer, rows, 0, 200, 40)
        print(eval_gsm8k.describe(f"one-step, adapter {name}", eval_gsm8k.summarise(records)))
    print(f"data and models are in demo/; {time.perf_counter() - begin:.0f} s in all")
    return last


if __name__ == "__main__":
    run_script("train_math.py", main, parse_args)
