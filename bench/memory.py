"""What do larger models hold on a GPU, and is the peak that train_math.py predicts the run's?

    python bench/memory.py --shapes                               # two minutes; needs g++, no GPU
    python bench/memory.py --model DIR --data gsm8k_train.jsonl   # needs a CUDA GPU

--shapes counts the tensors alive in two steps of TinyLlama, Llama-3.2-3B and Llama-3-8B with fake
tensors, which have shape, dtype and device, but no data. An allocator adds fragments, CUDA half a
GiB. --model trains three steps of 8 rows; train_math.py predicts by trying the largest batch.
"""
import argparse
import ctypes
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LLAMA3 = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192)
SHAPES = {
    "TinyLlama-1.1B": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632,
                           num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
    "Llama-3.2-3B": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                         num_attention_heads=24, tie_word_embeddings=True, **LLAMA3),
    "Llama-3-8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, **LLAMA3)}
SETTINGS = ["", "--checkpoint-activations", "--targets all-linear --r 16", "--nf4",
            "--nf4 --checkpoint-activations", "--dtype float32",
            "--dtype float32 --checkpoint-activations"]


def parse_args():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", action="store_true", help="count larger models")
    add("--model", type=os.path.abspath, help="folder of the model")
    add("--data", type=os.path.abspath, help=".jsonl with question and answer")
    args = parser.parse_args()
    if not args.shapes and not (args.model and args.data):
        parser.error("give --shapes, or --model and --data")
    if args.shapes and shutil.which("g++") is None:
        parser.error("--shapes needs the compiler g++")
    return args


def pretend_cuda():
    """Compile and load fake_cuda.cpp. Call it before torch is imported."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    library = Path(tempfile.mkdtemp(), "fake_cuda.so")
    include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *include, f"-L{torch}/lib",
                    str(Path(__file__).with_name("fake_cuda.cpp")), "-o", str(library), "-lc10",
                    "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"], check=True)
    for path in (torch / "lib/libc10.so", torch / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def alive(shape, dtype, nf4, recompute, targets, r=16, length=512):
    """Return GiB of CUDA tensors alive: at rest, and at the peak of two steps of one row."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import LlamaConfig, LlamaForCausalLM
    from lora import LoRAConfig, NF4Linear, inject_lora, replace_modules
    from train_math import batch_loss, collate, recompute_blocks, use_attention

    class Live(TorchDispatchMode):
        now = peak = 0
        storages = {}

        def add(self, tensor):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    size = -(-storage.nbytes() // 512) * 512  # what the allocator rounds to
                    self.storages[storage._cdata] = size
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, storage._cdata)

        def free(self, key):
            self.now -= self.storages.pop(key)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **kwargs or {})
            for leaf in tree_leaves(output):
                self.add(leaf)
            return output

    torch.set_default_dtype(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).train()
        torch.set_default_dtype(torch.float32)
        if nf4:
            replace_modules(model, {layer: NF4Linear(layer) for layer in model.model.modules()
                                    if isinstance(layer, torch.nn.Linear)})
        inject_lora(model, LoRAConfig(r=r, dropout=0.05, targets=targets))
        use_attention(model)
        if recompute:
            recompute_blocks(model)
        live = Live()
        for tensor in [*model.parameters(), *model.buffers()]:
            live.add(tensor)
        rest = live.now
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        batch = collate([([5] * length, length // 5)], "cuda")
        with live:
            for _ in range(2):
                batch_loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
    return rest / 2**30, live.peak / 2**30


def shapes(args):
    import torch
    print("one row of 512 tokens, r=16; GiB alive at rest / at the peak; the card it fits")
    for (name, shape), nf4, recompute in itertools.product(SHAPES.items(), *[(False, True)] * 2):
        targets = "all-linear" if nf4 else ("q_proj", "v_proj")
        rest, peak = alive(shape, torch.float16, nf4, recompute, targets)
        card = next((size for size in (4, 8, 24) if peak + 0.5 < size), "more than 24")
        kind = "NF4, all-linear" if nf4 else "fp16, q and v"
        kept = "recomputed" if recompute else "kept"
        print(f"{name:16}{kind:17}{kept:12}{rest:6.2f} / {peak:5.2f}  {card}", flush=True)


def predictions(args):
    import torch
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device here")
    for flags in SETTINGS:
        with tempfile.TemporaryDirectory() as work:
            rows = "--nb-samples 24 --epochs 1 --batch-size 8 --grad-accum 1"
            command = [sys.executable, str(ROOT / "train_math.py"), "--model", args.model, "--data",
                       args.data, *rows.split(), "--no-checkpoint-activations", *flags.split()]
            done = subprocess.run(command, capture_output=True, text=True, cwd=work)
        found = re.search(r"(\S+) peak\n.*peak memory (.*) GiB\.", done.stdout, re.DOTALL)
        if not found:
            raise ValueError(f"train_math.py {flags} failed: {done.stderr[-500:]}")
        predicted, peak = map(float, found.groups())
        print(f"{flags or 'defaults':42} predicted {predicted:5.2f}  run {peak:5.2f} GiB  "
              f"{predicted / peak - 1:+.0%}", flush=True)


if __name__ == "__main__":
    args = parse_args()
    if args.shapes:
        pretend_cuda()
    from train_math import run_script  # imports torch
    run_script("memory.py", shapes if args.shapes else predictions, lambda: args)
