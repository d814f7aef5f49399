"""LoRA fine-tuning of TinyLlama-1.1B on MetaMathQA, planned for one 4 GB card.

    python train_math.py                                           # 10,000 problems, 3 epochs, r=8
    python train_math.py --demo                                    # a minute, nothing downloaded
    python train_math.py --model DIR --data train.jsonl --r 16     # your own model and data
    python eval_gsm8k.py --adapter checkpoints/lora-r8-MetaMathQA  # score every checkpoint
    torchrun --nproc-per-node 2 -- train_math.py                   # the same run on two GPUs

Files written
    checkpoints/RUN/step_000500/    the adapter in PEFT's format, and the trainer's state
    runs/RUN/metrics.jsonl          a line per step; TensorBoard events and loss.png beside it

Written by hand here: mixed precision with loss scaling, gradient accumulation, recomputation of
activations, a loss in chunks, the memory plan, the loop. train() is the place to start reading.
"""
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import eval_gsm8k
from eval_gsm8k import (BASE_MODEL, RANK, WORLD, Parser, check_ids, checkpoints, encode_prompt,
                        first_line, format_prompt, gather, join_processes, load_model, number,
                        peak_memory, pick_device, pick_dtype, read_rows, run_script)
from lora import (LoRAConfig, NF4Linear, count_parameters, disable_lora, inject_lora, load_adapter,
                  save_adapter)


# --- command line ---

def parse_args(argv=None):
    parser = Parser(prog="train_math.py", description=__doc__,
                    formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=BASE_MODEL, help="Hub id or folder of the base model")
    add("--data", default="meta-math/MetaMathQA",
        help="Hub id, or a .jsonl/.json/.parquet/.csv file")
    add("--nb-samples", type=number(int, 1), default=10000, help="train on the first N rows")
    add("--epochs", type=number(int, 1), default=3, help="passes over the data")
    add("--max-steps", type=number(int, 1), help="stop after N steps, the schedule ending there")
    add("--r", type=number(int, 1, 2**16), default=8, help="rank (Hu et al., Sec. 4.1)")
    add("--alpha", type=number(float, 1e-6), default=16.0, help="the update is scaled by alpha / r")
    add("--dropout", type=number(float, 0, 0.99), default=0.05, help="on the adapter's input")
    add("--targets", nargs="+", default=["q_proj", "v_proj"],
        help="name endings of the layers to adapt, or all-linear")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r) (arXiv:2312.03732)")
    add("--lr", type=number(float, 1e-12, 1), default=3e-4, help="peak learning rate of AdamW")
    add("--warmup-steps", type=number(int, 0), default=100,
        help="linear warm-up, at most a tenth of the steps; then cosine to 0")
    add("--weight-decay", type=number(float, 0, 1), default=0.0, help="AdamW's, on what trains")
    add("--clip", type=number(float, 1e-6), default=1.0, help="largest norm of the gradient")
    add("--batch-size", type=number(int, 1), default=1, help="rows per micro-batch")
    add("--grad-accum", type=number(int, 1), default=8, help="micro-batches per optimizer step")
    add("--max-length", type=number(int, 2), default=512,
        help="tokens; longer rows are dropped and counted, never cut")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="storage and compute of the frozen base")
    add("--nf4", action="store_true",
        help="hold the base's linear layers in 4 bits (QLoRA, arXiv:2305.14314)")
    add("--checkpoint-activations", action=BooleanOptionalAction, default=None,
        help="recompute each block in backward instead of keeping its activations "
             "(default: if the memory plan says that they do not fit)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--vram", type=number(float, 0.6), metavar="GB",
        help="pretend that the card has GB: the allocator gets GB minus 0.5 for context and driver")
    add("--run-name", help="default: lora-r{r}-{data}")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue this run from its newest whole checkpoint")
    add("--seed", type=number(int, 0, 2**31), default=0, help="order of the data, A, dropout")
    add("--demo", action="store_true",
        help="make a model and data in memory, train, evaluate, merge; takes --seed alone")
    args = parser.parse_args(argv)
    if args.run_name is None:
        data = re.sub(r"[^A-Za-z0-9.-]", "_", Path(args.data).stem)
        args.run_name = f"lora-r{args.r}-{data}"
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", args.run_name):
        parser.error(f"argument --run-name: got {args.run_name!r}, expected a folder name of "
                     "letters, digits, '.', '_' and '-'")
    return args


# --- data: token ids, batches of like length ---

def encode(rows, tokenizer, max_length: int) -> list[tuple[list[int], int]]:
    """Return [(token ids, how many of them are prompt)]; rows over max_length are left out.

    A row that is too long is dropped, not cut: without its EOS it would teach not to stop.
    """
    examples, longest = [], 0
    for question, answer in rows:
        text = format_prompt(question)
        prompt = encode_prompt(tokenizer, text)
        ids = encode_prompt(tokenizer, f"{text} {answer}")
        if ids[:len(prompt)] != prompt:  # a token spans both: generation cannot produce it
            ids = prompt + tokenizer(f" {answer}", add_special_tokens=False).input_ids
        ids = ids + [tokenizer.eos_token_id]
        longest = max(longest, len(ids))
        if len(ids) <= max_length:
            examples.append((ids, len(prompt)))
    if not examples:
        raise ValueError(f"--max-length {max_length} leaves no row: the {len(rows)} rows are up to "
                         f"{longest} tokens long")
    return examples


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch as row numbers: a function of (seed, epoch), so resumable.

    Rows of like length share a batch, which saves most of the padding.
    """
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), 50 * batch_size):  # sort within pools of 50 batches
        pool = sorted(order[start:start + 50 * batch_size], key=lambda row: lengths[row])
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    # The largest first: out-of-memory comes in the first minute, not in the third hour.
    sizes = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    largest = sizes.index(max(sizes))
    batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def run_batches(examples, args) -> list[list[tuple[list[int], int]]]:
    """Return the micro-batches of all epochs, in order."""
    lengths = [len(ids) for ids, _ in examples]
    batches = []
    for epoch in range(args.epochs):
        for rows in epoch_batches(lengths, args.batch_size, args.seed, epoch):
            batches.append([examples[row] for row in rows])
    return batches


def collate(examples, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids (batch, longest), and the rows and columns of the targets: answers and their EOS.

    Padding is on the right, where causal attention never looks, so no mask is needed. Targets are
    chosen by length: where pad == eos, the final EOS is a target all the same.
    """
    longest = max(len(ids) for ids, _ in examples)
    padded = [ids + [0] * (longest - len(ids)) for ids, _ in examples]
    targets = [(row, column) for row, (ids, prompt) in enumerate(examples)
               for column in range(prompt, len(ids))]
    rows, columns = torch.tensor(targets, device=device).T
    return torch.tensor(padded, device=device), rows, columns


# --- mixed precision, schedule ---

class LossScaler:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740, Sec. 3.2).

    Gradients below 6e-8 vanish in fp16, so the loss is multiplied by `scale` before backward, and
    the adapter's fp32 gradients are divided by it. If one is not finite, the step is skipped and
    the scale halves; after `interval` good steps in a row it doubles. In bf16 and fp32 it is 1.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**16, interval: int = 2000):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.interval = interval
        self.good_steps = self.skipped = self.skipped_in_a_row = 0

    def unscale(self, parameters) -> None:
        for parameter in parameters:
            if self.enabled and parameter.grad is not None:
                parameter.grad.mul_(1 / self.scale)  # in fp32: nothing underflows here

    def update(self, finite: bool) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.good_steps = self.good_steps + 1 if finite else 0
        if self.enabled and not finite:
            self.scale /= 2
        elif self.enabled and self.good_steps == self.interval:
            self.scale *= 2
            self.good_steps = 0


def learning_rate_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Warm up linearly over at most a tenth of the steps, then cosine (arXiv:1608.03983) to 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def seed_dropout(seed: int, micro_batch: int) -> None:
    """Make dropout follow from (seed, micro-batch), on any number of processes, also on resume."""
    # The generator of a CPU takes 32 bits of a seed.
    torch.manual_seed(random.Random(f"{seed} {micro_batch}").getrandbits(32))


# --- the loss: attention, logits in chunks ---

def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Return (softmax(scaling Q K^T + causal bias) V, None): (b, n, h, c), and no weights.

    query (b, h, n, c); key and value (b, g, n, c) with h a multiple of g. attention_mask, (b, 1, n,
    n) bool, True where to look, comes where an architecture needs more than the causal bias.
    """
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention with a cap, sinks or a position bias")
    b, h, n, c = query.shape
    g = key.shape[1]
    if query.device.type != "cpu":
        # Below compute capability 8 torch's fused kernels take no grouped heads: torch would fall
        # back to scores of (b, h, n, n) in memory. Expanded, K and V take h / g as much.
        if h > g:
            key = key.repeat_interleave(h // g, dim=1)
            value = value.repeat_interleave(h // g, dim=1)
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout,
                                             is_causal=attention_mask is None, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    # On a CPU the fused kernel's backward is slow. The query heads of a group are stacked in the
    # rows, so that K and V are not repeated.
    lowest = torch.finfo(query.dtype).min
    if attention_mask is None:
        bias = torch.full((n, n), lowest, dtype=query.dtype).triu(1).repeat(h // g, 1)
    else:
        bias = torch.zeros(b, 1, n, n, dtype=query.dtype).masked_fill(~attention_mask, lowest)
        bias = bias.repeat(1, g, h // g, 1).view(b * g, h // g * n, n)
    rows = query.reshape(b * g, h // g * n, c)
    columns = key.reshape(b * g, n, c).transpose(1, 2)
    scores = torch.baddbmm(bias, rows, columns, alpha=scaling or c**-0.5)  # (b g, h/g n, n)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    out = torch.bmm(weights, value.reshape(b * g, n, value.shape[-1]))
    return out.view(b, h, n, -1).transpose(1, 2).contiguous(), None


def use_attention(model) -> None:
    """Set the attention above, in place of transformers' own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("lora_training", attention)
    AttentionMaskInterface.register("lora_training", sdpa_mask)  # else the mask is silently None
    model.set_attn_implementation("lora_training")


CHUNK = 2**22  # computed at once: 131 positions of a 32,000-word vocabulary, whatever the batch


def backward_loss(model, batch, weight: float = 1.0) -> torch.Tensor:
    """Add the gradients of weight * loss; return the loss, summed over the batch's targets (fp32).

    Logits exist only where there is a target, a chunk at a time: each chunk goes forward and
    backward through the output head at once, down to the gradient of its hidden states. That
    gradient then goes through the blocks in one backward.
    """
    ids, rows, columns = batch
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = hidden[rows, columns - 1]  # (batch, longest, width) -> (targets, width)
    targets = ids[rows, columns]
    head = model.get_output_embeddings()
    size = max(1, CHUNK // head.weight.shape[0])
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
def check_head(model, ids: list[int]) -> None:
    """Raise ValueError unless the loss above sees this model's logits; set the attention above.

    The model keeps its own attention where ours gives other logits. ids: the longest training row,
    so that sliding windows take effect.
    """
    ids = torch.tensor([ids], device=next(model.parameters()).device)
    head = model.get_output_embeddings()
    last = slice(-16, None)  # positions to compare
    own = model(input_ids=ids, use_cache=False).logits[:, last].float()
    if not own.isfinite().all():
        raise ValueError(f"the base's own logits are not finite in {model.dtype}: try another "
                         "--dtype, or is the model damaged?")

    def agrees(in_fp32: float, in_half: float) -> bool:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, last]
        logits = head(hidden.to(head.weight.dtype)).float()
        tolerance = in_fp32 if model.dtype == torch.float32 else in_half
        return bool((logits - own).norm() <= tolerance * own.norm())

    try:
        same = agrees(1e-5, 0.01)  # the rounding of one product
    except AttributeError:
        same = False  # its backbone returns something else than hidden states
    if not same:
        raise ValueError(f"{type(model).__name__} does more than apply its output head to the last "
                         "hidden state (a scale, a cap), which is not supported here")
    before = model.config._attn_implementation
    use_attention(model)
    try:
        same = agrees(1e-4, 0.05)  # of all blocks: 0.01 in bf16 over 30
    except NotImplementedError:
        same = False
    if not same:
        model.set_attn_implementation(before)


# --- memory: recomputation, the plan ---

def blocks(model) -> nn.ModuleList:
    """Return the transformer blocks: of the model's module lists the one with most weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks: not supported here")
    return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))


def checkpoint_blocks(model) -> None:
    """Keep each block's input alone, and run the block again in backward (arXiv:1604.06174)."""
    for block in blocks(model):
        # use_reentrant=True looks at requires_grad of the input: behind frozen embeddings nothing
        # would train.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def kept_by_block(model, length: int) -> tuple[int, int]:
    """Return bytes of (a block's input, all that it keeps for backward) for a row of `length`."""
    block, calls, storages = blocks(model)[0], [], {}
    ids = torch.zeros(1, length, dtype=torch.long, device=next(model.parameters()).device)
    hook = block.register_forward_pre_hook(lambda _, *inputs: calls.append(inputs),
                                           with_kwargs=True)
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    hook.remove()
    (hidden, *args), kwargs = calls[0]  # several where layers share one block

    def keep(tensor):  # held until the end, so that no address comes twice
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(hidden.requires_grad_(), *args, **kwargs)
    # Not counted: the weights, and what all blocks share, such as the mask.
    for tensor in [*model.parameters(), *tree_leaves((args, kwargs))]:
        if isinstance(tensor, torch.Tensor):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
    return hidden.nbytes, sum(storage.nbytes() for storage in storages.values())


def memory_plan(model, batch_size: int, kept: int, whole: int) -> dict[str, int]:
    """Return {what: bytes} at the peak of a training step.

    Each of batch_size rows leaves `kept` bytes in every block, and `whole` bytes in the one whose
    backward runs. Both are block 0's: too low where later blocks are larger (experts).
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    everything = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    item = model.get_output_embeddings().weight.element_size()
    packed = [m.out_features * m.in_features for m in model.modules() if isinstance(m, NF4Linear)]
    # log-softmax and its two gradients in fp32, logits and their gradient in the base's dtype
    logits = CHUNK * (12 + 2 * item)
    # half of what a block keeps is alive as gradients; a dequantised layer and its index
    gradients = batch_size * whole // 2 + max(packed, default=0) * (2 + item)
    return {
        "base weights": everything - trained,
        "trained weights": trained,
        "their gradients": trained,
        "AdamW's moments": 2 * trained,
        "activations": batch_size * ((len(blocks(model)) - 1) * kept + whole),
        "logits, or gradients in a block": max(logits, gradients),
    }


def plan_memory(model, args, longest: int, batch_size: int) -> float:
    """Choose between keeping and recomputing activations, print the plan; return it in GiB."""
    device = next(model.parameters()).device
    block_input, whole = kept_by_block(model, longest)
    plan = memory_plan(model, batch_size, whole, whole)
    weights = plan["base weights"] + plan["trained weights"]
    need, free = sum(plan.values()) - weights, free_memory(device, args.vram)
    recompute = args.checkpoint_activations
    # torch does not restore the random state of MPS: backward would see another dropout mask
    other_masks = device.type == "mps" and args.dropout > 0
    if recompute and other_masks:
        raise ValueError("--checkpoint-activations on mps changes the dropout mask between forward "
                         "and backward: give --dropout 0")
    if recompute is None:
        recompute = not other_masks and (free is None or 1.25 * need > free)
    if recompute:
        checkpoint_blocks(model)
        plan = memory_plan(model, batch_size, block_input, whole)
    if device.type != "cuda":
        plan["Python and libraries"] = max(0, process_memory() - weights)
    total = sum(plan.values()) / 2**30
    parts = ", ".join(f"{what} {size / 2**30:.3f}" for what, size in plan.items() if size)
    known = "unknown" if free is None else f"{free / 2**30:.2f} GiB"
    print(f"memory plan, GiB: {parts}; in all {total:.2f}")
    print(f"activations are {'recomputed' if recompute else 'kept'}: a step that keeps them needs "
          f"{need / 2**30:.2f} GiB beside the weights, free: {known}", flush=True)
    return total


def free_memory(device, vram: float | None) -> int | None:
    """Return the bytes that can still be allocated, or None where the system does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if vram:
            free = min(free, (vram - 0.5) * 2**30 - torch.cuda.memory_reserved(device))
        return int(free) + reusable
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(path).exists() and Path(path).read_text().strip().isdigit():  # "max": no limit
            free = min(free, int(Path(path).read_text()) - process_memory())
    return free


def process_memory() -> int:
    """Return the bytes that the process holds now (Linux; elsewhere its peak so far)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return peak_memory(torch.device("cpu"))


def limit_vram(gb: float, device) -> None:
    """Cap the allocator, so that a big card runs out of memory where a small one would."""
    if device.type != "cuda":
        raise ValueError(f"--vram {gb:g} caps the CUDA allocator, but the device is {device}")
    total = torch.cuda.get_device_properties(device).total_memory
    if gb * 2**30 > total:
        raise ValueError(f"--vram {gb:g} is above this card's own {total / 2**30:.1f} GiB")
    index = torch.cuda.current_device() if device.index is None else device  # torch needs a number
    torch.cuda.set_per_process_memory_fraction((gb - 0.5) * 2**30 / total, index)
    print(f"--vram {gb:g}: the allocator is capped at {gb - 0.5:g} GiB")


# --- checkpoints ---

MAY_CHANGE_ON_RESUME = {"device", "vram", "save_every", "resume", "demo", "checkpoint_activations"}


def save_checkpoint(folder: Path, model, config, state: dict) -> None:
    """Write the adapter and trainer_state.pt beside their place, flush, rename.

    A crash leaves no partial checkpoint. Every adapter stays, the state for the newest two: it
    takes twice the adapter's size.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    save_adapter(model, config, part)
    content = io.BytesIO()
    torch.save(state, content)
    with open(part / "trainer_state.pt", "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    steps = checkpoints(folder.parent)  # later than this one are damaged ones, passed over
    for old in steps[:max(0, steps.index(folder) - 1)]:
        (old / "trainer_state.pt").unlink(missing_ok=True)


def newest_state(folder: Path) -> tuple[Path, dict] | None:
    """Return (folder, trainer state) of the newest checkpoint that can be read."""
    for path in reversed(checkpoints(folder)):
        if not (path / "trainer_state.pt").exists():  # an older checkpoint: its adapter alone
            continue
        try:
            state = torch.load(path / "trainer_state.pt", map_location="cpu", weights_only=True)
            load_file(path / "adapter_model.safetensors")
            state["step"], state["optimizer"], state["identity"]  # KeyError for another file
            return path, state
        except Exception as error:  # cut off, half deleted, junk
            warnings.warn(f"{path} is damaged and passed over ({first_line(error)})")
    return None


# --- training ---

def train(model, examples, args, config=None, state=None) -> Path | None:
    """Train what requires grad; with a config, save checkpoints. Return the last one's folder.

    A state resumes step, moments and loss scale; A and B are loaded before; the order of the data
    and dropout follow from the seed.
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    scaler = LossScaler(enabled=model.dtype == torch.float16)
    batches = run_batches(examples, args)
    steps = min(math.ceil(len(batches) / args.grad_accum), args.max_steps or sys.maxsize)
    state = state or {}
    step = state.get("step", 0)
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
            window = batches[first:first + args.grad_accum]
            targets = sum(len(ids) - prompt for batch in window for ids, prompt in batch)
            loss = 0.0
            for n, batch in list(enumerate(window, first))[RANK::WORLD]:
                seed_dropout(args.seed, n)
                loss += backward_loss(model, collate(batch, device), scaler.scale / targets)
            loss, stop = sum_over_processes(parameters, float(loss) / targets, bool(caught))
            if step == state.get("step", 0):
                warn_untrained(model)

            # 3. Unscale and clip, in fp32.
            scaler.unscale(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, args.clip))

            # 4. Step, or skip after an overflow, leaving weights and moments untouched.
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scaler.update(finite)
            step += 1
            if scaler.skipped_in_a_row == (20 if scaler.enabled else 1):
                raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}: try a lower "
                                 "--lr, or --dtype bfloat16 or float32; earlier steps are in "
                                 f"checkpoints/{args.run_name}")

            # 5. Log and save.
            tokens = sum(len(ids) for batch in window for ids, _ in batch)
            speed = tokens / (time.perf_counter() - start)
            peak = peak_memory(device) / 2**30
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
                        "identity": state.get("identity"), "step": step, "scaler": vars(scaler),
                        "optimizer": optimizer.state_dict()})
    if stop and step < steps:
        print(f"stopped after step {step}; saved: {saved}; with --resume the same command goes on")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])  # 130 for Ctrl-C, 143 for SIGTERM
    return saved


def warn_untrained(model) -> None:
    """Warn of adapted layers that the text did not reach: a vision tower, unused experts."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        warnings.warn(f"{len(idle)} weights had no gradient in the first window, such as {idle[0]}")


def sum_over_processes(parameters, loss: float, stop: bool) -> tuple[float, bool]:
    """Sum the gradients, and two numbers beside them, over all processes in one fp32 buffer."""
    if WORLD == 1:
        return loss, stop
    # A process without a micro-batch in a short window has no gradients.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    numbers = torch.tensor([loss, stop], device=gradients[0].device)
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), numbers])
    dist.all_reduce(flat)
    *gradients, numbers = flat.split([*(p.numel() for p in parameters), 2])
    for p, gradient in zip(parameters, gradients):
        p.grad = gradient.view_as(p)
    loss, stop = numbers.tolist()
    return loss, bool(stop)


@contextmanager
def open_log(name: str, step: int):
    """Yield log(line): to metrics.jsonl, cut back to its first `step` lines, and to TensorBoard."""
    if RANK > 0:
        yield lambda line: None
        return
    run = Path("runs") / name
    run.mkdir(parents=True, exist_ok=True)
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:step]), encoding="utf8")
    try:
        from torch.utils.tensorboard import SummaryWriter
        if step == 0:
            for old in run.glob("events.out.tfevents.*"):
                old.unlink()
        board = SummaryWriter(run, purge_step=step + 1)
    except ImportError:
        board = None

    def log(line: dict) -> None:
        for key in ("loss", "lr", "grad_norm", "tokens_per_s"):
            if board:
                board.add_scalar(key, line[key], line["step"])
            if not math.isfinite(line[key]):
                line[key] = None  # NaN is not JSON
        file.write(json.dumps(line) + "\n")
        file.flush()

    with open(path, "a", encoding="utf8") as file, board or nullcontext():
        yield log


@contextmanager
def catch_signals():
    """Yield a list that notes Ctrl-C and SIGTERM: the step is finished. A second one cuts it."""
    caught, before = [], {}

    def note(signum, _):
        caught.append(signum)
        signal.signal(signum, before[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        before[signum] = signal.signal(signum, note)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# --- a run, from flags to files ---

def main(args) -> Path:
    """Run the experiment, or the demo. Return the folder of the last checkpoint."""
    if args.demo:
        if WORLD > 1:
            raise ValueError("--demo runs in one process: start it with python, not torchrun")
        return demo(args.seed)
    folder = Path("checkpoints") / args.run_name
    resumed = find_run(folder, args.resume)
    if args.grad_accum < WORLD:
        raise ValueError(f"--grad-accum {args.grad_accum} leaves some of {WORLD} processes without "
                         f"work: give --grad-accum {WORLD} or more")
    device = join_processes(pick_device(args.device))
    if args.vram:
        limit_vram(args.vram, device)
    dtype, reason = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    rows = read_rows(args.data, "train", args.nb_samples)
    model, tokenizer = load_model(args.model, dtype, device, args.nf4)
    examples = encode(rows, tokenizer, args.max_length)
    lengths = [len(ids) for ids, _ in examples]
    check_ids(model, [ids for ids, _ in examples])
    check_head(model, examples[lengths.index(max(lengths))][0])

    config = LoRAConfig(r=args.r, alpha=args.alpha, dropout=args.dropout, targets=args.targets,
                        rslora=args.rslora)
    identity = run_identity(model, examples, args)
    torch.manual_seed(args.seed)
    names = inject_lora(model, config)
    begun, state = resumed or (None, {"identity": identity})
    for key, value in identity.items():
        before = state["identity"].get(key, value)
        if before != value:
            raise ValueError(f"--resume: {key} was {before}, is {value}; repeat the old one, or "
                             "give another --run-name")
    if begun:
        load_adapter(model, begun)
    identities = gather([identity, state.get("step")])
    if identities[RANK] != identities[0]:
        raise ValueError("the processes differ in flags, data, base weights or checkpoint: start "
                         "all of them with the same")

    trainable, total = count_parameters(model)
    per_step = min(args.batch_size, len(examples)) * args.grad_accum
    print(f"{args.model}: {len(names)} layers adapted ({', '.join(names[:2])} ...), {trainable:,} "
          f"of {total:,} parameters train ({trainable / total:.2%})")
    print(f"base in {'NF4, computing in ' if args.nf4 else ''}{args.dtype} on {device}: {reason}; "
          "adapter, gradients and moments in float32; attention: "
          f"{model.config._attn_implementation}")
    print(f"{len(examples):,} rows of {args.data}, {len(rows) - len(examples):,} dropped over "
          f"{args.max_length} tokens; {sum(lengths):,} tokens an epoch, about "
          f"{sum(lengths) * per_step // len(lengths):,} a step of {per_step} rows")
    model.train()
    planned = plan_memory(model, args, max(lengths), min(args.batch_size, len(examples)))
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written shows now
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of the checks
    last = train(model, examples, args, config, state)
    if last is None:
        print(f"the run was finished already: {begun}")
        return begun
    peak = peak_memory(device) / 2**30
    if RANK == 0:
        plot_loss(Path("runs") / args.run_name)
    print(f"peak memory {peak:.2f} GiB, planned {planned:.2f}. Written: {last}/, "
          f"runs/{args.run_name}/metrics.jsonl")
    print(f"score it:  python eval_gsm8k.py --model {shlex.quote(args.model)} --adapter {folder} "
          f"--dtype {args.dtype}{' --nf4' if args.nf4 else ''}")
    return last


def find_run(folder: Path, resume: bool) -> tuple[Path, dict] | None:
    """Return what to continue from. ValueError for a run that exists, or has nothing to resume."""
    newest = newest_state(folder) if resume else None
    if not resume and checkpoints(folder):
        raise ValueError(f"{folder} has checkpoints up to {checkpoints(folder)[-1].name}: add "
                         "--resume to continue, or give another --run-name")
    if resume and newest is None:
        raise ValueError(f"--resume: {folder} has no whole checkpoint to continue from; start anew "
                         "without --resume, with another --run-name if that folder exists")
    return newest


def run_identity(model, examples, args) -> dict:
    """Return what a resumed run, and every process, must share: flags, data, base weights."""
    flags = {f"--{key.replace('_', '-')}": value for key, value in vars(args).items()
             if key not in MAY_CHANGE_ON_RESUME}
    data = hashlib.sha256(repr(examples).encode())
    base = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:  # a little of each
        base.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return {**flags, "data": data.hexdigest()[:12], "base": base.hexdigest()[:12]}


def plot_loss(run: Path) -> None:
    """Draw runs/RUN/loss.png where matplotlib is installed: each step's loss and a running mean."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    plt.switch_backend("Agg")
    lines = [json.loads(line) for line in open(run / "metrics.jsonl", encoding="utf8")]
    steps, losses, means = [], [], []
    for line in lines:
        if line["loss"] is not None:
            steps.append(line["step"])
            losses.append(line["loss"])
            means.append(0.95 * means[-1] + 0.05 * losses[-1] if means else losses[-1])
    fig, axes = plt.subplots(layout="constrained")
    axes.plot(steps, losses, color="0.8", linewidth=0.8)
    axes.plot(steps, means)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per target token (nats)",
             title=run.name)
    fig.savefig(run / "loss.png", dpi=120)
    plt.close(fig)


# --- the demo: everything above, on a model and problems made here ---

def demo_problem(rng, two_steps: bool) -> dict:
    """Return a problem of one step, 7 + 5 = 12, or of two, 7 + 5 = 12, 12 - 3 = 9."""
    name = rng.choice(["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn"])
    thing = rng.choice(["apples", "books", "coins", "eggs", "pens", "shells"])
    have = rng.randint(0, 10 if two_steps else 15)  # each single step is one that the base has seen
    question, solution = f"{name} has {have} {thing} .", ""
    for _ in range(1 + two_steps):
        change = rng.randint(1, 5)
        if rng.random() < 0.5 or change > have:
            question += f" {name} gets {change} more ."
            solution += f"{have} + {change} = {have + change} . "
            have += change
        else:
            question += f" {name} gives {change} away ."
            solution += f"{have} - {change} = {have - change} . "
            have -= change
    return {"question": f"{question} How many ?", "answer": f"{solution}The answer is {have}"}


def demo_base(texts: list[str], seed: int = 0):
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
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=1, bos_token_id=None)), tokenizer


def demo(seed: int = 0) -> Path:
    """Pretrain a base on one-step problems, adapt it to two-step ones, score, merge, switch off."""
    begin, folder = time.perf_counter(), Path("demo")
    written = (folder, Path("checkpoints/demo"), Path("runs/demo"), Path("runs/demo-base"))
    if any(old.exists() for old in written) and not (folder / "one-step-train.jsonl").exists():
        raise ValueError("--demo writes ./demo, checkpoints/demo and runs/demo, which exist and "
                         "are not the demo's: run it elsewhere")
    for old in written:
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir()
    rng, texts = random.Random(seed), []
    for name, two_steps, held_out in (("one-step", False, 200), ("two-step", True, 400)):
        problems = {}
        while len(problems) < 3000 + held_out:  # keyed by question: none is in both sets
            problem = demo_problem(rng, two_steps)
            problems[problem["question"]] = json.dumps(problem) + "\n"
            texts.append(f"{format_prompt(problem['question'])} {problem['answer']}")
        lines = list(problems.values())
        (folder / f"{name}-test.jsonl").write_text("".join(lines[:held_out]), encoding="utf8")
        (folder / f"{name}-train.jsonl").write_text("".join(lines[held_out:]), encoding="utf8")
    cpu = "--dtype float32 --device cpu"
    common = f"{cpu} --grad-accum 1 --dropout 0 --lr 3e-3 --seed {seed}"

    def headline(text, command=None):
        print(f"\n{text} ({time.perf_counter() - begin:.0f} s so far)")
        if command:
            print(f"python {command}", flush=True)

    headline("1. A base model is pretrained from scratch on one-step problems, by the same loop")
    args = parse_args("--data demo/one-step-train.jsonl --run-name demo-base --epochs 6 "
                      f"--batch-size 64 {common}".split())
    model, tokenizer = demo_base(texts, seed)
    train(model, encode(read_rows(args.data, "train"), tokenizer, 512), args)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    flags = ("--model demo/base --data demo/two-step-train.jsonl --run-name demo "
             f"--targets all-linear --epochs 3 --batch-size 32 {common}")
    headline("2. LoRA teaches it two-step problems", f"train_math.py {flags}")
    last = main(parse_args(flags.split()))

    flags = (f"--model demo/base --adapter {last} --data demo/two-step-test.jsonl "
             f"--save-merged demo/merged --batch-size 200 --max-new-tokens 40 {cpu}")
    headline("3. Base and adapter on held-out two-step problems; then merged",
             f"eval_gsm8k.py {flags}")
    eval_gsm8k.main(eval_gsm8k.parse_args(flags.split()))

    headline("4. The base's own task, with the adapter on and switched off")
    model, tokenizer = load_model("demo/base", torch.float32, torch.device("cpu"))
    load_adapter(model, last)
    rows = read_rows("demo/one-step-test.jsonl", "test")
    for switch, name in ((nullcontext(), "on "), (disable_lora(model), "off")):
        with switch:
            records = eval_gsm8k.answer(model, tokenizer, rows, 0, 200, 40)
        print(eval_gsm8k.describe(f"one-step, adapter {name}", eval_gsm8k.summarise(records)))
    print(f"data, base and merged model are in demo/, the adapter in {last}/, the loss in "
          f"runs/demo/metrics.jsonl; all in {time.perf_counter() - begin:.0f} s")
    return last


if __name__ == "__main__":
    run_script("train_math.py", main, parse_args)
