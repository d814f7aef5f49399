"""Every claim, as a test: python -m pytest -q. Tiny seeded models, nothing downloaded.

In the order of the files that are tested; what starts processes comes last.
"""
import argparse
import copy
import dataclasses
import gc
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from fractions import Fraction
from multiprocessing.pool import ApplyResult
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are no faster with more threads

import huggingface_hub
import numpy
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          LlamaConfig, LlamaForCausalLM, MambaConfig, OpenAIGPTConfig)
from transformers.pytorch_utils import Conv1D

import eval_gsm8k
import lora
import train_math
import train_sst2
from eval_gsm8k import (complete, encode_prompt, extract_answer, format_prompt, load_model,
                        mcnemar_p, read_rows, wilson_interval)
from lora import (
    NF4, LoRAConfig, LoRALinear, NF4Linear, adapter_state_dict, count_parameters, dequantize_nf4,
    disable_lora, inject_lora, load_adapter, lora_layers, merge_lora, quantize_nf4, save_adapter,
    strip_lora, unmerge_lora)
from train_math import (LossScaler, backward_loss, checkpoints, collate, demo_base, demo_problem,
                        encode, epoch_batches, learning_rate_at, newest_state, parse_args)
from train_sst2 import LossScaler as Sst2LossScaler

HERE = Path(__file__).parent
CPU = torch.device("cpu")
cases, quiet = pytest.mark.parametrize, pytest.mark.filterwarnings("ignore")
README = (Path(__file__).parent / "README.md").read_text(encoding="utf8")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, max_position_embeddings=40,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
HEAD = dict(targets=("query", "value"), also_train=("classifier",))


def make(kind, task=AutoModelForCausalLM, **options):
    torch.manual_seed(0)
    return task.from_config(AutoConfig.for_model(kind, **options)).eval()


def llama(**options):
    return make("llama", **SMALL | options)


def gpt2():
    return make("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)


def roberta():
    return make("roberta", AutoModelForSequenceClassification, **SMALL)


class SmallGPT(nn.Module):
    """A GPT of one's own: no transformers, no config, and names that are easily confused."""

    def __init__(self, seed=0, d=16):
        super().__init__()
        torch.manual_seed(seed)
        names = ("q_proj", "eq_proj", "v_proj", "mlp")
        self.embedding = nn.Embedding(64, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(d, d) for name in names}) for _ in range(2))
        self.lm_head = nn.Linear(d, 64)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            q, k, v = block["q_proj"](x), block["eq_proj"](x), block["v_proj"](x)
            x = x + block["mlp"](F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.lm_head(x)


def linear(kind, k, d):
    torch.manual_seed(0)
    layer = kind(k, d) if kind is nn.Linear else kind(d, k)
    nn.init.normal_(layer.bias)
    return layer


def in_dtype(model, dtype):
    if dtype == "nf4":
        quantize_nf4(model)
        return model
    return model.to(dtype)


def shake(model, scale=0.1):
    """Change everything that trains, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def injected(build, **options):
    """Return (model, config) with an adapter that does something."""
    model, config = build(), LoRAConfig(**{"r": 4, "alpha": 8} | options)
    inject_lora(model, config)
    shake(model)
    return model, config


def saved(folder, build=llama, **options):
    model, config = injected(build, **options)
    save_adapter(model, config, folder)
    return model, config


def train(model, steps, parameters=None):
    """Return the losses of some steps of AdamW on the parameters given, or on all that train."""
    losses, labels = [], IDS if hasattr(model, "lm_head") else torch.tensor([0, 1])
    parameters = parameters or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same_bits(a, b):
    return a.keys() == b.keys() and not changed(a, b)


def changed(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


def logits(model):
    with torch.no_grad():
        output = model(IDS)
    return getattr(output, "logits", output)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def saved_for_backward(function, but=()):
    """Return the bytes that function() keeps for backward, each tensor once, but not of these."""
    kept, others = {}, {tensor.untyped_storage().data_ptr() for tensor in but}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in kept.values())


def refused(match, call, *args, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder: an untrained base and one with tied embeddings, train.jsonl and test.jsonl."""
    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    problems = [demo_problem(rng, two_steps=i % 2 == 0) for i in range(80)]
    for name, part in (("train", problems[:64]), ("test", problems[64:])):
        lines = [json.dumps(problem) + "\n" for problem in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    texts = [f"{format_prompt(p['question'])} {p['answer']}" for p in problems]
    model, tokenizer = demo_base(texts)
    config = model.config.to_dict() | {"hidden_size": 32, "intermediate_size": 48,
                                       "num_hidden_layers": 2, "head_dim": 8}
    for name, tied in (("base", False), ("tied", True)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config | {"tie_word_embeddings": tied}))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(tiny):
    return load_model(str(tiny / "base"), torch.float32, CPU)


# --- the paper ---

@cases("dtype", DTYPES)
@cases("kind", [nn.Linear, Conv1D])
def test_zero_start_leaves_the_output_bit_identical(kind, dtype):
    """Step 0 must be the base, bit for bit (Sec. 4.1), with A and B in fp32 over any base."""
    base = linear(kind, 24, 16).to(dtype)
    x = torch.randn(5, 24).to(dtype)
    before = base(x)
    layer = LoRALinear(base, r=4, alpha=8)
    y = layer(x)
    assert torch.equal(y, before)
    assert 0.9 < layer.lora_A.abs().max() * math.sqrt(24) <= 1
    y.float().sum().backward()
    for parameter, shape in ((layer.lora_A, (4, 24)), (layer.lora_B, (16, 4))):
        assert parameter.shape == shape
        assert parameter.dtype == parameter.grad.dtype == torch.float32


@cases("rslora, scaling", [(False, 3), (True, 6)])
@cases("kind", [nn.Linear, Conv1D])
def test_forward_is_a_dense_layer_with_the_update_added(kind, rslora, scaling):
    """y must be (W0 + s B A) x + b (Eq. 3), with s = alpha / r, or alpha / sqrt(r) for rslora."""
    layer = LoRALinear(linear(kind, 24, 16), r=4, alpha=12, rslora=rslora)
    shake(layer, 1.0)
    update = scaling * (layer.lora_B @ layer.lora_A).detach()
    weight = layer.base.weight if kind is nn.Linear else layer.base.weight.T
    x = torch.randn(3, 5, 24)
    close(layer(x), F.linear(x, weight + update, layer.base.bias), atol=1e-4)


def test_gradients_are_the_closed_form():
    """For G = dL/dy: dB = s G^T x A^T, dA = s B^T G^T x, dx = G (W0 + s B A), none for W0."""
    layer = LoRALinear(linear(nn.Linear, 24, 16).double(), r=4, alpha=8)
    shake(layer)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    G = torch.randn(5, 16, dtype=torch.float64)
    (layer(x) * G).sum().backward()
    A, B, s = layer.lora_A.detach().double(), layer.lora_B.detach().double(), 2
    close(layer.lora_B.grad.double(), s * G.T @ x.detach() @ A.T)
    close(layer.lora_A.grad.double(), s * B.T @ G.T @ x.detach())
    close(x.grad, G @ (layer.base.weight + s * B @ A))
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_base_never_changes():
    """Training must move each A, B and named head, and no bit of the base (Sec. 4.2).

    Not even with an optimizer over all parameters, and gradients from before the injection.
    """
    model = roberta().train()
    model(IDS).logits.sum().backward()
    inject_lora(model, LoRAConfig(r=4, **HEAD))
    before = bits(model)
    train(model, 3, model.parameters())
    trained = {n for n in before if "lora_" in n or n.startswith("classifier.")}
    assert changed(bits(model), before) == trained == adapter_state_dict(model).keys()


@cases("build, target", [(llama, "v_proj"), (gpt2, "c_attn")])
@cases("dtype", [*DTYPES, "nf4"])
def test_merge_rounds_once_and_unmerge_restores_every_bit(build, target, dtype):
    """Merged W must be round(W0 + s B A), twice as once; unmerged, the base has its old bits."""
    model, _ = injected(lambda: in_dtype(build(), dtype), targets=target)
    before, unmerged, merged = bits(model), logits(model), {}
    layers = dict(lora_layers(model))
    biases = {layer: layer.bias for layer in layers.values() if layer.bias is not None}
    for name, layer in layers.items():
        update = 2 * layer.lora_B @ layer.lora_A
        update = update.T if build is gpt2 else update
        merged[name] = (layer.weight.float() + update).to(layer.weight.dtype)
    assert merge_lora(model) is model and merge_lora(model) is model
    assert same_bits({name: layer.weight for name, layer in layers.items()}, merged)
    for layer, bias in biases.items():  # its own: the waiting base moves to the CPU without it
        assert torch.equal(layer.bias, bias) and layer.bias.data_ptr() != bias.data_ptr()
    close(logits(model), unmerged, atol=1e-5 if dtype in (torch.float32, "nf4") else 0.1)
    assert unmerge_lora(model) is model and unmerge_lora(model) is model
    assert same_bits(bits(model), before) and torch.equal(logits(model), unmerged)
    with torch.autocast("cpu", torch.bfloat16):  # the sum stays fp32
        merge_lora(model)
    assert same_bits({name: layer.weight for name, layer in layers.items()}, merged)


def test_strip_leaves_plain_layers_and_the_original_keys(tmp_path):
    """Merged or not, the original keys must be back, and a trained head stay as trained."""
    model, _ = saved(tmp_path, roberta, **HEAD)
    adapted, head = logits(model), bits(model.classifier)
    assert strip_lora(merge_lora(model)) is model
    assert model.state_dict().keys() == roberta().state_dict().keys()
    close(logits(model), adapted)
    saved(tmp_path, roberta, targets="key")
    load_adapter(model, tmp_path)
    assert same_bits(bits(model.classifier), head)


def test_full_rank_reaches_any_delta():
    """At r = min(d, k), B A must represent any change of W (Sec. 4.1)."""
    layer, delta = LoRALinear(linear(nn.Linear, 24, 16), r=16, alpha=16), torch.randn(16, 24)
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    layer.lora_B.data, layer.lora_A.data = U * S, V
    close(layer.delta(), delta)


TINY = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            num_attention_heads=32, num_key_value_heads=4)
ROBERTA = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
TABLE_2 = dict(targets=("query", "value"), also_train=("classifier.out_proj",))
DISTILBERT = dict(targets=("q_lin", "v_lin"), also_train=("pre_classifier", "classifier"))


def gpt3():
    """The q and v of the paper's GPT-3."""
    blocks = [{n: nn.Linear(12288, 12288) for n in ("q_proj", "v_proj")} for _ in range(96)]
    return nn.ModuleList(nn.ModuleDict(block) for block in blocks)


@cases("kind, sizes, options, base, adapter, head", [
    ("llama", TINY, {}, 1_100_048_384, 1_126_400, 0),
    ("llama", TINY, dict(r=64, targets="all-linear"), 1_100_048_384, 50_462_720, 0),
    ("llama", {}, {}, 6_738_415_616, 4_194_304, 0),  # Llama-2-7B
    *(("roberta", ROBERTA, TABLE_2 | dict(r=r), 124_647_170, adapter, 1_538)
      for r, adapter in ((1, 36_864), (2, 73_728), (4, 147_456), (8, 294_912))),
    ("distilbert", {}, DISTILBERT, 67_102_466 - 147_456, 147_456, 739_586 - 147_456),
    ("gpt3", {}, dict(r=1), 192 * 12288 * 12289, 4_718_592, 0),
    ("gpt3", {}, {}, 192 * 12288 * 12289, 37_748_736, 0)])
def test_parameter_counts_of_the_published_models(kind, sizes, options, base, adapter, head):
    """Counts must be those of the papers and model cards (no weights: the meta device)."""
    task = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    with torch.device("meta"):
        model = gpt3() if kind == "gpt3" else make(kind, task, **sizes)
    assert count_parameters(model)[1] == base
    inject_lora(model, LoRAConfig(**options))
    assert count_parameters(model) == (adapter + head, base + adapter)


@quiet
@cases("build, options", [
    (llama, {}), (llama, dict(rslora=True)), (gpt2, dict(targets=("c_attn",))), (roberta, HEAD)])
def test_training_curve_equals_peft_s(build, options, tmp_path):
    """20 AdamW steps must give PEFT's losses within 1e-4; each loads the other's file."""
    peft = pytest.importorskip("peft")
    model, config = build(), LoRAConfig(r=4, alpha=8, **options)
    inject_lora(model, config)
    save_adapter(model, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    losses = train(model, 20)
    assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(train(theirs.eval(), 20), abs=1e-4)

    save_adapter(model, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    close(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path)
    again = build()
    assert load_adapter(again, tmp_path).scaling == config.scaling
    close(logits(again), logits(model))


@cases("part", ["whole", "core"])
def test_the_readme_s_lines_adapt_a_gpt_of_one_s_own(part, tmp_path, monkeypatch):
    """The README's snippet must train, save and merge one, also without lora.py's appendix."""
    monkeypatch.chdir(tmp_path)
    source = Path(lora.__file__).read_text(encoding="utf8")
    if part == "core":
        source, rule, _ = source.partition("# --- appendix: a 4-bit base (NF4) ---\n")
        assert rule and "nf4" not in source.split('"""', 2)[2].lower()
    Path("copied.py").write_text(source, encoding="utf8")
    spec = importlib.util.spec_from_file_location("copied", "copied.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    monkeypatch.setitem(sys.modules, "lora", copied)
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    snippet = next(snippet for snippet in snippets if "inject_lora" in snippet)
    losses = []

    def loss_of(model, batch):
        losses.append(F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:]))
        return losses[-1]

    scope = {"MyModel": SmallGPT, "batches": [IDS] * 60, "loss_of": loss_of}
    exec(snippet, scope)
    close(loss_of(scope["model"], IDS), losses[59], atol=0.1)
    assert losses[59] < losses[0] - 0.2
    assert scope["model"].state_dict().keys() == SmallGPT().state_dict().keys()


# --- injection ---

@cases("bad", [
    dict(r=0), dict(r=1.5), dict(alpha=0), dict(alpha=math.nan), dict(alpha=10**400),
    dict(dropout=1.0), dict(dropout=-0.1), dict(targets=()), dict(rslora="false")])
def test_config_refuses_values_out_of_range(bad):
    """A bad value must be a ValueError that names the field."""
    refused(next(iter(bad)), lambda: LoRAConfig(**bad))


def test_targets_match_whole_names():
    """q_proj must not match eq_proj; all-linear is all but the output head and also_train."""
    def names(build, targets, also_train=()):
        return inject_lora(build(), LoRAConfig(targets=targets, also_train=also_train))

    first = [f"blocks.0.{name}" for name in ("q_proj", "eq_proj", "v_proj", "mlp")]
    assert names(SmallGPT, ["q_proj"]) == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert names(SmallGPT, "0.q_proj") == ["blocks.0.q_proj"]
    assert names(SmallGPT, ["all-linear"], "blocks.1") == first
    sizes = [len(names(build, "all-linear")) for build in (llama, gpt2)]
    assert [*sizes, len(names(roberta, "all-linear", "classifier"))] == [14, 8, 12]


def test_a_name_without_match_lists_what_exists():
    """A misspelt name must be an error with the names there are, the model untouched."""
    model = SmallGPT()
    refused("'q_porj' matches.*: eq_proj, lm_head, mlp, q_proj, v_proj",
            inject_lora, model, LoRAConfig(targets=("q_proj", "q_porj")))
    refused("'head' matches", inject_lora, model, LoRAConfig(also_train="head"))
    refused("no linear layer", inject_lora, nn.Linear(8, 8), LoRAConfig(targets="all-linear"))
    assert same_bits(bits(model), bits(SmallGPT()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject_lora(model, LoRAConfig())
    refused("strip_lora", inject_lora, model, LoRAConfig())


@cases("device", ["cpu", "meta"])
def test_a_tied_weight_is_refused(device, tmp_path):
    """Training a head that is the embedding too would change both: refused in either role."""
    with torch.device(device):
        model = llama(tie_word_embeddings=True)
    model.tie_weights()
    for config in (LoRAConfig(targets=("q_proj", "lm_head")), LoRAConfig(also_train="lm_head")):
        refused("lm_head shares a weight", inject_lora, model, config)
    saved(tmp_path, targets="lm_head")
    refused("lm_head shares a weight", load_adapter, model, tmp_path)
    assert not list(lora_layers(model))


def test_a_module_under_two_names_stays_one():
    """One layer standing in two places must be adapted in both, and stripped in both."""
    model = SmallGPT()
    first, second = model.blocks
    second["q_proj"] = layer = first["q_proj"]
    inject_lora(model, LoRAConfig(targets="q_proj"))
    assert second["q_proj"] is first["q_proj"] is not layer
    strip_lora(model)
    assert second["q_proj"] is first["q_proj"] is layer


def test_what_only_looks_linear_is_left_alone():
    """Nor may layers be adapted that are read but never called, as in torch's attention."""
    conv = type("Conv1D", (nn.Conv1d,), {})(8, 8, 3)  # not that of transformers
    transposed = nn.Embedding(8, 4)  # stands for a layer of somebody's own, (in, out)
    transposed.in_features, transposed.out_features = 8, 4
    empty = type("Conv1D", (nn.Module,), {})()  # without a weight of its own
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(conv, transposed, empty, nn.Identity(), encoder, nn.Linear(4, 4))
    for name in ("0", "1", "2", "3", "out_proj", "linear1"):
        refused(f"'{name}' matches no layer", inject_lora, model, LoRAConfig(targets=name))
    assert inject_lora(model, LoRAConfig(targets="all-linear")) == ["5"]


EXPERTS = SMALL | dict(num_local_experts=2, intermediate_size_mlp=48, head_dim=8)


@cases("kind", ["phimoe", "llama4_text"])
def test_all_linear_leaves_out_routers(kind):
    """Routers return tuples: all-linear must train without them, a named one must say so."""
    model = make(kind, **EXPERTS)
    names = inject_lora(model, LoRAConfig(r=2, targets="all-linear"))
    assert len(names) >= 8 and not any("router" in name for name in names)
    train(model, 1)
    inject_lora(strip_lora(model), LoRAConfig(targets="router"))
    refused("Router returns no tensor.*target", model, IDS)


@cases("kind", ["Linear8bitLt", "Linear4bit"])
def test_layers_that_bitsandbytes_quantised_train(kind, tmp_path):
    """all-linear must adapt them; merging must say that it cannot, and merge none."""
    layers = pytest.importorskip("bitsandbytes").nn
    options = dict(has_fp16_weights=False) if kind == "Linear8bitLt" else {}
    model = nn.Sequential(nn.Linear(32, 32), getattr(layers, kind)(32, 32, **options)).to("cpu")
    config = LoRAConfig(r=2, targets="all-linear")
    assert inject_lora(model, config) == ["0", "1"]
    model(torch.randn(16, 32)).square().mean().backward()
    assert all(layer.lora_B.grad.any() for layer in model)
    save_adapter(model, config, tmp_path)
    refused(f"cannot merge into this {kind}", merge_lora, model)
    assert not model[0].merged


def test_wrappers_come_after_injection(tmp_path):
    """Inside DDP, adapters would not be synchronised: refused; saving from inside must work."""
    model, config = saved(tmp_path)
    before = load_file(tmp_path / WEIGHTS), (tmp_path / CONFIG).read_bytes()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel = nn.DataParallel, nn.parallel.DistributedDataParallel
    for wrap in parallel:
        refused("first, then wrap", inject_lora, wrap(llama()), config)
        refused("first, then wrap", load_adapter, nn.Sequential(wrap(llama())), tmp_path)
    for wrap in (*parallel, torch.compile):
        save_adapter(wrap(model), config, tmp_path)
        assert same_bits(load_file(tmp_path / WEIGHTS), before[0])
        assert (tmp_path / CONFIG).read_bytes() == before[1]
    torch.distributed.destroy_process_group()
    load_adapter(torch.compile(model), tmp_path)


@cases("dtype", [torch.float32, "nf4"])
@cases("cast", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16)])
def test_a_cast_keeps_the_adapter_in_float32_and_the_codes(cast, dtype):
    """A cast after injection must cast the base alone: each bit of A, B and NF4's codes stays."""
    model, _ = injected(lambda: in_dtype(llama(), dtype))
    before = bits(model)
    half = cast(model).model.embed_tokens.weight.dtype
    after = bits(model)
    for name in before:
        if name.endswith((".lora_A", ".lora_B", ".codes", ".absmax")):
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name])
    for merged in (model, merge_lora(model)):
        assert {layer.weight.dtype for _, layer in lora_layers(merged)} == {half}
        assert logits(merged).dtype == half


@cases("strict", [True, False])
def test_a_plain_checkpoint_loads_into_an_adapted_model(strict):
    """Injected too early: plain names must reach the base, strict or not, and leave A and B."""
    plain, (model, _) = SmallGPT(seed=1).state_dict(), injected(SmallGPT)
    before, own = adapter_state_dict(model), copy.deepcopy(model.state_dict())
    model.load_state_dict(plain, strict=strict)
    assert same_bits(adapter_state_dict(model), before)
    shake(model)
    assert changed(adapter_state_dict(model), before) == before.keys()  # before holds copies
    model.load_state_dict(own, strict=strict)
    assert same_bits(model.state_dict(), own)
    model.load_state_dict(plain, strict=strict)
    with pytest.raises(RuntimeError, match="blocks.1.v_proj.*bias"):
        model.load_state_dict({n: plain[n] for n in plain if n != "blocks.1.v_proj.bias"})
    assert same_bits(strip_lora(model).state_dict(), plain)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    """Dropout must leave W0 x alone, keep the update's mean, and do nothing in eval."""
    model = nn.Sequential(linear(nn.Linear, 64, 4))
    inject_lora(model, LoRAConfig(r=4, alpha=4, dropout=0.5, targets="0"))
    layer, x = model[0], torch.randn(1, 64)
    assert torch.equal(layer(x), layer.base(x))  # B = 0, whatever is dropped
    shake(model)
    dense = F.linear(x, layer.base.weight + layer.delta(), layer.base.bias)
    close(layer.eval()(x), dense)
    outputs = layer.train()(x.expand(20000, 64))
    assert outputs.std(0).min() > 0.05
    close(outputs.mean(0), dense[0], atol=0.05)


# --- merged, switched off, copied, saved for backward ---

def test_a_merged_model_is_not_saved_loaded_or_switched_off(tmp_path):
    """Each would lose the adapter or apply it twice: RuntimeError with the cure."""
    model, config = injected(llama)
    state = model.state_dict()
    merge_lora(model)
    for call, *args in ((save_adapter, model, config, tmp_path), (model.state_dict,),
                        (model.load_state_dict, state), (disable_lora(model).__enter__,)):
        refused("unmerge_lora", call, *args, error=RuntimeError)


def test_a_merge_that_fails_leaves_nothing_merged():
    """No adapter, the meta device and computed weights must be clear errors."""
    computed = SmallGPT()
    nn.utils.parametrizations.weight_norm(computed.blocks[1]["q_proj"])
    for model in (computed, llama().to("meta")):
        for call in (merge_lora, unmerge_lora, lambda m: disable_lora(m).__enter__()):
            refused("no adapter.*inject_lora", call, model)
        inject_lora(model, LoRAConfig(targets="q_proj"))
        refused("cannot merge into this", merge_lora, model)
        assert not any(layer.merged for _, layer in lora_layers(model))


def test_a_merged_layer_follows_casts_and_a_forward_of_its_own():
    """Libraries bind forward to a layer: the dense copy must run its own, not the old layer's."""
    model, _ = injected(SmallGPT)
    for _, layer in lora_layers(model):
        layer.base.forward = layer.base.forward
    adapted = logits(model)
    assert not torch.equal(adapted, logits(SmallGPT()))
    close(logits(merge_lora(model)), adapted)
    unmerge_lora(model.bfloat16())
    close(logits(model).float(), adapted, atol=0.1)


def test_disable_is_the_base_also_after_an_exception():
    """Inside, the output must be the base's; after it, also after an error, the adapter's."""
    model, _ = injected(llama)
    adapted = logits(model)
    with pytest.raises(KeyError), disable_lora(model):
        with disable_lora(model):
            pass
        assert torch.equal(logits(model), logits(llama()))
        refused("disable_lora", merge_lora, model, error=RuntimeError)
        raise KeyError
    assert torch.equal(logits(model), adapted)
    assert not torch.equal(logits(llama()), adapted)


@cases("merge", [False, True])
@cases("dtype", [torch.float32, "nf4"])
def test_compiled_copied_and_pickled_models_agree(dtype, merge):
    """Each must give the same output; unmerging or training a copy must not touch the model."""
    model, _ = injected(lambda: in_dtype(SmallGPT().eval(), dtype), dropout=0.5)
    unmerged = logits(model)
    if merge:
        merge_lora(model)
    adapted = logits(model)
    close(logits(torch.compile(model, backend="eager")), adapted)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), adapted)
        assert torch.equal(logits(unmerge_lora(twin)), unmerged)
        shake(twin)
        assert torch.equal(logits(model), adapted)


@cases("wrap", [lambda layer: layer, NF4Linear])
def test_an_adapted_layer_keeps_its_input_once(wrap):
    """For backward it may keep x, once, and tensors of the rank's size: nothing d wide."""
    layer = LoRALinear(wrap(nn.Linear(96, 80).bfloat16()), r=4, alpha=8).train()
    x = torch.randn(50, 96).bfloat16().requires_grad_()
    kept = saved_for_backward(lambda: layer(x), but=[*layer.parameters(), *layer.buffers()])
    of_rank_size = 2 * 4 * (2 * 50 + 96 + 80)  # z, scaled z, A and B in bf16
    assert x.nbytes <= kept <= x.nbytes + of_rank_size


def test_a_checkpointed_layer_does_not_run_its_base_again():
    """Backward does not need W0 x: recomputing must stop before it."""
    layer, x = LoRALinear(nn.Linear(32, 16), r=4, alpha=8), torch.randn(5, 32, requires_grad=True)
    calls = []
    layer.base.register_forward_hook(lambda *_: calls.append(1))
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.lora_B.grad is not None and len(calls) == 1


# --- adapter files ---

NUMPY = dict(r=numpy.int64(2), alpha=numpy.float32(4), dropout=numpy.float32(0.5))


@cases("build, first, second", [
    (llama, {}, dict(targets="all-linear", rslora=True)), (roberta, HEAD, dict(targets="dense")),
    (gpt2, dict(targets=("c_attn", "c_fc")), dict(targets="c_proj")),
    (lambda: SmallGPT().eval(), NUMPY, dict(targets="0.q_proj")),
    (SmallGPT, dict(targets="all-linear", also_train="lm_head"), dict(targets="mlp"))])
def test_a_loaded_adapter_is_exact_and_replaces_any_other(build, first, second, tmp_path):
    """Bits and config must come back, also in place of a merged one; heads go back to the start."""
    folders = [tmp_path / "first", tmp_path / "second"]
    both = [saved(folder, build, **o) for folder, o in zip(folders, (first, second))]
    model = build()
    for folder, (wanted, config) in zip(folders * 2, both * 2):
        loaded = load_adapter(model, folder)
        assert dataclasses.replace(loaded, targets=config.targets) == config
        assert same_bits(adapter_state_dict(model), adapter_state_dict(wanted))
        assert torch.equal(logits(model), logits(wanted))
        merge_lora(model)
    assert same_bits(bits(strip_lora(unmerge_lora(model))), bits(build()))
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    options = json.loads((folder / CONFIG).read_text())
    assert not any("-" in name for name in options["target_modules"])
    assert options["fan_in_fan_out"] == (build is gpt2)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    CONFIG: lambda f: (f / CONFIG).unlink(),
    WEIGHTS: lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
    "LORA": lambda f: edit_config(f, peft_type="IA3"),
    "r is '8'": lambda f: edit_config(f, r="8"),
    r"\(4, 32\).*expected \(8, 32\)": lambda f: edit_config(f, r=8),
    "k_proj.*missing": lambda f: edit_config(f, target_modules=["q_proj", "k_proj", "v_proj"]),
    "surprise.*no such": lambda f: edit_tensors(f, lambda t: t.update(surprise=t[KEY] + 1)),
    "NaN": lambda f: edit_tensors(f, lambda t: t[KEY].fill_(math.inf)),
    "int64": lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].long()})),
    "finite": lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].double() * 1e99}))}


@cases("message", BROKEN)
def test_a_broken_adapter_is_refused(message, tmp_path):
    """Each way to be broken must be one line that says so; another adapter stays as it was."""
    saved(tmp_path)
    BROKEN[message](tmp_path)
    model, _ = injected(llama, r=2, targets="o_proj")
    before = bits(model)
    refused(f"no adapter for this model.*{message}", load_adapter, model, tmp_path)
    assert same_bits(bits(model), before)


VALUES = [None, True, 0, 1, -1, 3.5, 1e308, 10**400, math.nan, "", "q_proj", "x" * 10000, [], [1],
          ["q_proj"], [["q_proj"]], {}, {"q_proj": 4}]
SAMPLES = ["", "null", "1", f"[{10**400}]", "[[1], [2]]", '"x"', "[" * 9999]


def mutant(weights, config, rng):
    """Return both files with one change: a bit, a cut, an option, the shape of an entry."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header, options = json.loads(weights[8:end]), json.loads(config)
    kind, cut = rng.randrange(5), rng.random()
    if kind == 0:  # the header, the tensors or the config
        parts = [bytearray(part) for part in (weights[:end], weights[end:], config)]
        part = rng.choice(parts)
        part[int(cut * len(part))] ^= 1 << rng.randrange(8)
        return bytes(parts[0] + parts[1]), bytes(parts[2])
    if kind == 1:
        weights = weights[:int(cut * len(weights))]
    elif kind == 2:
        config = config[:int(cut * len(config))]
    elif kind == 3:
        name = rng.choice([*options, "use_dora", "exclude_modules", "nosuch"])
        options[name] = rng.choice(VALUES)
        config = json.dumps(options).encode()
    else:
        entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
        entry[rng.choice(["shape", "data_offsets"])] = rng.choices([0, 4, 16, 64, -1, 2**63], k=2)
        header["__metadata__"] = {"base": rng.choice(SAMPLES)}
        text = json.dumps(header).encode()
        weights = len(text).to_bytes(8, "little") + text + weights[end:]
    return weights, config


@quiet
def test_mutated_adapters_load_exactly_or_leave_the_model_alone(tmp_path):
    """Of 1,000 each must load to the bit what it says, or be refused with the model as it was."""
    saved(tmp_path, SmallGPT)
    whole = (tmp_path / WEIGHTS).read_bytes(), (tmp_path / CONFIG).read_bytes()
    models, rng, loaded = (SmallGPT(), injected(SmallGPT, targets="mlp")[0]), random.Random(0), 0
    for i in range(1000):
        weights, config = mutant(*whole, rng)
        (tmp_path / WEIGHTS).write_bytes(weights)
        (tmp_path / CONFIG).write_bytes(config)
        model = copy.deepcopy(models[i % 2])
        try:
            read = load_adapter(model, tmp_path)
        except ValueError as error:
            assert same_bits(bits(model), bits(models[i % 2])), f"{i}: {error}"
            assert "\n" not in str(error), i
            continue
        loaded += 1
        options, tensors = json.loads(config), load_file(tmp_path / WEIGHTS)
        assert (read.r, read.alpha) == (options["r"], options["lora_alpha"])
        for key, tensor in adapter_state_dict(model).items():
            assert torch.equal(tensor, tensors.pop(f"base_model.model.{key}.weight")), i
        assert not tensors and same_bits(bits(strip_lora(model)), bits(models[0])), i
    assert 100 < loaded < 500


@cases("here", [*DTYPES, "nf4"])
def test_another_base_warns_and_another_dtype_does_not(here, tmp_path):
    """The sample of the base must tell another seed; A and B are fp32 over any, from bf16 too."""
    saved(tmp_path, lambda: in_dtype(SmallGPT(), here))
    if here == torch.bfloat16:
        sample = dict(safetensors.safe_open(tmp_path / WEIGHTS, "pt").metadata())
        tensors = {key: t.bfloat16() for key, t in load_file(tmp_path / WEIGHTS).items()}
        save_file(tensors, tmp_path / WEIGHTS, sample)
    for there in (*DTYPES, "nf4"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_adapter(model := in_dtype(SmallGPT(), there), tmp_path)
        assert {t.dtype for t in adapter_state_dict(model).values()} == {torch.float32}
        with pytest.warns(UserWarning, match="another base"):
            load_adapter(in_dtype(SmallGPT(seed=1), there), tmp_path)


def test_saving_refuses_what_would_not_load_again(tmp_path):
    """Another config, NaN and a weight unfrozen by hand must raise, and leave the old file."""
    model, config = saved(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    refused("was injected", save_adapter, model, LoRAConfig(r=4, alpha=16), tmp_path)
    norm = model.model.norm.requires_grad_(True)
    refused("model.norm.weight trains.*also_train", save_adapter, model, config, tmp_path)
    norm.requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.lora_A.data[0, 0] = math.nan
    refused("layers.1.self_attn.q_proj.lora_A.* NaN", save_adapter, model, config, tmp_path)
    refused("no adapter", save_adapter, llama(), config, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))  # its statistics: in no file
    refused("1 has buffers", inject_lora, model, LoRAConfig(targets="0", also_train="1"))


def test_an_interrupted_save_leaves_no_mixed_adapter(tmp_path, monkeypatch):
    """New weights beside an old config must not be left: without a config nothing loads."""
    (model, config), replace = saved(tmp_path), os.replace

    def interrupted(part, place):
        if place.name == CONFIG:
            raise KeyboardInterrupt
        replace(part, place)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, config, tmp_path)
    refused(CONFIG, load_adapter, model, tmp_path)


@quiet
@cases("build, options", [
    (llama, dict(target_modules=r".*layers\.1\..*\.(q|v)_proj", use_rslora=True)),
    (llama, dict(target_modules="all-linear")),
    (llama, dict(target_modules=["q_proj", "nosuch"], layers_to_transform=0)),
    (llama, dict(target_modules=["q_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"])),
    (llama, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    (llama, dict(target_modules=["q_proj", "lm_head"])),
    (gpt2, dict(target_modules=["c_attn", "nosuch"], fan_in_fan_out=True)),
    (roberta, dict(target_modules=["query"], task_type="SEQ_CLS"))])
def test_adapters_that_peft_made_load_and_agree(build, options, tmp_path):
    """Logits must be PEFT's within 1e-5, however its config names layers and modules."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=8, **options)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    model = build()
    save_adapter(model, load_adapter(model, tmp_path), tmp_path / "ours")
    load_adapter(model, tmp_path / "ours")
    close(logits(model), logits(theirs))
    if "lm_head" in options["target_modules"]:
        model, _ = injected(build, also_train="lm_head")  # goes back to the head it had
        load_adapter(model, tmp_path)
        close(logits(model), logits(theirs))
        base = "base_model.model.lm_head.base_layer.weight"
        edit_tensors(tmp_path, lambda t: t[base].add_(1))
        refused("another base weight for lm_head", load_adapter, model, tmp_path)


def test_every_option_of_peft_is_honoured_harmless_or_refused(tmp_path):
    """What makes another kind of adapter must be refused by name; an unknown option must warn."""
    peft = pytest.importorskip("peft")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert known <= lora.ACCEPTED | lora.REFUSED and len(lora.REFUSED) >= 17
    assert not lora.ACCEPTED & lora.REFUSED
    model, _ = saved(tmp_path)
    for option in lora.REFUSED:
        edit_config(tmp_path, **{option: {"q_proj": 1}})
        refused(f"{option} = .*PEFT", load_adapter, model, tmp_path)
        edit_config(tmp_path, **{option: None})
    for start in ("pissa", "olora", "loftq", "corda", "lora_ga"):
        edit_config(tmp_path, init_lora_weights=start)
        refused(f"init_lora_weights = '{start}'", load_adapter, model, tmp_path)
    edit_config(tmp_path, init_lora_weights="gaussian", nosuch=1)
    with pytest.warns(UserWarning, match="nosuch = 1.*unknown"):
        load_adapter(model, tmp_path)


# --- a 4-bit base ---

def packed(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return NF4Linear(layer)


@cases("shape", [(8, 128), (13, 7), (1, 1), (300, 70), (512, 64)])
def test_nf4_error_is_within_half_a_gap(shape):
    """Each value must be its block's nearest, and absmax rounded by 1/256 at most."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-9, 4, shape[0])[:, None]
    weight[0] = 0
    layer = packed(weight)
    blocks, back = (F.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
                    for w in (weight, layer.weight))
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = blocks / absmax.clamp(min=1e-30)
    nearest = (scaled[..., None] - torch.tensor(NF4)).abs().amin(-1)
    assert nearest.max() < 0.152  # half the widest gap, from -1 to -0.696
    assert ((back - blocks).abs() <= (nearest + 1 / 256) * absmax).all()
    if shape == (8, 128):
        assert (layer.codes[:64] == 0x77).all()  # row 0: code 7 is the exact 0
    if shape == (512, 64):
        assert sum(8 * b.nbytes for b in layer.buffers()) / weight.numel() <= 4.26


def test_nf4_codes_agree_with_bitsandbytes():
    """The packed bytes must be bitsandbytes', and the values as close as absmax is rounded."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = 0.02 * torch.randn(256, 320, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = packed(weight)
    assert torch.equal(codes.flatten(), layer.codes)
    close(layer.weight, functional.dequantize_4bit(codes, state), atol=3e-4)


@cases("dtype", DTYPES)
@cases("kind", [nn.Linear, Conv1D])
def test_nf4_computes_and_differentiates_like_the_dense_layer(kind, dtype):
    """Output and dL/dx must be those of a dense layer with the dequantised weight."""
    base = linear(kind, 40, 24).to(dtype).eval()
    layer = NF4Linear(base)
    dense = layer.to_dense()
    assert not layer.training and not dense.training
    assert type(dense) is kind and dense.weight.shape == base.weight.shape
    x = torch.randn(3, 5, 40, dtype=dtype, requires_grad=True)
    assert torch.equal(layer(x), dense(x))
    gradient = torch.randn(3, 5, 24, dtype=dtype)
    gradients = [torch.autograd.grad(net(x), x, gradient)[0] for net in (layer, dense)]
    close(*gradients, atol=1e-6 if dtype == torch.float32 else 1e-2)


class Integers(TorchDispatchMode):
    """Note the largest integer tensor that any operation makes, in bytes."""
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        if not output.is_floating_point():
            self.largest = max(self.largest, output.nbytes)
        return output


def test_nf4_keeps_nothing_and_its_index_is_small():
    """Backward must find no weight kept, and no integers above 2 bytes a weight be made."""
    layer, x = packed(torch.randn(64, 128)), torch.randn(2, 128, requires_grad=True)
    assert saved_for_backward(lambda: layer(x)) == 0
    y = layer(x)
    tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    assert not any(tensor.shape == (64, 128) for tensor in tensors)
    with Integers() as integers:
        y.sum().backward()
    assert 0 < integers.largest <= 2 * 64 * 128


@cases("build", [llama, gpt2])
def test_lora_over_nf4_trains_and_goes_back(build, tmp_path):
    """QLoRA: only A and B move; loading works while merged and over a dense base."""
    model, config = build(), LoRAConfig(r=4, targets="all-linear")
    names, base = quantize_nf4(model), logits(model)
    assert count_parameters(model)[1] == count_parameters(build())[1]
    assert inject_lora(model, config) == names == inject_lora(build(), config)
    before, losses = bits(model), train(model, 20)
    answer, trained = logits(model), bits(model)
    assert losses[-1] < losses[0] - 0.5
    assert changed(trained, before) == adapter_state_dict(model).keys()
    save_adapter(model, config, tmp_path)
    load_adapter(build(), tmp_path)
    load_adapter(merge_lora(model), tmp_path)
    assert torch.equal(logits(model), answer) and same_bits(bits(model), trained)
    plain = strip_lora(merge_lora(copy.deepcopy(model)))
    close(logits(plain), answer)
    dequantize_nf4(strip_lora(model))
    assert torch.equal(logits(model), base)
    shapes = {name: t.shape for name, t in build().state_dict().items()}
    for dense in (plain, model):
        assert {name: t.shape for name, t in dense.state_dict().items()} == shapes


def test_quantising_leaves_what_it_must():
    """The head and skip stay dense; tied layers and other kinds stay so with a warning."""
    model = llama()
    assert len(quantize_nf4(model, ("q_proj",))) == 12
    assert quantize_nf4(model, ()) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    inject_lora(model, LoRAConfig())
    refused("quantise first", quantize_nf4, model)
    refused("buffers", inject_lora, in_dtype(roberta(), "nf4"), LoRAConfig(**HEAD))
    own, damaged = type("Own", (nn.Linear,), {})(8, 8), nn.Linear(8, 8)
    damaged.weight.data[3, 3] = math.nan
    layers = nn.Sequential(own, damaged, nn.Linear(8, 8, device="meta"),
                           nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    layers[3].weight = layers[4].weight
    with pytest.warns(UserWarning) as caught:
        assert quantize_nf4(layers) == ["5"]
    for i, reason in enumerate(("Own", "finite", "on meta", "shares a weight", "shares a weight")):
        assert str(caught[i].message).startswith(f"{i} stays dense: ")
        assert reason in str(caught[i].message)
    with pytest.warns(UserWarning):
        refused("no linear layer to quantise", quantize_nf4, layers[:3])


# --- eval_gsm8k.py: helpers ---

def lively(model, std=0.5):
    """Larger weights: an untrained model then does not repeat one word."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.detach().normal_(std=std)
    return model


def evaluation(tiny, *flags):
    common = ["--model", tiny / "base", "--data", tiny / "test.jsonl", "--max-new-tokens", "8",
              "--dtype", "float32", "--device", "cpu"]
    return [str(flag) for flag in [*common, *flags]]


def evaluate(tiny, *flags):
    eval_gsm8k.main(eval_gsm8k.parse_args(evaluation(tiny, *flags)))


def records_of(name):
    return [json.loads(line) for line in open(f"eval_results/{name}-test.jsonl")]


# --- eval_gsm8k.py: prompt and answer ---

@cases("text, answers", [
    ("#### 1,234", "1234"), ("The answer is: $29.00.", "29"), ("#### -$5", "-5"),
    ("#### .5", "1/2"), ("#### \u22125", "-5"), ("#### 3/1.5", "2"), ("#### 1/0.0", "1"),
    (r"The answer is: \boxed{18}", "18"), (r"The answer is -\frac{3}{4}", "-3/4"),
    ("So the answer is 3. The answer is 4.", "4"), ("The answer is:\n1,2 and 3", "1"),
    ("#### 7\nThe answer is: 8\n\nQuestion: next\nAnswer: The answer is 9", "8"),
    ("#### none\n#### 5,0123", "5 5"), ("#### 10\n#### 11", "10 11"), ("#### none\n5", "- 5"),
    ("10-5=5 and 20-30", "- 30"), ("it is -3.", "- -3"), ("Question: #### 5", "-")])
def test_strict_answers_need_a_marker_and_flexible_ones_do_not(text, answers):
    """A number behind a marker must win. Flexible, the last one counts where there is none."""
    wanted = [None if word == "-" else Fraction(word) for word in answers.split() * 2]
    assert [extract_answer(text), extract_answer(text, flexible=True)] == wanted[:2]


def test_numbers_of_any_length_compare_exactly():
    """No digit may be rounded away, before or behind the point; thousands must be written too."""
    long = "9" * 40
    assert extract_answer(f"#### {long}") == int(long) != extract_answer(f"#### {long[:-1]}8")
    assert extract_answer(f"#### -0.{long}") != extract_answer(f"#### -0.{long}1")
    assert str(extract_answer("#### 1/" + "7" * 5000)) == "1/" + "7" * 5000


def harness(text, flexible):
    """The two published filters of lm-evaluation-harness's gsm8k task, and its exact_match."""
    pattern = r"(-?[$0-9.,]{2,})|(-?[0-9]+)" if flexible else r"#### (\-?[0-9\.\,]+)"
    found = [match[match.lastindex] for match in re.finditer(pattern, text)] or ["[invalid]"]
    answer = found[-1 if flexible else 0].strip()
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


def test_scores_equal_lm_evaluation_harness():
    """On completions that end in "#### n" both modes must score as the two published filters."""
    endings = ["18", "-5", "1,080", "0.5", "12,345,678.25", "7", "18."]
    for steps in ("", "He pays $1,250.50 for 3-4 of 12. ", "48/2 = 24 clips, 50%. x = -3; y = .5 ",
                  "First #### 7\nno, ", "#### none so far, -8 ", "10-5=5... 1/2 of 18 is 9.\n",
                  "\u00bd and 3\u00b2, $5 each; "):
        for ending, other, mode in itertools.product(endings, endings, (False, True)):
            text, reference = f"{steps}so\n#### {ending}", f"#### {other}"
            same = extract_answer(text, mode) == extract_answer(reference)
            assert same == (harness(text, mode) == harness(reference, False)), (text, other, mode)


def test_prompt_has_bos_once_and_never_eos():
    """An EOS at the end of the prompt would end it before the answer."""
    def tokenizer(text):
        return SimpleNamespace(input_ids=[1, *map(ord, text), 2])
    tokenizer.eos_token_id = 2
    assert encode_prompt(tokenizer, "ab") == [1, 97, 98]


# --- eval_gsm8k.py: data ---

def test_rows_of_all_schemas_and_kinds_of_file(workdir):
    """MetaMathQA, GSM8K and Alpaca rows must come out as question and answer, text as text."""
    for row, wanted in (({"query": "2024-01-01", "response": "r"}, ("2024-01-01", "r")),
                        ({"question": "q", "answer": "r\u2028s"}, ("q", "r\u2028s")),
                        ({"instruction": "do", "input": "it", "output": "so"}, ("do\nit", "so"))):
        Path("x.jsonl").write_text((json.dumps(row, ensure_ascii=False) + "\r\n") * 3)
        Path("x.json").write_text(json.dumps([row, row]))
        assert read_rows("x.jsonl", "train", 2) == read_rows("x.json", "train") == [wanted] * 2
    Path("x.csv").write_text('\ufeffquestion,answer\nhow many?,2\nNA,"b,\nc"\n', encoding="utf8")
    assert read_rows("x.csv", "train") == [("how many?", "2"), ("NA", "b,\nc")]
    from pyarrow import parquet, table
    parquet.write_table(table({"query": ["q"], "response": ["r"]}), "x[0].parquet")
    assert read_rows("x[0].parquet", "train") == [("q", "r")]


def test_empty_answers_are_dropped_and_only_calculator_marks_removed(workdir, capsys):
    """Alpaca has 28 empty outputs. <<48/2=24>> must go, code between << and >> must stay."""
    code = 'std::cout << "a"; std::cin >> b; y = 1 << 2 >> 3'
    answers = [".5*48=<<.5*48=24>>24", " ", None, code]
    Path("x.json").write_text(json.dumps([{"question": "q", "answer": a} for a in answers]))
    assert [a for _, a in read_rows("x.json", "t")] == [".5*48=24", code]
    assert "x.json: 2 rows without an answer" in capsys.readouterr().out


@cases("name, text, message", [
    ("x.csv", "query,response\n", "no row"), ("x.json", "{broken\n", "JSONDecodeError"),
    ("x.json", "3", "TypeError"), ("x.parquet", "PAR1", "Arrow"),
    ("x.json", '[{"query": "q", "response": "a"}, {"query": 1, "response": "b"}]', "row 2")])
def test_bad_data_is_one_clear_error(name, text, message, workdir):
    """Every way that a data file can be wrong must be one line that names it."""
    Path(name).write_text(text)
    refused(f"--data {name}: .*{message}", read_rows, name, "train")


# --- eval_gsm8k.py: the Hub ---

@cases("failure, words", [
    (OSError, "cannot be reached"), ("hangs", "cannot be reached"),
    (RepositoryNotFoundError, "no such")])
def test_a_hub_that_says_no_is_told_from_one_that_is_silent(failure, words, tiny, monkeypatch):
    """Silent, also where a name look-up hangs: the cache, then one line with the ways out."""
    def repo_info(*_, **__):
        asked.append(failure)
        if failure == "hangs":
            time.sleep(20)
        raise failure.__new__(failure)

    def load_somewhere(name, local_files_only):
        asked.append(local_files_only)
        raise OSError("not there")
    asked, get, begin = [], ApplyResult.get, time.monotonic()
    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    assert load(tiny) and read_rows(str(tiny / "test.jsonl"), "test") and not asked
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load_somewhere)
    monkeypatch.setattr(ApplyResult, "get", lambda self, timeout: get(self, timeout / 40))
    train_sst2.hub_problem.cache_clear()
    for ask in (lambda name: load_model(name, None, CPU),
                lambda name: train_sst2.main(train_sst2.parse_args(["--model", name]))):
        refused(f"--model a/b: .*{words}", ask, "a/b")
    assert asked == [failure, failure != RepositoryNotFoundError, failure, True]
    assert time.monotonic() - begin < 15


# --- eval_gsm8k.py: device, dtype, model ---

def test_a_process_of_torchrun_touches_its_own_gpu_alone(monkeypatch):
    """Touching "cuda" first would open a context on GPU 0 in every process."""
    touched = []
    monkeypatch.setattr(eval_gsm8k, "WORLD", 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "empty", lambda _, device: touched.append(device) or IDS)
    for name in ("auto", "cuda"):
        eval_gsm8k.pick_device(name)
    assert touched == ["cuda:1"] * 2


def test_half_precision_without_units_is_the_user_s_choice(monkeypatch):
    """On a CPU without half-precision units auto must be float32; by name it warns, and obeys."""
    for unit, dtype in (("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
        assert eval_gsm8k.pick_dtype("auto", CPU)[0] == dtype
    with pytest.warns(UserWarning, match="--dtype bfloat16"):
        assert eval_gsm8k.pick_dtype("bfloat16", CPU)[0] == torch.bfloat16


def test_models_are_loaded_as_asked_or_refused(tiny, workdir):
    """transformers takes the checkpoint's dtype unless told. What cannot serve is one line."""
    model, tokenizer = load(tiny)
    model.bfloat16().save_pretrained("half")
    model.save_pretrained("partial", state_dict={"lm_head.weight": model.lm_head.weight})
    tokenizer.save_pretrained("partial")
    tokenizer.save_pretrained("half")
    for dtype in DTYPES:
        assert load_model("half", dtype, CPU)[0].dtype == dtype
    tokenizer.eos_token = None
    tokenizer.save_pretrained("half")
    for name, words in (("./none", ""), ("partial", "model.embed"), ("half", "EOS")):
        refused(f"--model {name}: .*{words}", load_model, name, torch.float32, CPU)
    for device in ("cuda:7", "gpu"):
        refused(f"--device {device}", eval_gsm8k.pick_device, device)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_4_bit_model_lets_go_of_the_dense_file(tiny, workdir):
    """One embedding that stayed a view of the file would keep all of it beside the 4-bit copy."""
    for part in load(tiny):
        part.save_pretrained("mapped")
    for nf4 in (False, True):
        model = load_model("mapped", torch.float32, CPU, nf4)[0]
        assert ("mapped/model.safetensors" in Path("/proc/self/maps").read_text()) != nf4
        del model


# --- eval_gsm8k.py: generation ---

def generate_alone(model, tokenizer, prompt, length):
    """What transformers' generate says, one prompt at a time: the new ids."""
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=length)
    return out[0, ids.shape[1]:].tolist()


def test_a_batch_says_what_each_row_says_alone_and_rows_that_have_ended_leave_it(tiny):
    """Padding, and the checkpoint's own settings (kept for --save-merged), must change no token."""
    model, tokenizer = load(tiny)
    lively(model)
    prompts = [format_prompt(q) for q, _ in read_rows(str(tiny / "test.jsonl"), "test", 8)]
    assert len({len(encode_prompt(tokenizer, prompt)) for prompt in prompts}) > 1
    alone = [generate_alone(model, tokenizer, prompt, 40) for prompt in prompts]
    early = {token for said in alone for token in said[:6]}
    late = sorted({token for said in alone for token in said} - early)
    eos, asks = [tokenizer.eos_token_id, *late[:1]], late[1::5]

    def say(ids, **_):
        return " ".join("Question:" if i in asks else str(i) for i in ids if i != eos[0])
    tokenizer.decode = say
    own = dict(eos_token_id=eos, do_sample=True, temperature=3.0, no_repeat_ngram_size=1,
               min_new_tokens=40, num_beams=3, pad_token_id=10**6)  # a pad without an embedding
    vars(model.generation_config).update(own)
    wanted = []
    for said in alone:
        ends = [place for place, token in enumerate(said, 1) if token in eos + asks]
        wanted.append((say(said[:ends[0]] if ends else said), not ends))
    widths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert complete(model, tokenizer, prompts, 8, 40) == wanted
    assert {cut_off for _, cut_off in wanted} == {True, False} and "Question:" in str(wanted)
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] == 8
    assert own.items() <= vars(model.generation_config).items()


@cases("config", [OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
                  MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=64)])
def test_models_without_a_cache_or_with_a_state_beside_it_answer_too(tiny, config):
    """There are no rows to take out: each must say what generate says of it alone."""
    _, tokenizer = load(tiny)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, 0
    model = lively(AutoModelForCausalLM.from_config(config).eval(), 0.3)
    prompts = ["Question: 1 +", "Question: 2 +"]  # of one length: GPT-1 counts padding as positions
    alone = [generate_alone(model, tokenizer, prompt, 40) for prompt in prompts]
    texts = [text for text, _ in complete(model, tokenizer, prompts, 2, 40)]
    assert texts == tokenizer.batch_decode(alone, skip_special_tokens=True)


def test_rows_beyond_the_model_s_positions_are_refused(tiny):
    """Learned positions would end in an index error, rotary ones in silent nonsense."""
    model, tokenizer = load(tiny)
    model.config.max_position_embeddings = 40
    refused("40 positions.*--max-new-tokens", complete, model, tokenizer, ["a"], 1, 40)
    refused("ids up to 1000000", eval_gsm8k.check_ids, model, [[10**6]])


# --- eval_gsm8k.py: scores, and a run of evaluations ---

def test_intervals_and_exact_test_give_published_values():
    """Wilson's interval and McNemar's exact p must equal values worked out elsewhere."""
    for counts, wanted in (((81, 263), (0.2553, 0.3662)), ((0, 20), (0.0, 0.1611))):
        assert wilson_interval(*counts) == pytest.approx(wanted, abs=1e-4)  # Newcombe 1998
    first, second = [True] + [False] * 9 + [True] * 90, [False] + [True] * 99
    assert mcnemar_p(first, second) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_p(second, first) == mcnemar_p(first, second) < mcnemar_p(first, first) == 1


def test_shots_stand_in_the_prompt_and_are_not_scored(monkeypatch):
    """Every record must say what was asked, and counts must follow from the records."""
    monkeypatch.setattr(eval_gsm8k, "complete", lambda *args: [(args[2][0], True), ("or 5", False)])
    records = eval_gsm8k.answer(None, None, [("a?", "#### 1"), ("b?", "2"), ("c?", "#### 5")], 1)
    assert records[0]["completion"] == "Question: a?\nAnswer: #### 1\n\nQuestion: b?\nAnswer:"
    counts = {"n": 2, "correct": 0, "correct_flexible": 1, "no_answer": 2, "truncated": 1,
              "accuracy_flexible": 0.5, "p_value": 1}
    assert counts.items() <= eval_gsm8k.summarise(records, records).items()


def test_evaluation_writes_scores_for_base_and_every_checkpoint(tiny, workdir, capsys):
    """A run folder stands for its checkpoints, by number. What it says must be in the files."""
    for step in ("step_999000", "step_1000000"):
        saved(Path("checkpoints/run", step), lambda: load(tiny)[0])
    evaluate(tiny, "--adapter", "checkpoints/run")
    names = ["base", "run-step_999000", "run-step_1000000"]
    assert re.findall("(?m)^(.*): .* of 16", capsys.readouterr().out) == names
    for name in names:
        result = json.loads(Path(f"eval_results/{name}-test.json").read_text())
        assert ("p_value" in result) == (result["adapter"] is not None) == (name != "base")
        assert result["n"] == len(records_of(name)) == 16
    assert {"model", "data", "accuracy", "ci95", "correct_flexible", "seconds"} < set(result)
    assert records_of("base")[0]["reference"].isdigit() and list(Path("eval_results").glob("*.png"))


@cases("flags", [[], ["--nf4"]])
def test_a_merged_model_answers_the_same_and_loads_elsewhere(flags, tiny, workdir):
    """transformers must load it, with the logits of base and adapter."""
    saved(Path("adapter"), lambda: load(tiny)[0], r=4)
    evaluate(tiny, "--adapter", "adapter", "--save-merged", "merged", *flags)
    assert records_of("adapter") == records_of("adapter-merged") != records_of("base")
    model, ids = load_model(str(tiny / "base"), torch.float32, CPU, bool(flags))[0], IDS % 40
    load_adapter(model, "adapter")
    reloaded, _ = load_model("merged", torch.float32, CPU)  # by transformers alone
    close(reloaded(ids).logits, model.eval()(ids).logits)


@cases("flags, message", [
    ("--nb-samples 4", "base-test.json is another"), ("--adapter a a --out b", "a-test"),
    ("--adapter nowhere --out b", "is no adapter"), ("--save-merged merged", "exactly one adapter"),
    ("--adapter a --save-merged eval_results", "empty"), ("--data x.json", "a number"),
    ("--shots 16 --out b", "a problem")])
def test_bad_runs_and_another_evaluation_in_place_of_one_are_refused(flags, message, tiny, workdir,
                                                                     monkeypatch):
    """It must come before an hour of generation. The same evaluation may be done again."""
    for _ in range(2):
        evaluate(tiny, "--nb-samples", "3")
    Path("x.json").write_text('{"question": "q", "answer": "none"}')
    monkeypatch.setattr(eval_gsm8k, "complete", lambda *_: pytest.fail("generated"))
    refused(message, evaluate, tiny, *flags.split())


def test_two_processes_score_like_one(tiny, workdir):
    """JSON and completions must be those of one process, but for the seconds."""
    saved(Path("adapter"), lambda: load(tiny)[0], r=4)
    flags = ["--adapter", "adapter", "--batch-size", "3", "--out"]
    evaluate(tiny, *flags, "one")
    done = torchrun(HERE / "eval_gsm8k.py", evaluation(tiny, *flags, "two"))
    assert done.stdout.count("16 problems, scores in two/") == 1, done.stderr
    one, two = ({path.name: re.sub('"seconds": .*', "", path.read_text())
                 for path in Path(out).glob("*.json*")} for out in ("one", "two"))
    assert one == two and len(one) == 4


@cases("text, judged", [
    ("48/2 = 24 and 24 x 3 = 70", [1, 0]), ("2 + 3 * 4 = 14", [1]), ("$1,000-$5=$995", [1]),
    ("10/3 = 3.33, or 3.3", [1]), ("10/3 = 3", [0]), ("5/0 = 1", [0]), ("(2 + 3) * 4 = 9", []),
    ("20% * 5 = 1", []), ("2 * 3 = 6%", [])])
def test_arithmetic_steps_are_judged_by_their_exact_value(text, judged):
    """Precedence must hold, rounding is right as written, and parts of a step are none."""
    spec = importlib.util.spec_from_file_location("analysis", HERE / "bench/gsm8k_analysis.py")
    analysis = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(analysis)
    assert analysis.judge_steps(text) == judged


# --- eval_gsm8k.py: the edge ---

@cases("script, flags", [
    (eval_gsm8k, ["--batch-size", "0"]), (train_math, ["--r", "x"]), (train_sst2, ["--lr", "inf"]),
    (train_sst2, ["--ranks"]), (train_sst2, ["--seeds", "-1"])])
def test_bad_flags_are_one_line_and_exit_code_2(script, flags, capsys):
    """argparse must name the flag, without a usage block. NaN and infinity are never in range."""
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(flags)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and flags[0] in err
    for bad in ("-1", "nan", "inf"):
        refused("^$", eval_gsm8k.number(float, 0), bad)


@cases("error, code, word", [
    (ValueError("two\nlines"), 2, "two"), (ValueError(), 2, "ValueError"),
    (RuntimeError("can't allocate memory"), 2, "--batch-size"), (KeyboardInterrupt(), 130, ""),
    (RuntimeError("MPS: out of memory"), 2, "--batch-size"), (OSError("full"), 2, "full")])
def test_errors_end_in_one_line(error, code, word, monkeypatch, capsys):
    """Also an error without a message, which must not break its own handler."""
    def fails(*_):
        raise error
    monkeypatch.setattr(train_sst2, "main", fails)
    monkeypatch.setattr(sys, "argv", ["train_sst2.py"])
    monkeypatch.setattr(warnings, "formatwarning", None)
    common = lambda: eval_gsm8k.run_script("x.py", fails, lambda: None)
    for name, run in (("x.py", common), ("train_sst2.py", train_sst2.run_script)):
        with pytest.raises(SystemExit) as stopped:
            run()
        err = capsys.readouterr().err
        assert stopped.value.code == code and err.count("\n") == (code == 2)
        assert word in err and err.startswith(f"{name}: " if code == 2 else "")


# --- train_math.py: helpers ---

ROW = list(range(10, 26))  # 16 token ids
KEEP, RECOMPUTE = "--no-checkpoint-activations", "--checkpoint-activations"


def causal(kind, **options):
    return make(kind, **SMALL | {"head_dim": 8} | options)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def adapted(tiny, **options):
    """Return a model with an adapter that is not zero, in training mode, and its rows."""
    model, tokenizer = load(tiny)
    torch.manual_seed(0)
    inject_lora(model, LoRAConfig(r=4, **options))
    shake(model)
    return model.train(), encode(read_rows(str(tiny / "train.jsonl"), "train"), tokenizer, 512)


def command(tiny, *flags):
    common = "--run-name run --device cpu --dtype float32 --lr 1e-2 --r 4 --batch-size 4"
    files = f"--model {tiny}/base --data {tiny}/train.jsonl"
    return " ".join([files, common, "--grad-accum 2", *flags]).split()


def run(tiny, *flags):
    """Run main() in this process; return the last checkpoint's folder."""
    return train_math.main(parse_args(command(tiny, *flags)))


def metrics(name="run"):
    return [json.loads(line) for line in open(f"runs/{name}/metrics.jsonl")]


def weights(folder):
    return safetensors.torch.load((folder / WEIGHTS).read_bytes())


def moments(folder):
    """Return AdamW's state of each weight."""
    return torch.load(folder / "trainer_state.pt")["optimizer"]["state"].values()


# --- train_math.py: data ---

@cases("merges, space", [([], "▁"), ([(":", "▁")], "▁▁")])
def test_training_masks_exactly_what_generation_is_given(merges, space):
    """A row must be the prompt's ids, the answer's and EOS, without a second space before it.

    Only where a token would span both, prompt and answer are tokenised apart.
    """
    words = ["<s>", "</s>", *sorted(set("Question:▁1+1?\nAnswer:▁2")), ":▁"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, merges))
    inner.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>")  # pad == eos hides no target
    texts = [("1+1?", "2"), ("1+1+1?", "2+1")]
    ids, rows, columns = collate(encode(texts, tokenizer, 512), "cpu")
    for i, (question, answer) in enumerate(texts):
        targets = columns[rows == i]
        assert ids[i, :targets[0]].tolist() == encode_prompt(tokenizer, format_prompt(question))
        assert tokenizer.convert_ids_to_tokens(ids[i, targets]) == [*space, *answer, "</s>"]


def test_batches_follow_from_seed_and_epoch_and_start_with_the_largest():
    """An epoch must hold each row once, and pad little."""
    lengths = random.Random(0).choices(range(10, 500), k=1003)
    first, *others = (epoch_batches(lengths, 8, *key) for key in [(0, 0), (0, 1), (1, 0)])
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in first]
    assert first == epoch_batches(lengths, 8, 0, 0) and first not in others
    assert sorted(sum(first, [])) == list(range(1003))
    assert padded[0] == max(padded) and sum(padded) < 1.1 * sum(lengths)


# --- train_math.py: loss, attention ---

def test_loss_and_gradients_equal_the_full_computation(tiny, monkeypatch):
    """Logits in chunks, at targets alone, must give what labels of -100 and a mask give."""
    monkeypatch.setattr(train_math, "CHUNK", 300)
    model, examples = adapted(tiny)
    ids, rows, columns = batch = collate(examples[:6], "cpu")
    ours = [backward_loss(model, batch, 0.5), *gradients(model).values()]
    model.zero_grad()
    labels = torch.full_like(ids, -100)
    labels[rows, columns] = ids[rows, columns]
    loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss * len(rows)
    (0.5 * loss).backward()
    torch.testing.assert_close(ours, [loss.detach(), *gradients(model).values()],
                               atol=1e-5, rtol=1e-4)


def test_accumulation_equals_one_big_batch(tiny, workdir):
    """8 x 1, 4 x 2 and 1 x 8 rows of unequal length must give one gradient, clipped for AdamW."""
    for size in (8, 4, 1):
        last = run(tiny, "--nb-samples 8 --epochs 1 --dropout 0 --clip 0.01",
                   f"--batch-size {size} --grad-accum {8 // size} --run-name {size}")
        norm = sum(state["exp_avg"].square().sum() for state in moments(last)) ** 0.5
        assert float(norm) == pytest.approx(0.1 * 0.01, rel=1e-3)
        for key in ("loss", "grad_norm"):
            assert metrics(size)[0][key] == pytest.approx(metrics(8)[0][key], rel=1e-5)


@cases("kind, options, kept", [
    ("gemma2", {}, False), ("granite", {"logits_scaling": 2.0}, False),
    ("llama4_text", {"num_local_experts": 2}, False), ("llama", {"rms_norm_eps": math.nan}, False),
    ("gemma2", {"final_logit_softcapping": None}, True),  # attention's cap of 50: hardly seen here
    ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, True),
    ("gptj", {"rotary_dim": 8}, True)])
def test_unusual_heads_are_refused_and_unusual_attention_is_kept(kind, options, kept):
    """Logits capped, scaled, NaN, without hidden states: one line. Caps, sinks, own code: kept."""
    model = causal(kind, attn_implementation="eager", **options)
    if not kept:
        return refused("not supported here", train_math.check_head, model, ROW)
    before = logits(model)
    train_math.check_head(model, ROW)
    assert model.config._attn_implementation == "eager" and torch.equal(logits(model), before)


@cases("dropout", [0.0, 0.3])
@cases("dtype", DTYPES)
@cases("kind, window", [("llama", None), ("mistral", 4)])
def test_attention_is_transformers_own(kind, window, dtype, dropout):
    """Logits and gradients must be eager attention's: grouped heads, window, dropout."""
    model = causal(kind, attn_implementation="eager", sliding_window=window,
                   attention_dropout=dropout, initializer_range=0.1).to(dtype)
    results = []
    for attention in ("eager", "lora_training"):
        assert model.config._attn_implementation == attention
        model.zero_grad()
        torch.manual_seed(3)
        output = model.train()(torch.tensor([ROW, ROW[::-1]])).logits.float()
        output.square().sum().backward()
        results.append([output, *(p.grad.float() for p in model.model.layers.parameters())])
        train_math.check_head(model.eval(), ROW)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert all((a - b).norm() < tolerance * a.norm() for a, b in zip(*results))


@quiet
@cases("kind", ["mamba", "mamba2", "falcon_mamba", "nemotron_h"])
def test_state_space_models_train_in_half_precision(kind):
    """fp32 logits or hidden states must neither crash the check nor the loss."""
    model = causal(kind, dtype=torch.float16, state_size=4, ssm_state_size=8, n_groups=1,
                   num_heads=4, mamba_num_heads=4, mamba_head_dim=16, head_dim=16, chunk_size=8,
                   layers_block_type=["mamba", "attention"])
    train_math.check_head(model, ROW)
    inject_lora(model, LoRAConfig(targets=["in_proj"]))
    assert 40 < backward_loss(model.train(), collate([(ROW, 4)], "cpu"), 1 / 12) < 60
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# --- train_math.py: recomputation, the memory plan ---

def test_recomputing_gives_the_same_gradients_and_keeps_block_inputs(tiny):
    """Behind frozen embeddings, with dropout: the same bits, every A and B reached."""
    grown, kept = [], []
    for recompute in (False, True):
        model, examples = adapted(tiny, dropout=0.1)
        if recompute:
            train_math.checkpoint_blocks(model)
        torch.manual_seed(0)
        kept.append(saved_for_backward(
            lambda: backward_loss(model, collate(examples[:8], "cpu")), model.parameters()))
        grown.append(gradients(model))
    assert same_bits(*grown) and kept[1] < 0.15 * kept[0]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in grown[1].values())


@cases("device, share, flags, recompute", [
    ("cpu", 0.99, "", True), ("cpu", 1.01, "", False), ("cpu", 0, KEEP, False),
    ("cpu", 9, RECOMPUTE, True), ("mps", 0, "--dropout 0", True)])
def test_the_plan_chooses_and_flags_force_it(device, share, flags, recompute, tiny, monkeypatch):
    """Recompute where 1.25 times the need exceeds what is free; with dropout on MPS, refuse."""
    model, done = adapted(tiny)[0], []
    need = (2 + 0.5) * 4 * 2**30  # 4 rows of 1 GiB in 2 blocks, and the gradients in one
    for name, fake in (("free_memory", lambda _: share * 1.25 * need),
                       ("kept_by_block", lambda *_: (0, 2**30)),
                       ("checkpoint_blocks", done.append)):
        monkeypatch.setattr(train_math, name, fake)
    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device(device))
    train_math.plan_memory(model, parse_args(command(tiny, flags)), 40)
    assert done == recompute * [model]
    if device == "mps":
        refused("mps needs", train_math.plan_memory, model, parse_args(command(tiny)), 40)


def test_vram_limits_the_allocator_and_the_plan(tiny, monkeypatch):
    """With --vram 4 the allocator must get 3.5 GiB, and the plan what is left of them."""
    GB, cuda, share = 2**30, torch.device("cuda"), [1.0]
    for name, fake in (("mem_get_info", lambda _: (10 * GB, 16 * GB)),
                       ("memory_reserved", lambda _: 2 * GB), ("memory_allocated", lambda _: GB),
                       ("set_per_process_memory_fraction", lambda value, _: share.append(value)),
                       ("get_per_process_memory_fraction", lambda _: share[-1])):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(train_math, "pick_device", torch.device)
    assert train_math.free_memory(cuda) == 11 * GB
    refused("--data", run, tiny, f"--device cuda --vram 4 --data {tiny}/base/config.json")
    assert share[-1] == 3.5 / 16 and train_math.free_memory(cuda) == 2.5 * GB


@cases("flags", [KEEP, RECOMPUTE, RECOMPUTE + " --nf4"])
def test_the_memory_plan_is_what_a_step_holds(flags, monkeypatch):
    """All tensors alive at once, as torch's profiler counts them: within 25% of the plan."""
    monkeypatch.setattr(train_math, "CHUNK", 2**18)
    monkeypatch.setattr(train_math, "read_number", lambda *_: 0)
    model = causal("llama", vocab_size=2048, hidden_size=256, intermediate_size=704, head_dim=64,
                   num_hidden_layers=6, max_position_embeddings=128).train()
    if "--nf4" in flags:
        quantize_nf4(model)
    train_math.use_attention(model)
    inject_lora(model, LoRAConfig(r=64, targets="all-linear"))
    plan = train_math.plan_memory(model, parse_args(f"--batch-size 4 {flags}".split()), 128)
    with torch.profiler.profile(profile_memory=True) as profiler:
        backward_loss(model, collate([(list(range(128)), 1)] * 4, "cpu"))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    moments = 8 * count_parameters(model)[0]  # two numbers in fp32
    assert 0.75 < (peak + model.get_memory_footprint() + moments) / (plan * 2**30) < 1.25


# --- train_math.py: loss scaling, schedule, numbers that go wrong ---

@cases("scaler", [LossScaler, Sst2LossScaler])
def test_loss_scaler_agrees_with_torch_s_grad_scaler(scaler):
    """Scale and gradients must agree over good steps and overflows; no gradient is no error."""
    ours, scales = scaler(True, scale=2.0**16, interval=3), set()
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    mine, weight, unreached = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for gradient in [1, 2, math.inf, 3, 1, 2, 3, math.nan, math.inf, 1, 1, 1, 1, 1, 1, 1]:
        mine.grad, weight.grad = torch.full((2, 2), gradient * ours.scale)
        theirs.scale(torch.ones(1))  # it wants to be asked first
        theirs.unscale_(torch.optim.SGD([weight]))
        theirs.update()
        ours.unscale([mine, unreached])
        ours.update(math.isfinite(gradient))
        assert ours.scale == theirs.get_scale()
        torch.testing.assert_close(mine.grad, weight.grad, equal_nan=True)
        scales.add(ours.scale)
    assert scales == {2.0**14, 2.0**15, 2.0**16}


@cases("processes", [1, 2])
def test_layers_that_the_text_does_not_reach_are_named_once(
        processes, tiny, workdir, monkeypatch, capsys):
    """As with a vision tower: in fp16, or with two processes, the rest must train, it not decay."""
    monkeypatch.setattr(train_math, "WORLD", processes)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    model, examples = adapted(tiny)
    model.half().tower = LoRALinear(nn.Linear(4, 4), r=2, alpha=4)
    before = bits(model)
    flags = "--max-steps 2 --weight-decay 0.1"
    train_math.train(model, examples, parse_args(command(tiny, flags)))
    assert capsys.readouterr().out.count("2 weights had no gradient, such as tower.lora_A") == 1
    trained = changed(bits(model), before)
    assert trained and not any("tower" in name for name in trained)


def test_schedule_warms_up_then_falls_to_zero():
    """At most a tenth of the steps rise to the peak, then half a cosine."""
    rates = [learning_rate_at(step, 100, 1000, 1.0) for step in (0, 4, 9, 10, 55, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0], abs=1e-3)


@quiet
def test_a_skipped_step_changes_nothing_but_the_scale(tiny, workdir, monkeypatch):
    """In fp16 an overflow must leave weights, moments and schedule, also seen by a resumed run."""
    weights = []

    def overflow(model, *rest):
        weights.append(bits(model))
        return backward_loss(model, *rest) + (math.inf if len(weights) == 2 else 0)

    monkeypatch.setattr(train_math, "backward_loss", overflow)
    flags = "--dtype float16 --max-steps 3 --grad-accum 1 --warmup-steps 0 --save-every 1"
    last = run(tiny, flags)
    first, skipped, third = metrics()
    assert [line["loss_scale"] for line in metrics()] == [2**16, 2**15, 2**15]
    assert skipped["loss"] is None and first["lr"] != skipped["lr"] == third["lr"]
    assert same_bits(weights[1], weights[2]) and not same_bits(weights[0], weights[1])
    assert {int(state["step"]) for state in moments(last)} == {2}
    shutil.rmtree(last)
    run(tiny, flags, "--resume")
    assert all(metrics()[2][key] == third[key] for key in ("lr", "loss_scale", "loss"))


@quiet
@cases("dtype, loss, step", [
    ("float32", math.nan, 1), ("bfloat16", math.inf, 1), ("float16", math.nan, 20)])
def test_a_run_that_diverges_says_what_may_help(dtype, loss, step, tiny, workdir, monkeypatch):
    """NaN must stop fp32 and bf16 at once, fp16 after 20 skips."""
    monkeypatch.setattr(train_math, "backward_loss", lambda *_: torch.tensor(loss))
    refused(f"^step {step}: loss {loss}.*--lr, or --dtype", run, tiny, "--dtype", dtype)


# --- train_math.py: the run, its files, resuming ---

def test_training_learns_and_writes_what_it_says(tiny, workdir, capsys):
    """Facts must come first, the loss fall, and two trainer's states stay."""
    last = run(tiny, "--epochs 6 --max-length 38 --weight-decay 0.125 --save-every 9 --run-name ..")
    lines, out = metrics("_."), capsys.readouterr().out
    losses = [line["loss"] for line in lines]
    dropped = sum(len(ids) > 38 for ids, _ in adapted(tiny)[1])
    facts = ("4 layers adapted", f" {dropped} dropped", "memory plan", "tok/s", "peak memory")
    assert sorted(facts, key=out.index) == list(facts) and 0 < dropped < 64
    assert " ".join(lines[0]) == ("step loss lr grad_norm loss_scale tokens tokens_per_s "
                                  "peak_memory_gb skipped")
    assert sum(losses[-8:]) < sum(losses[:8]) - 0.4 and Path("runs/_./loss.png").exists()
    states = [(folder / "trainer_state.pt").exists() for folder in checkpoints(last.parent)]
    assert states == (len(states) - 2) * [False] + [True, True]
    assert torch.load(last / "trainer_state.pt")["optimizer"]["param_groups"][0]["weight_decay"]


@cases("file, more", [("trainer_state.pt", ""), (WEIGHTS, "--nf4 --targets all-linear")])
def test_resume_continues_bitwise(file, more, tiny, workdir):
    """Where the newest checkpoint is damaged, the one before must lead to the same bits."""
    flags = f"--nb-samples 7 --batch-size 1 --grad-accum 4 --dropout 0.1 --save-every 3 {more}"
    last = run(tiny, flags)
    whole, lines = weights(last), metrics()
    os.truncate(last / file, 100)
    with pytest.warns(UserWarning, match="step_000006 is damaged"):
        assert run(tiny, flags, "--resume", RECOMPUTE) == last
    assert same_bits(weights(last), whole)
    for one, two in zip(lines, metrics(), strict=True):
        assert [*one.items()][:6] == [*two.items()][:6]  # speed and memory vary
    assert run(tiny, flags, "--resume") == last  # finished already


def test_the_seed_reaches_dropout(tiny, workdir, monkeypatch):
    """With A and the order of rows held, seeds must differ, also by 2**31."""
    monkeypatch.setattr(train_math, "epoch_batches", lambda *_: [[0]])
    losses = set()
    for seed in (0, 1, 2**31):
        model, examples = adapted(tiny, dropout=0.5)
        train_math.train(model, examples, parse_args(command(tiny, f"--seed {seed}")))
        losses.add(metrics()[0]["loss"])
    assert len(losses) == 3


def test_resume_refuses_what_it_cannot_continue(tiny, workdir, monkeypatch):
    """No run, a taken name, another flag, data, base or process: refused by name."""
    copy, flags = Path(shutil.copytree(tiny, "copy")), "--max-steps 1 --resume"
    refused("no whole checkpoint to continue from", run, copy, flags)
    run(copy, "--max-steps 1")
    refused("has checkpoints: add --resume", run, copy)
    refused("--lr .*was 0.01, is 0.02", run, copy, flags, "--lr 0.02")
    shutil.copytree(tiny / "tied", copy / "base", dirs_exist_ok=True)
    refused("base of this run was ", run, copy, flags)
    shutil.copy(copy / "test.jsonl", copy / "train.jsonl")
    refused("data of this run was ", run, copy, flags)
    for key in ("--seed", "step"):  # rank 0 has another seed, or checkpoint
        monkeypatch.setattr(train_math, "gather", lambda value: [value | {key: 7}])
        refused(f"{key} of this run was 7, is 0", run, tiny, "--run-name other")


def test_a_full_disk_leaves_no_partial_checkpoint(tiny, workdir):
    """It must be an OSError, and --resume go on."""
    resource = pytest.importorskip("resource")
    last = run(tiny, "--save-every 1")
    size = (last / "trainer_state.pt").stat().st_size
    shutil.rmtree(last)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        refused("File too large", run, tiny, "--save-every 1 --resume", error=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not last.exists() and run(tiny, "--save-every 1 --resume") == last


@cases("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupting_saves_and_says_how_to_go_on(signum, tiny, workdir, monkeypatch, capsys):
    """The step must be finished and saved, and the exit code be the signal's."""
    def interrupt(step, *rest):
        if step == 1:
            signal.raise_signal(signum)
        return learning_rate_at(step, *rest)

    monkeypatch.setattr(train_math, "learning_rate_at", interrupt)
    refused(f"^{128 + signum}$", run, tiny, "--max-steps 4", error=SystemExit)
    assert "--resume goes on from checkpoints/run/step_000002" in capsys.readouterr().out
    assert newest_state(Path("checkpoints/run"))[1]["step"] == len(metrics()) == 2


# --- train_math.py: command lines ---

@cases("flags, message", [
    ("--lr nan", "--lr"), ("--targets q_porj", "'q_porj' matches no"), ("--vram 4", "got: cpu"),
    ("--device cuda:9", "--device cuda:9"), ("--data none.jsonl", "no such file"),
    ("--max-length 4", "4 leaves none of 64 rows"), ("--targets lm_head", "shares a weight")])
def test_wrong_input_is_one_line(flags, message, tiny, workdir, capsys):
    """What a flag or a file can cause must be named, before anything is written."""
    with pytest.raises((ValueError, SystemExit)) as error:
        run(tiny, f"--model {tiny}/tied", flags)
    said = capsys.readouterr().err or f"{error.value}\n"
    assert message in said and said.count("\n") == 1 and not list(workdir.iterdir())


# --- train_sst2.py ---

@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder: a tiny untrained BERT (base/), one without dropout (dry/), sentences."""
    folder = tmp_path_factory.mktemp("sst2")
    train_sst2.write_demo(folder, 0, train=96, validation=40)
    shutil.copytree(folder / "base", folder / "dry")
    path = folder / "dry/config.json"
    path.write_text(path.read_text().replace("0.1", "0.0"))
    return folder


def sst2(encoder, *flags):
    return train_sst2.parse_args([
        "--model", str(encoder / "base"), "--data", str(encoder), "--device", "cpu",
        "--dtype", "float32", "--epochs", "1", "--batch-size", "16", "--lr", "5e-3", *flags])


def prepared(encoder, *flags):
    args = sst2(encoder, *flags)
    train_sst2.settle(args)
    return args, train_sst2.read_data(args, "train", "validation")


def test_an_ablation_writes_a_line_per_run_and_skips_finished_ones(encoder, workdir, capsys):
    """Each run must stand in sst2.jsonl as a line; started again, only a lost one is done."""
    args = sst2(encoder, "--ranks", "1", "2", "--seeds", "0", "1", "--full-finetune")
    runs = train_sst2.main(args)
    assert [(run["r"], run["seed"]) for run in runs] == [
        (1, 0), (1, 1), (2, 0), (2, 1), (None, 0), (None, 1)]
    assert [run["adapter_parameters"] for run in runs] == [512, 512, 1024, 1024, 0, 0]
    assert [run["trainable"] for run in runs[::5]] == [512 + 64 * 2 + 2, runs[5]["total"]]
    assert len({run["loss"] for run in runs}) == 6
    path = Path("runs/sst2/sst2.jsonl")
    train_sst2.report([run | {"accuracy": n / 10} for n, run in enumerate(runs)], "curves.png")
    assert re.search(r"r=2 +1024 +1154 +25 +7.07", capsys.readouterr().out)
    assert path.with_suffix(".png").exists() and Path("runs/sst2/r2-s1", WEIGHTS).exists()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    again = train_sst2.main(args)
    assert again[:-1] == runs[:-1] and again[-1]["loss"] == runs[-1]["loss"]
    path.write_text(path.read_text()[:-30])
    refused("--out runs/sst2: ", train_sst2.main, args)


def test_a_folder_takes_one_experiment_alone(workdir):
    """Published runs must be read, for other ranks and seeds too; other flags refused by name."""
    runs = (HERE / "results/sst2-section7.jsonl").read_text().split("\n")
    Path("sst2.jsonl").write_text(runs[0])
    flags = ("--model minilm-l6 --data sst2 --nb-samples 10000 --epochs 1 --dtype bfloat16 "
             "--full-lr 1 --ranks 64 --seeds 3 --lr").split()

    def read(*more):
        return train_sst2.read_runs(train_sst2.parse_args([*flags, *more]), Path("sst2.jsonl"))

    assert read("2e-3") == [json.loads(runs[0])]
    refused("--lr was 0.002, is 0.01; .*--grad-accum was 1, is 2; give another --out", read, "1e-2",
            "--grad-accum", "2")


def test_an_adapter_with_its_head_predicts_the_same_elsewhere(encoder, workdir, capsys):
    """From its folder alone, on a fresh head, the predictions must be equal; merged too."""
    args, data = prepared(encoder)
    _, model = train_sst2.train(args, data, 2, 5)
    wanted, accuracy, _ = train_sst2.evaluate(model, data["validation"], "float32")
    flags = ["--adapter", "runs/sst2/r2-s5", "--data", args.data, "--dtype", "float32", "--device"]
    assert torch.equal(train_sst2.main(train_sst2.parse_args([*flags, "cpu"])), wanted)
    assert train_sst2.wilson_interval(0.5, 40) == pytest.approx(wilson_interval(20, 40), abs=1e-4)
    assert f"accuracy {accuracy:.2%} [" in (out := capsys.readouterr().out)
    assert "0 labels change when merged" in out


@cases("r", [2, None])
def test_four_batches_of_eight_are_one_of_thirty_two(r, encoder, workdir):
    """Without dropout 4 x 8, and 1 x 32, must end in the same weights, a short last window too."""
    flags = ["--model", str(encoder / "dry"), "--dropout", "0", "--nb-samples", "76"]
    weights = []
    for size, accum in [("32", "1"), ("8", "4")]:
        args, data = prepared(encoder, *flags, "--batch-size", size, "--grad-accum", accum)
        _, model = train_sst2.train(args, data, r, 0)
        weights.append(dict(model.named_parameters()))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-4)


@cases("r", [4, None])
def test_recomputed_blocks_give_equal_gradients_and_save_less(r, encoder):
    """With dropout on, gradients must be equal to the bit, and tensors saved for backward fewer."""
    gradients, saved = [], []
    for flags in [[], ["--checkpoint-activations"]]:
        args, data = prepared(encoder, *flags)
        model, _ = train_sst2.load_encoder(args, r, 0)
        for _, layer in lora_layers(model):
            nn.init.ones_(layer.lora_B)  # B = 0 would hide A's gradient
        sizes = []
        pack = lambda tensor: sizes.append(tensor.nbytes) or tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, loss = train_sst2.classify(model.train(), data["train"][:16], "float32")
        loss.backward()
        parameters = model.named_parameters()
        gradients.append({name: p.grad for name, p in parameters if p.grad is not None})
        saved.append(sum(sizes))
    assert len(gradients[0]) >= 10 and same_bits(*gradients) and saved[1] < saved[0] / 4


def test_a_skipped_step_leaves_weights_and_schedule_and_twenty_end_the_run(encoder, workdir,
                                                                           monkeypatch):
    """At a scale that overflows nothing may move; the first step taken has the peak rate."""
    args, data = prepared(encoder, "--dtype", "float16", "--batch-size", "8", "--full-lr", "0.05")
    steps, step = [], torch.optim.AdamW.step

    def recorded(optimizer):
        group = optimizer.param_groups[0]
        norm = sum(p.grad.square().sum() for p in group["params"] if p.grad is not None).sqrt()
        steps.append((group["lr"], float(norm)))
        step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    for scale, skipped in [(2.0**120, 12), (2.0**22, None)]:
        monkeypatch.setattr(train_sst2, "LossScaler", lambda enabled: Sst2LossScaler(True, scale))
        run, model = train_sst2.train(args, data, None, 0)
        if skipped:
            start, _ = train_sst2.load_encoder(args, None, 0)
            assert run["skipped"] == 12 and same_bits(bits(start), bits(model))
    assert 0 < run["skipped"] < 12 and steps[0][0] == args.full_lr
    assert max(norm for _, norm in steps) < 1.001  # clipped
    args.epochs, scale = 2, 2.0**120
    refused("at step 20: try a lower --full-lr", train_sst2.train, args, data, None, 0)


def test_without_scaling_the_first_bad_loss_stops(encoder, monkeypatch):
    """A NaN loss in fp32 must end the run at its step, naming --lr."""
    args, data = prepared(encoder)
    bad = lambda model, *_: (None, math.nan * model.classifier.weight.sum())
    monkeypatch.setattr(train_sst2, "classify", bad)
    refused("loss nan.*at step 1: try a lower --lr", train_sst2.train, args, data, 2, 0)


def test_padding_does_not_change_an_encoder_s_loss(encoder):
    """One by one or in padded batches labels must be equal and in order, and the loss too."""
    args, data = prepared(encoder)
    examples = [(ids[:n % 9 + 3], label) for n, (ids, label) in enumerate(data["validation"])]
    model, _ = train_sst2.load_encoder(args, None, 0)
    model.classifier.weight.data.normal_()
    with torch.no_grad():
        logits, _ = train_sst2.classify(model.eval(), examples, "float32")
        model.classifier.bias -= logits.mean(0)  # so that both labels are predicted
    labels, _, loss = train_sst2.evaluate(model, examples, "float32")
    assert 0 < labels.sum() < len(examples)
    alone, _, losses = zip(*[train_sst2.evaluate(model, [one], "float32") for one in examples])
    assert labels.tolist() == [int(label) for label in alone]
    assert loss == pytest.approx(sum(losses) / len(examples), abs=1e-5)


def test_the_seed_reaches_head_adapter_data_and_dropout(encoder):
    """Seeds must differ in all four, also beyond the 32 bits that torch's CPU generator uses."""
    args, data = prepared(encoder)
    seen = []
    for seed in (0, 1, 2**32):
        model, _ = train_sst2.load_encoder(args, 2, seed)
        layer = next(layer for _, layer in lora_layers(model))
        mask = F.dropout(torch.ones(64), 0.5)
        order = train_sst2.epoch_windows(data["train"], 8, 1, random.Random(seed))
        seen.append([model.classifier.weight, layer.lora_A, mask, order])
    for a, b in [(0, 1), (0, 2)]:
        assert not any(str(x) == str(y) for x, y in zip(seen[a], seen[b]))


def test_training_rows_are_drawn_with_seed_0_and_cut(encoder):
    """--nb-samples must take the same rows in every run, --max-length no more tokens."""
    _, data = prepared(encoder)
    _, few = prepared(encoder, "--nb-samples", "8", "--max-length", "5")
    wanted = random.Random(0).sample(data["train"], 8)
    assert few["train"] == [(ids[:4] + ids[-1:], label) for ids, label in wanted]


def test_what_a_checkpoint_lacks_is_trained_or_named(encoder, workdir):
    """DistilBERT's head has two layers; a random module outside of --head must be refused."""
    config = transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4)
    transformers.DistilBertModel(config).save_pretrained("distil")
    config = transformers.BertConfig.from_pretrained(encoder / "base")
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained("headless")
    args = sst2(encoder, "--model", "distil")
    args.device = CPU
    model, _ = train_sst2.load_encoder(args, 2, 0)
    assert count_parameters(model)[0] == 2 * 2 * 2 * (32 + 32) + 32 * 33 + 2 * 33
    args.model = "headless"
    refused("headless has no bert.pooler.*--head", train_sst2.load_encoder, args, 2, 0)


@cases("name, text, wanted", [
    ("train.tsv", 'sentence\tlabel\n"half open\t1\nnull\t0\nNA\t1\n',
     [('"half open', 1), ("null", 0), ("NA", 1)]),
    ("train.csv", 'sentence,label\n"one, two",1\nnull,0\n2.0,1\n',
     [("one, two", 1), ("null", 0), ("2.0", 1)]),
    ("train.jsonl", '{"sentence": "2.0", "label": true}\n{"sentence": "null", "label": false}\n',
     [("2.0", 1), ("null", 0)])])
def test_sentences_are_read_as_they_stand(name, text, wanted, workdir):
    """Lone quotation marks, null, NA and numbers must stay text, in a folder named d[1] too."""
    Path("d[1]").mkdir()
    Path("d[1]", name).write_text(text)
    rows = train_sst2.read_sentences("d[1]", "train")
    assert rows == wanted and {type(label) for _, label in rows} == {int}


@cases("flags, message", [
    (["--data", "empty"], "one train file"), (["--data", "columns"], "--data columns: .*sentence"),
    (["--data", "unlabelled"], "'a', -1"), (["--targets", "q_porj"], "'q_porj' matches no layer"),
    (["--model", "./none"], "no such folder"), (["--adapter", "nowhere"], "nowhere"),
    (["--device", "tpu9"], "--device tpu9: ")])
def test_bad_input_to_sst2_is_a_clear_error(flags, message, encoder, workdir):
    """Folders, columns, labels, targets, devices: each must be one line that names it."""
    for name, text in [("empty", None), ("columns", '{"text": "a", "label": 1}'),
                       ("unlabelled", '{"sentence": "a", "label": -1}')]:
        Path(name).mkdir()
        if text:
            Path(name, "train.jsonl").write_text(text)
    refused(message, train_sst2.main, sst2(encoder, *flags))


def test_devices_choose_the_dtype_and_mps_refuses_recomputation(encoder, monkeypatch):
    """Without units for it fp32 must be the default; asked for by name, bf16 gives a warning."""
    for units, dtype in [(True, "bfloat16"), (False, "float32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
        args = sst2(encoder, "--dtype", "auto")
        train_sst2.settle(args)
        assert args.dtype == dtype
    with pytest.warns(match="--dtype bfloat16 is slow on this CPU"):
        train_sst2.settle(sst2(encoder, "--dtype", "bfloat16"))
    mps = SimpleNamespace(device=torch.device("mps"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: mps)
    refused("on MPS", train_sst2.settle, sst2(encoder, "--checkpoint-activations"))


def test_the_demo_repeats_and_deletes_nothing_of_others(workdir, monkeypatch):
    """Twice in one folder, with fewer sentences: six new runs each, another's file is kept."""
    write = train_sst2.write_demo
    fewer = lambda folder, seed: write(folder, seed, train=96, validation=40)
    monkeypatch.setattr(train_sst2, "write_demo", fewer)
    Path("demo-sst2").mkdir()
    Path("demo-sst2/mine").touch()
    for seed in (0, 1):
        runs = train_sst2.main(train_sst2.parse_args(["--demo", "--seeds", str(seed)]))
        assert [run["seed"] for run in runs] == 3 * [seed, seed + 1]
    for name in ("mine", "base/model.safetensors", f"r4-s2/{WEIGHTS}"):
        assert Path("demo-sst2", name).exists()


# --- train_sst2.py: Section 7 of the paper ---

def basis(rows, width, seed=0):
    """Orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rows, generator=generator)).Q.T


def test_subspace_similarity_is_one_zero_or_chance():
    """Eq. 4: one subspace in another is 1, orthogonal ones 0, random ones near max(i, j) / k."""
    phi, rows = train_sst2.subspace_similarity, basis(12, 64)
    A = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ rows[:4]
    close(phi(A, A), torch.ones(4, 4))
    close(phi(A, rows[4:]), torch.zeros(4, 8))
    rotated = basis(4, 4, seed=1) @ rows[:4]  # other directions of the same subspace
    close(phi(A, rotated)[3], torch.ones(4))
    assert phi(A, rotated)[0, 0] < 0.9
    first, second = (torch.randn(r, 512, generator=torch.Generator().manual_seed(r))
                     for r in (8, 64))
    for i, j in ((8, 8), (8, 64), (3, 40)):
        assert abs(phi(first, second)[i - 1, j - 1] - max(i, j) / 512) < 0.02


def test_amplification_is_what_it_is_by_hand():
    """Table 7: for dW = c times W's top part the factor is c; beside W's directions UWV is 0."""
    U, V, values = basis(6, 40).T, basis(6, 30, seed=1), torch.tensor([9.0, 7, 5, 3, 2, 1])
    W, top = U @ torch.diag(values) @ V, values[:2].norm()
    for some in (slice(0, 2), slice(2, 4)):
        dW, part = 0.5 * U[:, some] @ torch.diag(values[some]) @ V[some], values[some].norm()
        *columns, onto_random, factor = train_sst2.amplification(W, dW, 2)
        close(torch.stack(columns), torch.stack([values.norm(), 0.5 * part, part, top]))
        assert onto_random < 0.5 * top
        close(factor, torch.tensor(0.5))
    beside = torch.linalg.qr(torch.cat([U, basis(8, 40, seed=2).T], 1)).Q[:, 6:8]
    assert train_sst2.amplification(W, beside @ V[:2], 2)[2] < 1e-4


def test_compare_names_layers_and_refuses_what_it_cannot_compare(encoder, workdir, capsys):
    """Two ranks give tables and a picture; a missing adapter or no shared layer, one line."""
    def adapter(folder, r, *targets):
        model = AutoModelForSequenceClassification.from_pretrained(encoder / "base")
        config = LoRAConfig(r, targets=targets, also_train=["classifier"])
        inject_lora(model, config)
        shake(model)
        save_adapter(model, config, folder)
        return dict(lora_layers(model))

    a, b = adapter("a", 2, "query", "value"), adapter("b", 4, "query", "dense")
    adapter("c", 2, "value")
    compare = lambda *folders: train_sst2.main(train_sst2.parse_args(["--compare", *folders]))
    maps = compare("a", "b")
    first, last = (f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1))
    V1, V2 = (torch.linalg.qr(layers[last].lora_A.T).Q for layers in (a, b))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(last)]
    assert rows[0][-1] == f"{(V1.T @ V2).square().sum() / 2:.2f}"
    W, dW = b[last].weight, b[last].delta()
    assert rows[2][1:3] == [f"{W.norm():.2f}", f"{dW.norm():.2f}"]
    close(maps["mean of 2 attention.self.query"], (maps[first] + maps[last]) / 2)
    close(maps["chance max(i, j) / k, attention.self.query"][1], torch.tensor([2, 2, 3, 4]) / 64)
    assert Path("runs/sst2/compare-a-b.png").exists()
    refused("none", compare, "b", "none")
    refused("share no layer", compare, "b", "c")


# --- the CUDA path, on fake tensors ---

@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_cuda_path_mixes_no_devices_or_dtypes():
    """Two steps on a CUDA device that is pretended: every mix of devices or dtypes would raise."""
    code = """
import sys
sys.path.insert(0, "bench")
import memory
memory.pretend_cuda()
import torch
shape = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2)
for dtype, nf4 in ((torch.float16, True), (torch.bfloat16, False)):
    kept, recomputed = (memory.alive(shape, dtype, nf4, again, "all-linear", length=64)
                        for again in (False, True))
    assert 0 < kept[0] == recomputed[0] < recomputed[1] < kept[1]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- the README ---

def test_every_command_in_the_readme_parses():
    """Each `python x.py --flag` of the README must go through that script's parser."""
    scripts = {"train_math": train_math, "eval_gsm8k": eval_gsm8k, "train_sst2": train_sst2}
    shell = "".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    commands = re.findall(r"(train_math|eval_gsm8k|train_sst2)\.py([^#\n]*)", shell)
    assert len(commands) > 10
    for script, flags in commands:
        scripts[script].parse_args(shlex.split(flags))


def test_the_table_from_paper_to_code_names_what_exists():
    """Each function and test in the README's table must be there."""
    rows = re.findall(r"^\|[^|]+\| `(\w+)\.py`: `([\w.]+)` \| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 10
    for file, name, test in rows:
        value = importlib.import_module(file)
        for part in name.split("."):
            value = getattr(value, part)
        assert test in globals()


# --- train_math.py: what starts processes ---

SCRIPT = str(HERE / "train_math.py")


def test_sigkill_at_random_moments(tiny, workdir):
    """Killed at any moment, a run must end in the same bits. KILLS=20 is the stress run."""
    rng, kills = random.Random(0), int(os.environ.get("KILLS", 2))
    flags = f"--dropout 0.1 --epochs {3 + kills} --save-every 1"
    alone, folder = run(tiny, flags, "--run-name alone"), Path("checkpoints/run")
    for kill in range(kills):
        goal = len(checkpoints(folder)) + rng.randint(1, 5)
        call = [sys.executable, SCRIPT, *command(tiny, flags, "--resume" * (kill > 0))]
        process = subprocess.Popen(call)
        while process.poll() is None and len(checkpoints(folder)) < goal:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it did not end by itself
    assert same_bits(weights(run(tiny, flags, "--resume")), weights(alone))


def torchrun(script, flags):
    """Run two processes on gloo; each rank's stderr is in the result."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*call, "--", str(script), *flags], capture_output=True, text=True)


def test_two_processes_train_like_one_also_after_one_died(tiny, workdir):
    """Rank 1 fails in step 5: its line must be there. Resumed, the weights are one process's.

    Windows of 3 micro-batches over 2 processes, the last of 1, dropout on.
    """
    flags = "--nb-samples 8 --epochs 2 --batch-size 1 --grad-accum 3 --dropout 0.1 --save-every 3"
    alone = run(tiny, flags, "--run-name alone")
    Path("dies.py").write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import train_math as T
rate = T.learning_rate_at
def dies(step, *rest):
    if T.RANK == 1 and step == 4:
        raise T.torch.OutOfMemoryError("rank 1's card is full")
    return rate(step, *rest)
T.learning_rate_at = dies
T.run_script("train_math.py", T.main, T.parse_args)
""")
    done = torchrun("dies.py", command(tiny, flags))
    assert done.returncode != 0 and len(metrics()) == 4
    assert "train_math.py (rank 1): out of memory (OutOfMemoryError: rank 1's card" in done.stderr
    done = torchrun(SCRIPT, command(tiny, flags, "--resume"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layers adapted") == 1  # rank 0 alone speaks
    close(weights(Path("checkpoints/run", alone.name)), weights(alone), 1e-6)
    for one, two in zip(metrics("alone"), metrics(), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["tokens"] == two["tokens"]
