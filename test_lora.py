"""Every claim, as a test: python -m pytest -q. Tiny seeded models, nothing downloaded.

In the order of the files; the kill and two training processes come last.
"""
import copy
import dataclasses
import gc
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
import statistics
import subprocess
import sys
import time
import warnings
import weakref
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are no faster with more threads

import filelock
import numpy
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import eval_gsm8k
import lora
import train_math
import train_sst2
from eval_gsm8k import complete, extract_answer, mcnemar_p, wilson_interval
from lora import (
    NF4, LoRAConfig, LoRALinear, NF4Linear, adapter_state_dict, count_parameters, d_by_k,
    dequantize_nf4, disable_lora, inject_lora, load_adapter, lora_layers, merge_lora, quantize_nf4,
    save_adapter, strip_lora, unmerge_lora)
from train_math import (
    LossScaler, Row, batch_loss, checkpoints, collate, demo_base, demo_problem, encode,
    encode_prompt, epoch_batches, format_prompt, hold_out, learning_rate_at, load_model,
    newest_state, parse_args, read_rows, read_table)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "bench"))
import section7

CPU = torch.device("cpu")
cases = pytest.mark.parametrize
pytestmark = pytest.mark.filterwarnings("ignore")
README = (HERE / "README.md").read_text(encoding="utf8")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- lora.py: the layer ---

def linear(kind, k, d):
    torch.manual_seed(0)
    layer = kind(k, d) if kind is nn.Linear else kind(d, k)
    nn.init.normal_(layer.bias)
    return layer


def perturb(model):
    """Change everything that trains, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@cases("dtype", DTYPES)
@cases("kind", [nn.Linear, Conv1D])
def test_zero_start_leaves_the_output_bit_identical(kind, dtype):
    """Step 0 must be the base (Sec. 4.1), with A and B in fp32 over any base."""
    base, x = linear(kind, 24, 16).to(dtype), torch.randn(5, 24).to(dtype)
    layer = LoRALinear(base, LoRAConfig(r=4, alpha=8, dropout=0.5))
    assert torch.equal(layer(x), base(x))
    A, B = layer.lora_A, layer.lora_B
    assert A.shape == (4, 24) and B.shape == (16, 4)
    assert A.dtype == B.dtype == torch.float32


def test_A_starts_as_the_weight_of_nn_linear_does():
    """It must be uniform within 1 / sqrt(k), on both sides of zero."""
    A = LoRALinear(nn.Linear(100, 100), LoRAConfig(r=100)).lora_A
    assert 0.099 < A.max() <= 0.1 and -0.1 <= A.min() < -0.099
    assert float(A.detach().std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.02)


@cases("rslora, scaling", [(False, 3), (True, 6)])
@cases("kind", [nn.Linear, Conv1D])
def test_forward_is_a_dense_layer_with_the_update_added(kind, rslora, scaling):
    """y must be (W0 + s B A) x + b (Eq. 3), s = alpha / r, or alpha / sqrt(r); dx, dA, dB too."""
    layer = LoRALinear(linear(kind, 24, 16), LoRAConfig(r=4, alpha=12, rslora=rslora))
    perturb(layer)
    weight = layer.base.weight if kind is nn.Linear else layer.base.weight.T
    x, A, B = torch.randn(3, 5, 24, requires_grad=True), layer.lora_A, layer.lora_B
    dense = F.linear(x, weight + scaling * B @ A, layer.base.bias)
    results = [(y, *torch.autograd.grad(y.sum(), (x, A, B))) for y in (layer(x), dense)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    close(layer.delta(), scaling * B @ A)


def test_dropout_is_on_the_input_of_the_adapter():
    """With probability p, in training alone, it must drop elements of x, never of W0 x."""
    layer = LoRALinear(linear(nn.Linear, 24, 16), LoRAConfig(r=4, alpha=8, dropout=0.25))
    perturb(layer)
    x = torch.randn(9, 24)
    for mode, p in ((True, 0.25), (False, 0)):
        torch.manual_seed(3)
        h = layer.train(mode)(x)
        torch.manual_seed(3)
        z = F.dropout(x, p) @ layer.lora_A.T
        close(h, layer.base(x) + 2 * z @ layer.lora_B.T)


# --- models, adapters, comparisons ---

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, max_position_embeddings=40,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
HEAD = dict(targets=("query", "value"), also_train=("classifier",))
DISTILBERT = dict(targets=("q_lin", "v_lin"), also_train=("pre_classifier", "classifier"))


def make(kind, **options):
    torch.manual_seed(0)
    task = AutoModelForSequenceClassification if "bert" in kind else AutoModelForCausalLM
    return task.from_config(AutoConfig.for_model(kind, **options)).eval()


def causal(kind, **options):
    return make(kind, **SMALL | {"head_dim": 8} | options)


def llama(**options):
    return causal("llama", **options)


def gpt2():
    return make("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)


def roberta():
    return make("roberta", **SMALL)


class SmallGPT(nn.Module):
    """A GPT of one's own, with names that are easily confused."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        names = ("q_proj", "eq_proj", "v_proj", "mlp")
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(16, 16) for name in names}) for _ in range(2))
        self.lm_head = nn.Linear(16, 64)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            q, k, v = block["q_proj"](x), block["eq_proj"](x), block["v_proj"](x)
            x = x + block["mlp"](F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.lm_head(x)


def in_dtype(model, dtype):
    if dtype == "nf4":
        quantize_nf4(model)
        return model
    return model.to(dtype)


def injected(build, **options):
    """Return a model with an adapter that does something."""
    model = build()
    inject_lora(model, LoRAConfig(**dict(r=4, alpha=8) | options))
    perturb(model)
    return model


def saved(folder, build=llama, **options):
    model = injected(build, **options)
    save_adapter(model, folder)
    return model


def put_aside(model, state):
    """Return a with block in which the wrappers wait, "merged" or "off"."""
    return disable_lora(model) if state == "off" else nullcontext(merge_lora(model))


def wrappers(model):
    return [layer for _, layer in lora_layers(model)]


def train(model, steps, parameters=None):
    """Return the losses of AdamW's steps on these parameters, or on all that train."""
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


def snapshot(model):
    """Return all bits of a model and what it computes."""
    return bits(model) | {"logits": logits(model)}


def same_bits(a, b):
    return a.keys() == b.keys() and not changed(a, b)


def changed(a, b):
    return {name for name in a
            if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])}


def logits(model):
    with torch.no_grad():
        output = model(IDS)
    return getattr(output, "logits", output)


def relative_error(a, b):
    """Return the norm of the difference, relative to that of b."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def refused(match, call, *args, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def patch(monkeypatch):
    """Return patch(owner, name=fake), which holds for one test."""
    def patch(owner, **fakes):
        for name, fake in fakes.items():
            monkeypatch.setattr(owner, name, fake)
    return patch


# --- lora.py: the paper ---

def test_base_never_changes():
    """Training must move each A, B and named head, and nothing else (Sec. 4.1)."""
    model = roberta().train()
    model(IDS).logits.sum().backward()  # gradients of pretraining
    inject_lora(model, LoRAConfig(r=4, **HEAD))
    before = bits(model)
    train(model, 3, model.parameters())  # the base too
    trained = {n for n in before if "lora_" in n or n.startswith("classifier.")}
    assert changed(bits(model), before) == trained


ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3,
            "nf4": 1e-6}


@cases("build, target", [(llama, "v_proj"), (gpt2, "c_attn"), (roberta, "query")])
@cases("dtype", ROUNDING)
def test_merging_rounds_once_and_the_base_comes_back_to_the_bit(build, target, dtype):
    """Merged W must be round(W0 + s B A), summed in fp32 or more, also when merged twice.

    Unmerged all must be as before; switched off, also by an exception, and taken off, the base.
    """
    heads = ("classifier",) if build is roberta and dtype != "nf4" else ()
    model = injected(lambda: in_dtype(build(), dtype), targets=target, also_train=heads)
    before, adapted, rounded = snapshot(model), logits(model), []
    for layer in wrappers(model):
        update = 2 * layer.lora_B @ layer.lora_A
        W0 = layer.weight if dtype == torch.float64 else layer.weight.float()
        rounded.append((W0 + (update.T if build is gpt2 else update)).to(layer.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):  # the sum stays fp32
        merge_lora(merge_lora(model))
    merged = [module.weight for name, module in model.named_modules() if name.endswith(target)]
    assert all(map(torch.equal, merged, rounded)) and len(merged) == 2
    assert relative_error(logits(model), adapted) < ROUNDING[dtype]
    assert same_bits(snapshot(unmerge_lora(model)), before)
    base = in_dtype(build(), dtype)
    with pytest.raises(KeyError), disable_lora(model):
        assert torch.equal(logits(model), logits(base))
        raise KeyError
    assert torch.equal(logits(model), adapted) and not torch.equal(adapted, logits(base))
    assert same_bits(bits(strip_lora(model)), bits(base))


def test_rank_r_reaches_the_best_change_of_rank_r():
    """What is left of a change of W must be its smaller singular values (Eckart and Young 1936)."""
    torch.manual_seed(0)
    layer, change = LoRALinear(nn.Linear(6, 8), LoRAConfig(r=3)), torch.randn(8, 6)
    optimizer = torch.optim.LBFGS([layer.lora_A, layer.lora_B], max_iter=500, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        rest = (layer.delta() - change).square().sum()
        rest.backward()
        return rest

    optimizer.step(loss)
    close(loss().detach(), torch.linalg.svdvals(change)[3:].square().sum(), atol=1e-3)


TINY = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            num_attention_heads=32, num_key_value_heads=4)


@cases("kind, sizes, options, trainable", [
    ("llama", TINY, {}, 1_126_400), ("llama", TINY, dict(r=64, targets="all-linear"), 50_462_720),
    ("roberta", {}, HEAD | dict(also_train="classifier.out_proj"), 294_912 + 768 * 2 + 2),
    ("distilbert", {}, DISTILBERT, 739_586),
    ("llama", dict(hidden_size=12288, num_hidden_layers=96), {}, 37_748_736)],
    ids=["TinyLlama", "all linear layers", "RoBERTa", "DistilBERT", "GPT-3"])
def test_parameter_counts_of_the_published_models(kind, sizes, options, trainable):
    with torch.device("meta"):
        model = make(kind, **sizes)
    inject_lora(model, LoRAConfig(**options))
    found, total = count_parameters(model)
    assert found == trainable
    assert sizes != TINY or total == 1_100_048_384 + trainable


def test_the_snippet_of_the_readme_adapts_a_gpt(monkeypatch):
    """The README's snippet must work, also without lora.py's appendix."""
    source = Path(lora.__file__).read_text(encoding="utf8")
    source = source[:source.index("# --- appendix: a 4-bit base (NF4) ---\n")]
    assert "nf4" not in source.split('"""', 2)[2].lower()
    core = ModuleType("lora")
    monkeypatch.setitem(sys.modules, "lora", core)
    exec(source, vars(core))
    snippet = next(s for s in re.findall(r"```python\n(.*?)```", README, re.S) if "inject" in s)
    losses = []

    def loss_of(model, batch):
        losses.append(F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:]))
        return losses[-1]

    scope = {"MyModel": SmallGPT, "batches": [IDS] * 60, "loss_of": loss_of}
    exec(snippet, scope)
    assert loss_of(scope["model"], IDS) < losses[0] - 0.2
    assert scope["model"].state_dict().keys() == SmallGPT().state_dict().keys()


# --- lora.py: a variant is a subclass ---

class DoRALinear(LoRALinear):
    """Liu et al. 2024 (arXiv:2402.09353): rows of W0 + delta have trained lengths. No dropout."""
    options = {"use_dora": True}

    def __init__(self, base, config):
        super().__init__(base, config)
        W0 = d_by_k(base.weight.detach(), base)
        self.magnitude = nn.Parameter(W0.float().norm(dim=1))

    def adapter_parameters(self):
        return super().adapter_parameters() | {"lora_magnitude_vector": self.magnitude}

    def merged_weight(self, W0):
        W = W0 + self.delta()
        return self.magnitude[:, None] * W / W.norm(dim=1, keepdim=True).detach()

    def forward(self, x):
        W = self.merged_weight(d_by_k(self.base.weight, self.base).float())
        return F.linear(x, W.to(x.dtype), self.base.bias)


def test_dora_as_a_subclass_merges_and_is_told_from_lora():
    """That it trains and is saved as PEFT's does, the adapter files' first test shows."""
    inject_lora(model := gpt2(), LoRAConfig(r=4, alpha=8, targets="c_attn"), DoRALinear)
    perturb(model)
    unmerged = logits(model)
    close(logits(merge_lora(model)), unmerged)
    save_adapter(unmerge_lora(model), "dora")
    refused("use_dora = True is not supported", load_adapter, gpt2(), "dora")
    saved("plain", gpt2, targets="c_attn")
    refused("use_dora = None is not supported", load_adapter, gpt2(), "plain", DoRALinear)


# --- lora.py: which layers can be adapted ---

@cases("bad", [dict(r=0), dict(r=1.5), dict(r=True), dict(alpha=0), dict(alpha=math.nan),
               dict(dropout=1.0), dict(targets=()), dict(rslora="false")])
def test_config_refuses_values_out_of_range(bad):
    refused(f"^{next(iter(bad))} = .* is out of range$", lambda: LoRAConfig(**bad))


def tied_by_hand():
    model = SmallGPT()
    model.unembed = nn.Linear(16, 64, bias=False)
    model.unembed.weight = model.embedding.weight
    return model


FOUR = ("q_proj", "eq_proj", "v_proj", "mlp")


@cases("build, options, names", [
    (SmallGPT, dict(targets=["q_proj"]), ["blocks.0.q_proj", "blocks.1.q_proj"]),
    (SmallGPT, dict(targets="all-linear", also_train="blocks.1"), [f"blocks.0.{n}" for n in FOUR]),
    (tied_by_hand, dict(targets="all-linear"), [f"blocks.{i}.{n}" for i in (0, 1) for n in FOUR])])
def test_targets_match_whole_names(build, options, names):
    """q_proj must not match eq_proj; all-linear must leave head, tied layers and also_train."""
    assert inject_lora(build(), LoRAConfig(**options)) == names


def offloaded():
    model = llama()
    model.lm_head.to("meta")
    return model


def sharded(model):
    """Return the model under the name that fully_shard gives to its class."""
    model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
    return model


def distilbert():
    return make("distilbert", vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)


@cases("build, options, message", [
    (SmallGPT, dict(targets=("q_proj", "q_porj")),
     "'q_porj' matches none of these: eq_proj, lm_head, mlp, q_proj, v_proj"),
    (lambda: nn.Linear(8, 8), dict(targets="all-linear"), "no linear layer"),
    (lambda: llama(tie_word_embeddings=True), dict(targets=("q_proj", "lm_head")), "leave it out"),
    (offloaded, dict(also_train="lm_head"), "offloaded"),
    (distilbert, DISTILBERT | dict(also_train="classifier"), "pre_classifier.*add it"),
    (lambda: in_dtype(roberta(), "nf4"), HEAD, "buffers"),
    (lambda: nn.DataParallel(llama()), {}, "inject first, then wrap"),
    (lambda: sharded(SmallGPT()), {}, "inject first, then wrap"),
    (lambda: injected(llama), {}, "strip_lora")])
def test_what_cannot_be_adapted_is_refused_with_the_model_untouched(build, options, message):
    """Each would change another layer too, be lost on saving, or train nothing."""
    model = build()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    refused(message, inject_lora, model, LoRAConfig(**options))
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


def test_layers_are_known_by_their_class():
    """Another Conv1D, and layers that are read but never called, must be left alone."""
    conv = type("Conv1D", (nn.Conv1d,), {})(8, 8, 3)  # not that of transformers
    shared, head = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(conv, nn.TransformerEncoderLayer(8, 2, 16), shared, shared, head)
    model.get_output_embeddings = lambda: head
    assert inject_lora(model, LoRAConfig(targets="all-linear")) == ["2"]
    assert model[2] is model[3] is not shared  # one layer in two places stays one


def test_all_linear_leaves_out_routers():
    """What chooses the experts must be neither adapted nor packed; the gate of a SwiGLU must be."""
    def linear():
        return nn.Linear(8, 8)

    model = nn.ModuleDict({
        "router": linear(), "choice": type("TopKRouter", (nn.Linear,), {})(8, 8),
        "moe": nn.ModuleDict({"gate": linear(), "experts": nn.ModuleList([linear()])}),
        "mlp": nn.ModuleDict({"gate": linear(), "up": linear()})})
    names = ["moe.experts.0", "mlp.gate", "mlp.up"]
    assert quantize_nf4(copy.deepcopy(model)) == names
    assert inject_lora(model, LoRAConfig(targets="all-linear")) == names


def test_layers_that_mamba_does_not_call_are_left_out():
    model = make("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    names = inject_lora(model, LoRAConfig(r=2, targets="all-linear"))
    train(model, 2)
    assert all(layer.lora_B.any() for layer in wrappers(model))
    assert {name.split(".")[-1] for name in names} == {"in_proj"}


@pytest.mark.filterwarnings("error")
def test_what_would_train_badly_or_be_lost_is_warned_of():
    with pytest.warns(match="classifier.* trains in 16 bits"):
        inject_lora(roberta().half(), LoRAConfig(**HEAD))
    saved("adapter", roberta, **HEAD)
    with pytest.warns(match="classifier.* trains in 16 bits"):
        load_adapter(roberta().bfloat16(), "adapter")
    inject_lora(SmallGPT().train(), LoRAConfig())  # and nothing else is
    for training in (True, False):  # statistics stand still in eval mode
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(training)
        with pytest.warns(match="BatchNorm") if training else nullcontext():
            inject_lora(model, LoRAConfig(targets="0"))


def test_a_compiled_layer_is_adapted_swapped_and_saved_under_its_own_name():
    model, base = SmallGPT(), logits(SmallGPT())
    first, second = model.blocks
    first["mlp"] = torch.compile(first["mlp"], backend="eager")  # before injecting, and after
    assert len(inject_lora(model, LoRAConfig(r=2, targets=("q_proj", "mlp")))) == 4
    perturb(model)
    second["mlp"] = torch.compile(second["mlp"], backend="eager")
    adapted = logits(model)
    assert relative_error(adapted, base) > 0.1
    with disable_lora(model):
        assert torch.equal(logits(model), base)
    close(logits(merge_lora(model)), adapted)
    assert torch.equal(logits(unmerge_lora(model)), adapted)
    save_adapter(nn.DataParallel(torch.compile(model, backend="eager")), ".")
    load_adapter(plain := SmallGPT(), ".")
    close(logits(plain), adapted)


# --- lora.py: merged, switched off, taken off ---

@cases("state, message", [("merged", "while merged: .*strip_lora"), ("off", "leave the block")])
def test_no_wrapper_can_be_used_while_it_waits(state, message):
    model = saved(".")
    with put_aside(model, state):
        calls = [(inject_lora, model, LoRAConfig()), (save_adapter, model, "."),
                 (load_adapter, model, "."), (adapter_state_dict, model),
                 (disable_lora(model).__enter__,), (quantize_nf4, model), (dequantize_nf4, model)]
        if state == "off":
            calls += [(merge_lora, model), (strip_lora, model)]
        before = logits(model)
        for call, *args in calls:
            refused(message, call, *args, error=RuntimeError)
        assert torch.equal(logits(model), before)


def test_no_adapter_is_a_clear_error():
    for call, *more in ((merge_lora,), (save_adapter, ".")):
        refused("no adapter.*inject_lora", call, llama(), *more)


@cases("dtype", [torch.float32, "nf4"])
@cases("state", ["merged", "off"])
def test_casts_moves_and_modes_reach_what_waits(state, dtype):
    """All but the adapter and 4-bit codes must follow, as if the wrappers had stood there."""
    def build():
        return injected(lambda: in_dtype(roberta(), dtype), targets="query", dropout=0.5)

    model, wanted = build(), build().bfloat16()
    with put_aside(model, state):
        model.bfloat16().train()
    assert same_bits(bits(unmerge_lora(model)), bits(wanted))
    cast = {name.rpartition(".")[2] for name in changed(bits(model), bits(build()))}
    assert cast.isdisjoint(["lora_A", "lora_B", "codes", "absmax", "pairs"])
    assert all(module.training for module in model.modules())
    with put_aside(model, state):
        model.to("meta")
    assert all(tensor.is_meta for tensor in bits(unmerge_lora(model)).values())


def test_a_copy_of_a_merged_model_can_be_unmerged():
    model = injected(llama)
    before = snapshot(model)
    twin = unmerge_lora(pickle.loads(pickle.dumps(merge_lora(model))))
    assert same_bits(snapshot(twin), before)
    assert not wrappers(model)


def test_a_head_is_cast_while_its_other_weights_wait():
    """Both sets of weights must be in the model's dtype, and stay the optimizer's parameters."""
    model = injected(roberta, **HEAD).bfloat16()
    adapted, before = logits(model), [p for p in model.parameters() if p.requires_grad]
    with disable_lora(model):
        assert torch.equal(logits(model), logits(roberta().bfloat16()))
        model.float()
    unmerge_lora(merge_lora(model))
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert torch.equal(logits(model.bfloat16()), adapted)


@cases("dtype", [torch.float32, "nf4"])
def test_hooks_fire_once_a_call_in_every_state(dtype):
    """Registered before quantising and injecting, they must fire once, and go when removed."""
    model, calls = gpt2(), []
    layer = model.transformer.h[0].attn.c_attn
    handle = layer.register_forward_hook(lambda *_: calls.append("fired"))

    def fired():
        calls.clear()
        logits(model)
        return len(calls)

    inject_lora(in_dtype(model, dtype), LoRAConfig(targets="c_attn"))
    for change in (unmerge_lora, merge_lora, unmerge_lora):
        change(model)
        assert fired() == 1
    with disable_lora(model):
        assert fired() == 1
    handle.remove()
    assert fired() == 0
    wrappers(model)[0].register_forward_hook(lambda module, args, output: 2 * output)
    refused("has a forward hook", merge_lora, model)  # it would not run while merged


def custom(forward):
    """Return a layer whose forward is another one, and whose weight a triangular mask fits."""
    layer = type("Custom", (nn.Linear,), {"forward": forward})(16, 16)
    layer.weight.data.tril_()
    return layer


def doubled():
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


OTHERS = {
    "hooked": doubled,
    "scaled": lambda: custom(lambda self, x: F.linear(x, 1.015 * self.weight, self.bias)),
    "masked": lambda: custom(lambda self, x: F.linear(x, self.weight.tril(), self.bias)),
    "two outputs": lambda: custom(lambda self, x: (F.linear(x, self.weight, self.bias), None)),
    "fewer outputs": lambda: custom(lambda self, x: x @ self.weight[:3]),
    "computed weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    "meta": lambda: nn.Linear(16, 16, device="meta")}


@cases("base", OTHERS.values(), ids=OTHERS)
def test_merging_refuses_what_is_no_plain_product(base):
    model = injected(SmallGPT, targets="mlp")
    wrappers(model)[1].base = base()
    refused("cannot merge into this", merge_lora, model)
    assert len(wrappers(model)) == 2 and not lora.modules_with(model, "lora_waiting")


def off_and_on(model):
    with disable_lora(model):
        pass


@cases("dtype", [torch.float32, "nf4"])
@cases("change", [merge_lora, unmerge_lora, off_and_on])
def test_after_an_interrupt_at_any_line_everything_can_be_restored(change, dtype):
    """As by Ctrl-C or out of memory, in each function of lora.py that changes a state."""
    model = injected(lambda: in_dtype(SmallGPT(), dtype), targets="mlp", also_train="lm_head")
    before = snapshot(model)
    names = ["merge_lora", "disable_lora", "merge_layer", "replace_modules", "unmerge_lora",
             "use_weights"]
    interrupted = left = 0

    def interrupt(frame, event, arg):
        nonlocal left
        if frame.f_code.co_name not in names:
            return None
        left -= event == "line"
        if left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    while True:
        if change is unmerge_lora:
            merge_lora(model)
        left = interrupted = interrupted + 1
        sys.settrace(interrupt)
        try:
            change(model)
            break
        except KeyboardInterrupt:
            if wrappers(model) and lora.modules_with(model, "lora_waiting"):  # half of it is done
                for call in (merge_lora, strip_lora):
                    refused("call unmerge_lora", call, model, error=RuntimeError)
            assert same_bits(snapshot(unmerge_lora(model)), before), interrupted
        finally:
            sys.settrace(None)
    assert interrupted > 20


def test_a_merge_that_fails_undoes_itself():
    """As when memory runs out in the second layer."""
    model = injected(SmallGPT, targets="mlp")
    before = snapshot(model)
    wrappers(model)[1].merged_weight = None  # to call it fails
    refused("not callable", merge_lora, model, error=TypeError)
    assert same_bits(snapshot(model), before)


def saved_for_backward(function, but=()):
    """Return the bytes that function() keeps for backward, each tensor once, but not of these."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    others = {tensor.untyped_storage().data_ptr() for tensor in but}
    return sum(size for place, size in kept.items() if place not in others)


@cases("wrap", [lambda layer: layer, NF4Linear])
def test_an_adapted_layer_keeps_its_input_once(wrap):
    """For backward it may keep x, and what is as narrow as the rank."""
    layer, calls = LoRALinear(wrap(nn.Linear(96, 80)), LoRAConfig(r=4, alpha=8)), []
    x = torch.randn(50, 96, requires_grad=True)
    assert saved_for_backward(lambda: layer(x), [x, layer.weight]) < 4 * 50 * 80
    layer.base.register_forward_hook(lambda *_: calls.append(1))
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(calls) == 1  # recomputing stops before the base


def test_copies_of_the_adapter_go_back():
    model = injected(roberta, **HEAD)
    before = adapter_state_dict(model)
    perturb(model)
    wrappers(model)[0].lora_A.requires_grad_(False)  # a frozen A belongs to the adapter too
    assert changed(adapter_state_dict(model), before) == before.keys()
    model.load_state_dict(before, strict=False)
    assert same_bits(adapter_state_dict(model), before)


# --- lora.py: adapter files ---

def weights(folder):
    return safetensors.torch.load(Path(folder, WEIGHTS).read_bytes())


def adapter_config(folder="."):
    return json.loads(Path(folder, CONFIG).read_text())


def edit_config(**changes):
    Path(CONFIG).write_text(json.dumps(adapter_config() | changes))


def edit_tensors(change):
    tensors = weights(".")
    change(tensors)
    safetensors.torch.save_file(tensors, WEIGHTS)


@cases("build, options", [
    (llama, dict(target_modules=r".*layers\.1\..*\.(q|v)_proj", use_rslora=True)),
    (llama, dict(target_modules=["q_proj", "nosuch"], layers_to_transform=0)),
    (llama, dict(target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])),
    (llama, dict(target_modules=["q_proj", "lm_head"])),
    (gpt2, dict(target_modules=["c_attn"])),
    (roberta, dict(target_modules=["query", "value"], task_type="SEQ_CLS")),
    # PEFT compares letters, and trains pre_classifier too.
    (distilbert, dict(target_modules=["q_lin"], task_type="SEQ_CLS")),
    (llama, dict(target_modules=["q_proj"], use_dora=True)),
    (gpt2, dict(target_modules=["c_attn"], use_dora=True))],
    ids=["pattern", "layer", "heads", "adapted head", "Conv1D", "RoBERTa", "DistilBERT", "DoRA",
         "DoRA of Conv1D"])
def test_adapters_are_read_both_ways_and_train_as_those_of_peft(build, options, peft):
    """Logits must agree before and after 20 AdamW steps, whose losses are within 1e-4."""
    layer = DoRALinear if "use_dora" in options else LoRALinear
    config = peft.LoraConfig(r=4, lora_alpha=8, **options)
    theirs = peft.get_peft_model(build(), config).eval()
    perturb(theirs)
    theirs.save_pretrained(".")
    load_adapter(model := build(), ".", layer)
    close(logits(model), logits(theirs))
    assert train(model, 20) == pytest.approx(train(theirs, 20), abs=1e-4)
    save_adapter(model, "ours")
    again = peft.PeftModel.from_pretrained(build(), "ours").eval()
    close(logits(again), logits(model))
    adapted = [name for name, _ in again.named_parameters() if "lora_A" in name]
    assert len(adapted) == len(wrappers(model))  # no other layer has an ending of target_modules


@cases("build, first, second", [
    (llama, {}, dict(targets="all-linear", rslora=True)), (roberta, HEAD, dict(targets="dense")),
    (roberta, HEAD | dict(also_train=("classifier", "classifier.dense")), HEAD),
    (gpt2, dict(r=numpy.int64(2), alpha=numpy.float32(4), targets="c_fc"), dict(targets="c_proj"))])
def test_a_loaded_adapter_is_exact_and_replaces_any_other(build, first, second):
    """Bits and config must come back; a replaced head goes back to its start."""
    model = build()
    for options in (first, second, first):
        wanted = saved("adapter", build, **options)
        config, loaded = wrappers(wanted)[0].config, load_adapter(model, "adapter")
        assert dataclasses.replace(loaded, targets=config.targets) == config
        assert same_bits(bits(model), bits(wanted))
        assert torch.equal(logits(strip_lora(copy.deepcopy(model))), logits(build()))
        save_adapter(model, "again")
        assert adapter_config("again") == adapter_config("adapter")
        # PEFT 0.6 and 0.7 refuse the key.
        assert ("use_rslora" in adapter_config("again")) == config.rslora
    assert sorted(os.listdir("again")) == [CONFIG, WEIGHTS]


def test_loading_over_an_adapter_of_the_same_kind_keeps_its_parameters():
    """An optimizer that was made before must go on training them; another kind gets new ones."""
    model = roberta()
    inject_lora(model, LoRAConfig(r=4, alpha=8, **HEAD))
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for alpha in (8, 9):
        wanted = saved("adapter", roberta, alpha=alpha, **HEAD)
        load_adapter(model, "adapter")
        assert same_bits(snapshot(model), snapshot(wanted))
        kept = [name for name, p in model.named_parameters() if p is before.get(name)]
        assert kept == [*before] * (alpha == 8)
    saved("third", roberta, r=2, **HEAD)
    with pytest.warns(match="create the optimizer again"):
        load_adapter(model.train(), "third")
    with warnings.catch_warnings(action="error"):  # in evaluation there is no optimizer
        load_adapter(model.eval(), "adapter")


def t5():
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=32, d_ff=48, num_layers=1, d_kv=8)
    return transformers.T5ForConditionalGeneration(config)


@cases("build, options, task", [
    (llama, {}, "CAUSAL_LM"), (distilbert, DISTILBERT, "SEQ_CLS"), (SmallGPT, {}, None),
    (roberta, dict(targets="query"), None),  # for SEQ_CLS PEFT wants the head in the file
    (t5, dict(targets="q"), "SEQ_2_SEQ_LM")])
def test_the_task_is_written_for_the_auto_classes_of_peft(build, options, task):
    """And the targets as endings: no other layer has these."""
    saved(".", build, **options)
    targets = LoRAConfig(**options).targets
    assert (adapter_config()["task_type"], adapter_config()["target_modules"]) == (task, [*targets])


def test_a_saved_classifier_opens_by_an_auto_class_of_peft(peft):
    roberta().save_pretrained("base")
    model = injected(lambda: AutoModelForSequenceClassification.from_pretrained("base"), **HEAD)
    save_adapter(model.eval(), "adapter")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained("adapter")
    close(logits(theirs.eval()), logits(model))


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "peft_type = 'IA3'": lambda: edit_config(peft_type="IA3"),
    f"\\({10**12}, 32\\) in the model": lambda: edit_config(r=10**12),  # and nothing is allocated
    "x.base_model.*missing in the model": lambda: edit_tensors(
        lambda t: t.update({f"x.{KEY}": t[KEY] + 1})),
    "q_proj.lora_B.*missing in adapter_model": lambda: edit_tensors(
        lambda t: t.pop(KEY.replace("_A", "_B"))),
    "NaN, infinity or no floats": lambda: edit_tensors(lambda t: t[KEY].fill_(math.inf)),
    "deserializing": lambda: os.truncate(WEIGHTS, 99),
    "Expecting": lambda: os.truncate(CONFIG, 1),
    "no attribute": lambda: Path(CONFIG).write_text("[]")}


@cases("message", BROKEN)
def test_a_broken_adapter_is_refused_with_the_model_untouched(message):
    model = saved(".")
    before = snapshot(model)
    BROKEN[message]()
    refused(f"no adapter for this model: .*{message}", load_adapter, model, ".")
    assert same_bits(snapshot(model), before)


def mutant(files, rng):
    """Return both files with one change: an option, a cut or a bit."""
    weights, config = map(bytearray, files)
    kind, part = rng.randrange(3), rng.choice([weights, config])
    place = rng.randrange(min(len(part), 4000))  # of the weights mostly the header
    if kind == 0:
        options = json.loads(config)
        options[rng.choice([*options, "use_dora", "exclude_modules"])] = rng.choice(
            [None, True, -1, 10**400, math.nan, "", "q_proj", [], [["q_proj"]], {}])
        config = json.dumps(options).encode()
    elif kind == 1:
        del part[place:]
    else:
        part[place] ^= 1 << rng.randrange(8)
    return weights, config


def test_mutated_adapters_load_exactly_or_leave_the_model_alone():
    saved(".", SmallGPT)
    paths = Path(WEIGHTS), Path(CONFIG)
    whole, rng, loaded = [path.read_bytes() for path in paths], random.Random(0), 0
    model = injected(SmallGPT, targets="mlp")
    before, plain = bits(model), bits(SmallGPT())
    for i in range(1000):
        for path, content in zip(paths, mutant(whole, rng)):
            path.write_bytes(content)
        try:
            read = load_adapter(model, ".")
        except ValueError:
            assert same_bits(bits(model), before), i
            continue
        loaded += 1
        options, tensors = json.loads(paths[1].read_bytes()), weights(".")
        assert (read.r, read.alpha) == (options["r"], options["lora_alpha"])
        for key, tensor in adapter_state_dict(model).items():
            assert torch.equal(tensor, tensors.pop(f"base_model.model.{key}.weight")), i
        assert not tensors and same_bits(bits(strip_lora(model)), plain), i
        model = injected(SmallGPT, targets="mlp")
    assert loaded and loaded < 1000


@pytest.mark.filterwarnings("error")
@cases("there", [torch.bfloat16, "nf4"])
def test_another_base_warns_and_another_dtype_does_not(there):
    saved(".", SmallGPT)
    load_adapter(in_dtype(SmallGPT(), there), ".")
    with pytest.warns(match="another base"):
        load_adapter(in_dtype(SmallGPT(seed=1), there), ".")


def test_saving_refuses_what_would_not_load_again():
    inject_lora(model := llama(), LoRAConfig())
    with pytest.warns(match="B is still zero in model.layers.0"):
        save_adapter(model, ".")
    wrappers(model)[1].lora_A.data[0, 0] = math.nan
    refused("layers.0.self_attn.v_proj.lora_A.* NaN", save_adapter, model, ".")
    model.model.norm.requires_grad_(True)
    refused("model.norm.weight trains.*also_train", save_adapter, model, ".")
    mlp = model.model.layers[1].mlp
    plain = mlp.up_proj
    for kind, config in ((LoRALinear, LoRAConfig(r=2)), (DoRALinear, LoRAConfig())):
        mlp.up_proj = kind(plain, config)
        refused("one config and one class of layer", save_adapter, model, ".")
    refused("each process holds a part", save_adapter, sharded(model), ".")


def test_an_interrupted_save_leaves_no_mixed_adapter(patch):
    """New weights must not lie beside an old config: without one nothing loads."""
    def interrupted(*_):
        raise KeyboardInterrupt

    model = saved(".")
    patch(Path, replace=interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, ".")
    refused(CONFIG, load_adapter, model, ".")


def test_the_base_of_a_head_in_a_file_must_be_the_same():
    """Up to the rounding of another dtype."""
    saved(".", targets="lm_head")
    name, weight = "base_model.model.lm_head.base_layer.weight", llama().lm_head.weight.detach()
    edit_tensors(lambda tensors: tensors.update({name: weight}))
    load_adapter(llama().bfloat16(), ".")
    edit_tensors(lambda tensors: tensors.update({name: 1.1 * weight}))
    refused("another base weight for lm_head", load_adapter, llama().bfloat16(), ".")


def test_every_option_of_peft_is_honoured_harmless_or_refused(peft):
    """What changes the adapter must be refused by name, as must an option that is unknown."""
    model = saved(".")
    fields = dataclasses.asdict(peft.LoraConfig(**adapter_config()))
    edit_config(**{key: value for key, value in fields.items() if isinstance(value, (int, str))})
    for start in (True, False, None, "gaussian"):  # what A was before training
        edit_config(init_lora_weights=start)
        load_adapter(model, ".")  # and the defaults change nothing
    refusals = """
        bias lora_bias use_dora use_qalora use_bdlora alora_invocation_tokens arrow_config
        rank_pattern alpha_pattern layer_replication megatron_config trainable_token_indices
        target_parameters loftq_config corda_config init_lora_weights nosuch""".split()
    for option in {*refusals} | {*fields} - lora.ACCEPTED:
        saved(".")
        edit_config(**{option: "pissa"})
        refused(f"{option} = 'pissa' is not supported", load_adapter, model, ".")


# --- lora.py: a 4-bit base ---

def test_nf4_takes_the_nearest_value_in_4_25_bits():
    layer = linear(nn.Linear, 320, 256)
    weight, packed = layer.weight.detach(), NF4Linear(layer)
    blocks, back = weight.view(-1, 64), packed.weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / absmax)[..., None] - torch.tensor(NF4)).abs().amin(-1)
    assert ((back - blocks).abs() <= (nearest + 1 / 256) * absmax).all()  # absmax in bfloat16
    assert 8 * (packed.codes.nbytes + packed.absmax.nbytes) == 4.25 * weight.numel()
    # DDP cannot send integers of 16 bits.
    assert {buffer.dtype for buffer in packed.buffers()} == {
        torch.uint8, torch.int32, torch.float32}
    ragged = nn.Linear(7, 3)
    nn.init.zeros_(ragged.weight)
    assert torch.equal(NF4Linear(ragged).weight, ragged.weight)


def test_packing_on_fake_tensors_changes_nothing_afterwards():
    """Tools that trace a model without its data run such tensors through the same code."""
    layer, x = nn.Linear(64, 8), torch.randn(2, 64)
    before = NF4Linear(layer)(x)
    with FakeTensorMode():
        NF4Linear(nn.Linear(64, 8))(torch.randn(2, 64))
    assert torch.equal(NF4Linear(layer)(x), before)


@cases("dtype", DTYPES)
@cases("kind", [nn.Linear, Conv1D])
def test_nf4_computes_and_differentiates_like_the_dense_layer(kind, dtype):
    layer = NF4Linear(linear(kind, 40, 24).to(dtype).eval())
    dense = layer.to_dense()
    assert type(dense) is kind and not layer.training and not dense.training
    x = torch.randn(3, 5, 40, dtype=dtype, requires_grad=True)
    assert torch.equal(layer(x), dense(x))
    gradients = [torch.autograd.grad(net(x).sum(), x)[0] for net in (layer, dense)]
    close(*gradients, atol=1e-6 if dtype == torch.float32 else 0.1)


@cases("build", [llama, gpt2])
def test_lora_over_nf4_trains_and_goes_back(build):
    model, plain = build(), build()
    names, base = quantize_nf4(model), logits(model)
    assert count_parameters(model)[1] == count_parameters(plain)[1]
    assert inject_lora(model, LoRAConfig(r=4, targets="all-linear")) == names
    before = bits(model)
    train(model, 3)
    assert changed(bits(model), before) == adapter_state_dict(model).keys()
    dequantize_nf4(strip_lora(model))
    assert count_parameters(model)[0] == 0
    assert torch.equal(logits(model), base)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_quantising_leaves_what_it_must():
    """Head and skip must stay dense; tied layers and other kinds too, with a warning."""
    model = llama()
    assert len(quantize_nf4(model, "q_proj")) == 12
    assert quantize_nf4(model, ()) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    inject_lora(model, LoRAConfig())
    refused("quantise first", quantize_nf4, model)
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    layers[0].__class__ = type("Own", (nn.Linear,), {})
    nn.init.constant_(layers[1].weight, math.nan)
    layers[2].weight = layers[3].weight
    prune.l1_unstructured(layers[4], "weight", 0.5)  # a hook computes it
    with pytest.warns(match="stays dense") as caught:
        assert quantize_nf4(layers) == ["5"]
    assert [str(warning.message)[0] for warning in caught] == ["0", "1", "2", "3", "4"]


# --- train_math.py: helpers ---

ROW = list(range(10, 26))  # 16 token ids


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder: an untrained base, train.jsonl and test.jsonl."""
    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    problems = [demo_problem(rng, two_steps=i % 2 == 0) for i in range(80)]
    for name, part in (("train", problems[:64]), ("test", problems[64:])):
        lines = [json.dumps(problem) + "\n" for problem in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    texts = [f"{format_prompt(p['question'])} {p['answer']}" for p in problems]
    model, tokenizer = demo_base(texts)
    torch.manual_seed(0)
    model.config.update(dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8))
    type(model)(model.config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def load(tiny):
    return load_model(f"{tiny}/base", torch.float32, CPU)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def adapted(tiny, **options):
    """Return a model with an adapter that is not zero, in training mode, and its rows."""
    model, tokenizer = load(tiny)
    torch.manual_seed(0)
    injected(lambda: model, **options)
    return model.train(), encode(read_rows(f"{tiny}/train.jsonl", "train"), tokenizer, 512)


def command(tiny, *flags):
    common = "--run-name run --device cpu --dtype float32 --lr 1e-2 --r 4 --batch-size 4"
    files = f"--model {tiny}/base --data {tiny}/train.jsonl --val-samples 0"
    return " ".join([files, common, "--grad-accum 2", *flags]).split()


def run(tiny, *flags):
    """Run main() in this process; return the last checkpoint's folder."""
    return train_math.main(parse_args(command(tiny, *flags)))


def torchrun(script, flags):
    """Run two processes on gloo; each rank's stderr is in the result."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*call, "--", str(script), *flags], capture_output=True, text=True)


def metrics(name="run"):
    return [json.loads(line) for line in open(f"runs/{name}/metrics.jsonl")]


def state(folder):
    return torch.load(train_math.state_path(Path(folder)))


def moments(folder):
    """Return AdamW's state of each weight."""
    return state(folder)["optimizer"]["state"].values()


def write_rows(name, *rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- train_math.py: rows ---

def test_rows_of_all_columns_and_kinds_of_file():
    rows = [{"query": "2024-01-01", "response": "r"}, {"question": "q", "answer": "r\u2028s"},
            {"prompt": "p", "completion": "c"},
            {"instruction": "do", "input": "it", "output": "so"},
            {"instruction": "do", "context": "it", "output": None, "response": "so"}]
    wanted = [("2024-01-01", "r"), ("q", "r\u2028s"), ("p", "c"), ("do\nit", "so"),
              ("do\nit", "so")]
    Path("x.json").write_text(json.dumps(rows))
    Path("x.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_rows("x.json", "train") == wanted and read_rows("x.jsonl", "train", 2) == wanted[:2]
    Path("x.csv").write_text('\ufeffquestion,answer\nNA,"b,\n2"\n', encoding="utf8")
    assert read_rows("x.csv", "train") == [("NA", "b,\n2")]
    from pyarrow import parquet, table
    parquet.write_table(table({"query": ["q"], "response": ["r"]}), "x[0].parquet")
    assert read_rows("x[0].parquet", "train") == [("q", "r")]


def test_empty_answers_are_left_out_and_only_calculator_marks_removed(capsys):
    """Alpaca has 28 empty outputs; code between << and >> must stay."""
    code = 'std::cout << "a"; std::cin >> b; y = 1 << 2 >> 3'
    answers = [" ", None, ".5*48=<<.5*48=24>>24", code]
    write_rows("x.jsonl", *({"question": "q", "choices": 4, "answer": a} for a in answers))
    assert [a for _, a in read_rows("x.jsonl", "t")] == [".5*48=24", code]
    assert len(read_rows("x.jsonl", "t", 1)) == 1
    said = "4 rows; of the first 4, 2 without an answer are left out; columns not read: choices\n"
    assert said in capsys.readouterr().out


USER, BOT = dict(role="user", content="1+1?"), dict(role="assistant", content="2")
PAIR = dict(question="a", answer="b")


@cases("row, message", [
    (dict(text="a"), "columns are .'text'., expected messages or one of"),
    (PAIR | dict(answer="\ud83d"), "surrogate"),
    (PAIR | dict(context="c"), "has context, which is not read beside question"),
    (dict(instruction="a", output="b", input=math.nan), "input is nan, expected text"),
    (dict(messages=[]), "need an assistant turn that is not the first"),
    (dict(messages=[BOT, USER, BOT]), "found .'assistant', 'user', 'assistant'."),
    (dict(messages=[USER, BOT | dict(content=None)]), "content is None, expected text"),
    (dict(messages=[USER, BOT], system="c", history=["d"], tools=["e"]),
     "messages and system, history, tools cannot be used together"),
    (dict(messages=[USER, BOT | dict(tool_calls=[1])]), "have tool_calls, which is not supported"),
    (dict(messages=[USER, BOT | dict(weight=0)]), "have weight, which is not supported")])
def test_a_row_that_is_not_understood_is_refused_with_its_place(row, message):
    write_rows("x.jsonl", PAIR, row)
    refused(f"--data x.jsonl: row 2: .*{message}", read_rows, "x.jsonl", "train")


@cases("name, text, message", [
    ("x.csv", "query,response\n1,2,3\n", "row 1: its columns are"),
    ("x.csv", 'question,answer\na,b\n1+1?,"two\n2+2?,4\n', "row 2: unexpected end"),
    ("x.jsonl", '{"question": "a", "answer": "b"}\n\n{broken\n', "row 2: Expecting"),
    ("x.jsonl", json.dumps(PAIR) + "\n" + json.dumps(dict(messages=[USER, BOT])),
     "only some rows have messages"),
    ("x.jsonl", "\xff", "expected text in UTF-8"),
    ("x.tsv", "query\tresponse\n1\t2\n", "expected a file that ends in .jsonl, .json")])
def test_a_bad_file_is_one_clear_error(name, text, message):
    Path(name).write_text(text, encoding="latin1")
    refused(f"--data {name}: .*{message}", read_rows, name, "train")


def test_subset_and_split_of_a_data_set_on_the_hub(patch):
    """GSM8K and GLUE need a subset; scores must come from the split asked for."""
    import datasets
    patch(datasets, load_dataset=lambda *what, split: [
        dict(question=f"{what} {split}", answer="1", sentence=f"{what} {split}", label=1)])
    assert read_rows("openai/gsm8k", "test") == [("('openai/gsm8k', 'main') test", "1")]
    assert read_rows("a/b", "train") == [("('a/b', None) train", "1")]
    assert train_sst2.read_sentences("a/glue", "test") == [("('a/glue', 'sst2') test", 1)]


def test_a_hub_that_cannot_be_reached_is_one_line(patch):
    import datasets
    import huggingface_hub.constants
    patch(huggingface_hub.constants, HF_HUB_OFFLINE=True)
    patch(datasets.config, HF_HUB_OFFLINE=True)
    for flag, call in (("model", lambda: load_model("a/b", None, CPU)),
                       ("data", lambda: read_rows("a/b", "train"))):
        refused(f"--{flag} a/b: no such file or folder, and the Hub cannot be reached", call)
    patch(datasets, load_dataset=lambda *_, **__: {}["gated"])
    refused("--data a/b: no such file or folder, and from the Hub: KeyError: 'gated'", call)


def test_held_out_rows_stand_behind_the_training_rows_and_ask_something_else():
    rows = [Row(f"q{i}", "a", i, original) for i, original in enumerate("abcadbef")]
    assert hold_out(rows, 3, 2) == (rows[:3], [rows[4], rows[6]], 2)
    assert hold_out(rows, 99, 2) == (rows[:6], rows[6:], 0)  # a smaller file: its last ones
    assert hold_out(rows, 99, 0) == (rows, [], 0)
    with pytest.warns(match="nothing is held out"):  # all are repeated
        assert [len(part) for part in hold_out(10 * rows, 60)[:2]] == [60, 0]
    assert len(hold_out([Row("q", "a", i, i) for i in range(64)], 99)[1]) == 6  # a tenth
    refused("--val-samples 8 leaves nothing to train on", hold_out, rows, 99, 8)


def test_rows_that_ask_the_same_are_known():
    """By MetaMathQA's original question; the turns of one conversation, whatever is answered."""
    chats = [[USER, BOT | dict(content=said), USER, BOT] for said in "xy"]
    write_rows("x.jsonl", dict(query="a", response="b", original_question="c"),
               dict(query="a", response="b"), *({"messages": chat} for chat in chats))
    first, second, *turns = read_table("x.jsonl", "train", chat=True)
    assert first.question == [dict(role="user", content="a")] and first.answer == "b"
    assert (first.problem, second.problem) == ("c", str(second.question))
    assert len(turns) == 4 and len({turn.problem for turn in turns}) == 1
    assert [row.place for row in (first, second, *turns)] == [1, 2, 3, 3, 4, 4]


# --- train_math.py: token ids ---

def letters(template=None, merges=()):
    """Return a tokenizer of letters and special tokens, with a chat template."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    words = [*special, "<unk>", *map(chr, range(32, 127)), "\n", "▁", ":▁"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)}, [*merges], unk_token="<unk>"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>")  # pad == eos hides no target
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = template
    return tokenizer


@cases("merges, single, space", [([], "<s> $A", "▁"), ([(":", "▁")], "<s> $A </s>", "▁▁")],
       ids=["plain", "a token over the prompt's end, EOS by itself"])
def test_training_masks_exactly_what_generation_is_given(merges, single, space):
    """A row must be the prompt's ids, the answer's and EOS, without a second space before it."""
    tokenizer = letters(merges=merges)
    inner = tokenizer.backend_tokenizer
    inner.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    # What looks like a special token is text, and a space before an answer is no second one.
    texts = [("1+1?", " 2"), ("<s>1+1?</s>", "2</s>1")]
    ids, rows, columns = collate(encode(texts, tokenizer, 512), "cpu")
    for i, (question, answer) in enumerate(texts):
        targets = columns[rows == i]
        prompt = ids[i, :targets[0]].tolist()
        assert prompt == encode_prompt(tokenizer, format_prompt(question))
        assert prompt.count(0) == 1 and 1 not in prompt
        said = tokenizer.convert_ids_to_tokens(ids[i, targets])
        assert said == [*space, *answer.strip(), "</s>"]


LLAMA_2 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
           "[/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@cases("template, target", [pytest.param(LLAMA_2, " 2 </s>", id="Llama 2"),
                            pytest.param(CHATML, "2<|im_end|>\n", id="ChatML")])
def test_ids_of_a_chat_are_those_of_the_template(template, target):
    """A row for each turn of the assistant, also behind its own; the target is the turn alone."""
    tokenizer, turns = letters(template), [USER, BOT, USER, BOT, BOT]
    write_rows("x.jsonl", {"messages": turns})
    first, _, (ids, prompt) = encode(read_table("x.jsonl", "train"), tokenizer, 512)
    assert first[0] == tokenizer.apply_chat_template(turns[:2], return_dict=False)
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids[:prompt] == tokenizer.apply_chat_template(turns[:4], add_generation_prompt=True,
                                                         return_dict=False)
    assert encode_prompt(tokenizer, turns[:4]) == ids[:prompt]  # what is scored
    assert "".join(tokenizer.convert_ids_to_tokens(ids[prompt:])) == target
    refused("leave --no-chat out", read_table, "x.jsonl", "train", None, False)


@cases("template, content, message", [
    (CHATML, "a<|im_end|>", "special token <.im_end"), (None, "a", "no chat template"),
    ("{{ messages | length }}" + CHATML, "a", "writes the prompt differently"),
    ("{{ raise_exception('no system') }}", "a", "no system")])
def test_a_chat_that_cannot_be_written_is_refused_with_its_row(template, content, message):
    write_rows("x.jsonl", {"messages": [USER, BOT]},
               {"messages": [USER, BOT | dict(content=content)]})
    rows = read_table("x.jsonl", "train")[-1:]
    refused(f"--data: row 2: .*{message}", encode, rows, letters(template), 512)


def test_a_template_that_writes_the_date_writes_the_same_on_every_day(patch):
    """A run that is resumed tomorrow must find its rows."""
    tokenizer, texts = letters("{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"), set()
    for day in (1, 2):
        patch(transformers.utils.chat_template_utils, datetime=SimpleNamespace(now=lambda: day))
        texts.add(train_math.chat_text(tokenizer, [USER], ask=True))
    assert texts == {"26 Jul 2024 1+1?"}


def test_batches_follow_from_seed_and_epoch_and_start_with_the_largest():
    """An epoch must hold each row once, and pad little."""
    rows = [([0] * random.Random(n).randint(10, 500), n) for n in range(1003)]
    first, *others = (epoch_batches(rows, 8, *key) for key in [(0, 0), (0, 1), (1, 0)])
    padded = [len(batch) * max(len(ids) for ids, _ in batch) for batch in first]
    assert first == epoch_batches(rows, 8, 0, 0) and first not in others
    assert sorted(sum(first, []), key=rows.index) == rows
    assert padded[0] == max(padded) and sum(padded) < 1.1 * sum(len(ids) for ids, _ in rows)


# --- train_math.py: device and model ---

def test_a_process_of_torchrun_touches_its_own_gpu_alone(monkeypatch, patch):
    """Touching "cuda" would take memory on GPU 0 in every process."""
    patch(train_math, WORLD=2)
    monkeypatch.setenv("LOCAL_RANK", "9")
    refused("--device cuda:9: ", train_math.pick_device, "cuda")
    refused("--device cuda:1: .*expected cuda", train_math.pick_device, "cuda:1")
    refused("--device meta: ", train_math.pick_device, "meta")


def test_models_are_loaded_as_asked_or_refused(tiny):
    """transformers takes the checkpoint's dtype unless told, and puts an adapter on unasked."""
    model, tokenizer = load(tiny)
    for name, part in (("half", None), ("partial", {"lm_head.weight": model.lm_head.weight})):
        model.bfloat16().save_pretrained(name, state_dict=part)
        tokenizer.save_pretrained(name)
    assert load_model("half", torch.float16, CPU, nf4=True)[0].dtype == torch.float16
    tokenizer.eos_token = None
    tokenizer.save_pretrained("half")
    saved("both", lambda: model)
    for name, words in (("partial", "model.embed"), ("half", "EOS"), ("both", "holds an adapter")):
        refused(f"--model {name}: .*{words}", load_model, name, torch.float32, CPU)


def test_rows_beyond_the_positions_are_refused(tiny):
    model, tokenizer = load(tiny)
    n = len(model.lm_head.weight)
    model.config.max_position_embeddings = 40
    refused("40 positions.*--max-new-tokens", complete, model, tokenizer, ["a"], 1, 40)
    refused(f"not this model's: it gives ids up to {n}", train_math.check_ids, model, [[n]])
    train_math.check_ids(model, [[n - 1]], 39)


# --- train_math.py: loss, attention ---

@cases("targets", ["q_proj", "lm_head"])
def test_loss_and_gradients_equal_the_full_computation(targets, tiny, patch):
    """Chunks at targets alone must give what labels of -100 and a mask give."""
    patch(train_math, LOGITS_AT_ONCE=300)
    model, examples = adapted(tiny, targets=targets)
    ids, rows, columns = batch = collate(examples[:6], "cpu")
    ours = batch_loss(model, batch)
    (0.5 * ours).backward()
    ours = [ours.detach(), *gradients(model).values()]
    model.zero_grad()
    labels = torch.full_like(ids, -100)
    labels[rows, columns] = ids[rows, columns]
    loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss * len(rows)
    (0.5 * loss).backward()
    torch.testing.assert_close(ours, [loss.detach(), *gradients(model).values()],
                               atol=1e-5, rtol=1e-4)


def test_logits_exist_a_chunk_at_a_time(tiny, patch):
    model, examples = adapted(tiny)
    batch, kept, seen = collate(examples[:8], "cpu"), [], []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    for at_once in (2**22, 300):
        patch(train_math, LOGITS_AT_ONCE=at_once)
        kept.append(saved_for_backward(lambda: batch_loss(model, batch), model.parameters()))
    assert max(seen[1:]) <= 300 // len(model.lm_head.weight) < seen[0]
    assert kept[0] == pytest.approx(kept[1], rel=0.05)  # no logits are among them


def test_accumulation_equals_one_big_batch(tiny):
    """1 x 8 and 8 x 1 rows of unequal length must give one gradient, clipped."""
    for size in (8, 1):
        last = run(tiny, "--nb-samples 8 --epochs 1 --dropout 0 --clip 0.01",
                   f"--batch-size {size} --grad-accum {8 // size} --run-name {size}")
        norm = sum(moment["exp_avg"].square().sum() for moment in moments(last)) ** 0.5
        assert float(norm) == pytest.approx(0.1 * 0.01, rel=1e-3)
        for key in ("loss", "grad_norm"):
            assert metrics(size)[0][key] == pytest.approx(metrics(8)[0][key], rel=1e-5)


def test_held_out_loss_is_per_target_and_without_dropout(tiny):
    """Over batches of unequal length it must be that of one batch, and the mode must come back."""
    model, examples = adapted(tiny, dropout=0.5)
    batch = collate(examples[:7], "cpu")
    ours = train_math.validation_loss(model, examples[:7], 4)
    assert model.training
    assert ours == pytest.approx(float(batch_loss(model.eval(), batch)) / len(batch[1]), rel=1e-5)


@cases("kind, options, message", [
    ("granite", {"logits_scaling": 2.0}, "scales or caps them"),
    ("llama", {"rms_norm_eps": math.nan}, "scales or caps them"),
    ("electra", {"embedding_size": 16}, "is not supported here"),
    ("bert-generation", {}, "is not causal")])
def test_unusual_heads_and_models_that_see_ahead_are_refused(kind, options, message):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | {"head_dim": 8} | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    refused(f"{type(model).__name__}.*{message}", train_math.check_head, model, ROW)


def test_the_check_of_the_head_takes_no_logits_of_whole_rows(tiny):
    """A long row's would need more memory than training it."""
    model, positions = load(tiny)[0], []
    model.lm_head.register_forward_hook(lambda *args: positions.append(args[2].shape[1]))
    train_math.check_head(model, [*range(3, 23)])
    assert max(positions) == 16


@cases("kind, options", [
    ("gemma2", {"final_logit_softcapping": None}),  # attention's cap of 50: hardly seen here
    ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}), ("doge", {})])
def test_attention_of_another_kind_is_kept(kind, options):
    model = causal(kind, attn_implementation="eager", **options).bfloat16()
    before = logits(model)
    train_math.try_attention(model, ROW)
    assert model.config._attn_implementation == "eager" and torch.equal(logits(model), before)


@cases("dtype", DTYPES)
@cases("kind, window", [("llama", None), ("mistral", 4)])
def test_attention_is_transformers_own(kind, window, dtype):
    model = causal(kind, attn_implementation="eager", sliding_window=window,
                   num_key_value_heads=2 if window else 1, attention_dropout=0.3,
                   initializer_range=0.1).to(dtype)
    results = []
    for attention in ("eager", "lora_training"):
        assert model.config._attn_implementation == attention
        model.zero_grad()
        torch.manual_seed(3)
        output = model.train()(torch.tensor([ROW, ROW[::-1]])).logits.float()
        output.square().sum().backward()
        results.append([output, *(p.grad.float() for p in model.model.layers.parameters())])
        train_math.check_head(model.eval(), ROW)
        train_math.try_attention(model, ROW)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert all((a - b).norm() < tolerance * a.norm() for a, b in zip(*results))


@cases("mask", [None, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril().triu(-2)])
def test_attention_is_the_same_off_the_cpu(mask):
    """Its two ways must agree, on a CPU that says it is another device (in fp32 both are one)."""
    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="cuda")

    q, (k, v) = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 2, 2, 5, 8).double()
    here, there = (train_math.attention(None, x, k, v, mask, 0.9)[0]
                   for x in (q, q.as_subclass(Elsewhere)))
    close(here, there.as_subclass(torch.Tensor))


# --- train_math.py: memory ---

def test_recomputing_gives_the_same_gradients_and_keeps_block_inputs(tiny):
    """With dropout, behind frozen embeddings, every A and B must be reached."""
    grown, kept = [], []
    for recompute in (False, True):
        model, examples = adapted(tiny, dropout=0.1)
        if recompute:
            train_math.recompute_blocks(model)
        torch.manual_seed(0)
        kept.append(saved_for_backward(
            lambda: batch_loss(model, collate(examples[:8], "cpu")).backward(),
            model.parameters()))
        grown.append(gradients(model))
    assert same_bits(*grown) and kept[1] < 0.15 * kept[0]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in grown[1].values())


class Hungry(torch.autograd.Function):
    """The identity, which keeps a tensor, and runs out of memory while more than one is alive."""

    @staticmethod
    def forward(ctx, x, when):
        kept = x.clone()
        ctx.when = when
        ctx.save_for_backward(kept)
        Hungry.kept.append(weakref.ref(kept))
        if when == "forward" and Hungry.alive() > 1:
            raise torch.OutOfMemoryError
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.when == "backward" and Hungry.alive() > 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return gradient, None

    @staticmethod
    def alive():
        return sum(reference() is not None for reference in Hungry.kept)


@cases("when", ["forward", "backward"])
def test_where_memory_runs_out_blocks_are_recomputed(when, tiny):
    """Nothing of the failed trial may stay alive, no gradient, and the RNG must be as before."""
    model, examples = adapted(tiny, dropout=0.1)
    batch, rng = collate(examples[:4], "cpu"), torch.get_rng_state()
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, args, output: Hungry.apply(output, when))
    Hungry.kept = []
    gc.collect()
    gc.disable()
    try:
        assert not train_math.fits(model, batch, 1000)
        assert len(Hungry.kept) == 2 and Hungry.alive() == 0
        assert all(p.grad is None for p in model.parameters())
    finally:
        gc.enable()
    assert train_math.make_it_fit(model, batch, None)
    assert len(Hungry.kept) > 4 and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_what_does_not_fit_is_one_line(patch):
    """Forced either way, no second trial is made. A gradient and two moments need room."""
    model, reserved = injected(llama), []
    patch(train_math, fits=lambda model, batch, reserve: reserved.append(reserve))
    for recompute in (False, True):
        more = "" if recompute else "--checkpoint-activations, "
        refused(f"batch: {more}--nf4", train_math.make_it_fit, model, None, recompute)
    assert reserved == [3 * 4 * count_parameters(model)[0]] * 2


def test_the_printed_peak_is_that_of_the_trial_that_fits(patch):
    """Not of the one before it, which ran out of memory."""
    calls, gpu = [], SimpleNamespace(device=SimpleNamespace(type="cuda"))
    patch(train_math, recompute_blocks=calls.append, count_parameters=lambda model: (1, 1),
          fits=lambda *_: calls.append("trial") or calls.count("trial") == 2)
    patch(torch.cuda, reset_peak_memory_stats=lambda device: calls.append("reset"))
    assert train_math.make_it_fit(gpu, None, None)
    assert calls == ["reset", "trial", gpu, "reset", "trial"]


def test_recomputing_is_refused_on_mps(patch):
    """There torch would draw other dropout masks."""
    mps = torch.device("mps")
    patch(transformers.PreTrainedModel, device=mps)
    patch(train_sst2, pick_device=lambda _: mps)
    batch = collate([(ROW, 4)], "cpu")
    refused("cannot be used on mps", train_math.settle_memory, llama(), batch, True)
    refused("on MPS", train_sst2.main, train_sst2.parse_args(["--checkpoint-activations"]))


def test_on_a_cpu_activations_are_kept_unless_asked(tiny, capsys, patch):
    """Nothing fails there in time to choose: the first lines must name the flag."""
    run(tiny, "--max-steps 1")
    assert "kept: --checkpoint-activations takes less memory" in capsys.readouterr().out
    run(tiny, "--max-steps 1 --run-name two --checkpoint-activations")
    assert "activations are recomputed" in capsys.readouterr().out


def test_vram_caps_what_the_allocator_may_take(patch):
    """With --vram 4 it must get 3.5 GiB, without it what is free; never more than that."""
    share = []
    patch(torch.cuda, mem_get_info=lambda _: (10 * 2**30, 16 * 2**30),
          set_per_process_memory_fraction=lambda value, _: share.append(value))
    for vram in (4, None, 32):
        train_math.cap_memory(torch.device("cuda"), vram)
    assert share == [3.5 / 16, 10 / 16, 10 / 16]
    refused("--vram 4 needs a CUDA device", train_math.cap_memory, CPU, 4)


# --- train_math.py: loss scaling, schedule, numbers that go wrong ---

def test_loss_scaler_agrees_with_grad_scaler():
    ours, scales = LossScaler(True, scale=2.0**16, interval=3), set()
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


def test_schedule_warms_up_then_falls_to_zero():
    rates = [learning_rate_at(step, 100, 1000, 1.0) for step in (0, 4, 9, 10, 55, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0], abs=1e-3)


def test_a_skipped_step_changes_nothing_but_the_scale(tiny, patch):
    """Weights, moments and schedule must stay, also seen by a resumed run."""
    weights = []

    def overflow(model, batch):
        assert model.training
        weights.append(bits(model))
        return batch_loss(model, batch) + (math.inf if len(weights) == 2 else 0)

    patch(train_math, batch_loss=overflow)
    flags = "--dtype float16 --max-steps 3 --grad-accum 1 --warmup-steps 0 --save-every 1"
    last = run(tiny, flags)
    first, skipped, third = metrics()
    assert [line["loss_scale"] for line in metrics()] == [2**16, 2**16, 2**15]
    assert first["grad_norm"] < 99 and first["lr"] != skipped["lr"] == third["lr"]
    assert skipped["loss"] is None
    assert same_bits(weights[1], weights[2]) and not same_bits(weights[0], weights[1])
    assert {int(moment["step"]) for moment in moments(last)} == {2}
    shutil.rmtree(last)
    run(tiny, flags, "--resume")
    assert all(metrics()[2][key] == third[key] for key in ("lr", "loss_scale", "loss"))


@cases("dtype, loss, step", [("bfloat16", math.inf, 1), ("float16", math.nan, 20)])
def test_a_run_that_diverges_says_what_may_help(dtype, loss, step, tiny, patch):
    """It must stop at once, and in fp16 after 20 skips."""
    patch(train_math, batch_loss=lambda *_: torch.tensor(loss, requires_grad=True))
    other = ", or --dtype float32" if dtype != "float32" else ""
    refused(f"^step {step}: loss {loss}.* a lower --lr{other}, and another", run, tiny,
            "--dtype", dtype)


# --- train_math.py: the run and its files ---

def test_training_learns_and_writes_what_it_says(tiny, capsys):
    last = run(tiny, "--epochs 6 --max-length 28 --weight-decay 0.125 --save-every 9 --rslora",
               "--run-name ..")
    lines, out = metrics("_."), capsys.readouterr().out
    losses = [line["loss"] for line in lines]
    left_out = sum(len(ids) > 28 for ids, _ in adapted(tiny)[1])  # EOS counts, nothing is cut
    assert f"{64 - left_out} rows train, 0 are held out\nleft out: {left_out} longer than" in out
    assert sum(losses[-8:]) < sum(losses[:8]) - 0.4 and Path("runs/_./loss.png").exists()
    group, = state(last)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.125 and lines[0]["peak_memory_gib"] > 0.05
    assert adapter_config(last)["use_rslora"]
    assert sorted(os.listdir(last)) == [CONFIG, WEIGHTS]  # can be published as it is
    assert str(tiny).encode() not in (last / WEIGHTS).read_bytes()  # only the config has a path


def test_held_out_loss_is_measured_at_each_tenth_and_names_the_best(tiny, capsys):
    """At step 0 too; a checkpoint must stand at each, and a resumed run measure the same."""
    flags = "--val-samples 8 --epochs 6 --lr 1e-1 --dropout 0.1"
    shutil.rmtree(run(tiny, flags))
    out, first = capsys.readouterr().out, metrics()
    run(tiny, flags, "--resume")
    assert [line.get("val_loss") for line in metrics()] == [line.get("val_loss") for line in first]
    measured = {line["step"]: line["val_loss"] for line in first if "val_loss" in line}
    assert [*measured] == [round((len(first) - 1) * tenth / 10) for tenth in range(11)]
    assert [int(path.name[5:]) for path in checkpoints("checkpoints/run")] == [*measured][1:]
    best = min(measured, key=measured.get)
    assert f"lowest, {measured[best]:.3f}, at step {best}: checkpoints/run/step_{best:06d}" in out


def test_an_adapter_can_be_gone_on_from(tiny):
    """Its r, alpha, targets hold; what is given and differs is refused; moments are new."""
    first = run(tiny, "--max-steps 2 --alpha 7 --targets k_proj")
    flags = f"--max-steps 1 --run-name more --adapter {first}"  # and --r 4, which is the same
    more = run(tiny, flags)
    assert adapter_config(more) == adapter_config(first)
    assert adapter_config(more)["lora_alpha"] == 7
    assert changed(weights(more), weights(first)) == weights(first).keys()
    assert {int(moment["step"]) for moment in moments(more)} == {1}
    refused("--r is 8, but 4 in", run, tiny, flags, "--r 8")
    assert parse_args(["--adapter", str(first), "--data", "x.jsonl"]).run_name == "lora-r4-x"


@cases("what, more", [("state", ""), (WEIGHTS, "--nf4 --targets all-linear"), (CONFIG, "")])
def test_resume_continues_bitwise(what, more, tiny):
    flags = f"--nb-samples 7 --batch-size 1 --grad-accum 4 --dropout 0.1 --save-every 3 {more}"
    last = run(tiny, flags)
    whole, lines = weights(last), metrics()
    path = train_math.state_path(last) if what == "state" else last / what
    content, moment = bytearray(path.read_bytes()), next(iter(moments(last)))["exp_avg"]
    place = content.index(moment.numpy().tobytes()) if what == "state" else len(content) // 2
    content[place] ^= 1  # neither safetensors nor torch.load compares checksums
    path.write_bytes(content)
    by_name = parse_args(["--run-name", "run", "--resume", "--checkpoint-activations"])
    with pytest.warns(match="passing over .*step_000006"):
        assert train_math.main(by_name) == last  # all other flags come from run.json
    assert same_bits(weights(last), whole)
    for one, two in zip(lines, metrics(), strict=True):
        assert [*one.items()][:6] == [*two.items()][:6]  # speed and memory vary
    same = f"{flags} --resume --data {tiny}/../{tiny.name}/train.jsonl"
    assert run(tiny, same) == last  # finished already, and the same file by another path
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator("runs/run").Reload()
    assert [event.step for event in board.Scalars("loss")] == [line["step"] for line in lines]


def test_the_seed_reaches_dropout(tiny, patch):
    """With A and the rows held, seeds must differ, also by 2**31; epochs differ in order."""
    keys, losses = [], set()
    patch(train_math, epoch_batches=lambda rows, *key: keys.append(key) or [rows[:1]])
    for seed in (0, 1, 2**31):
        model, examples = adapted(tiny, dropout=0.5)
        train_math.train(model, examples, parse_args(command(tiny, f"--seed {seed}")))
        losses.add(metrics()[0]["loss"])
    assert len(losses) == 3
    assert keys[:3] == [(4, 0, 0), (4, 0, 1), (4, 0, 2)]  # batch size, seed, epoch


def test_resume_refuses_what_it_cannot_continue(tiny, patch):
    copy, flags = Path(shutil.copytree(tiny, "copy")), "--max-steps 1 --resume"
    refused("--resume checkpoints/run/run.json: no such file", run, copy, flags)
    run(copy, "--max-steps 1")
    refused("has checkpoints: add --resume", run, copy)
    with filelock.FileLock("checkpoints/run/.lock"):
        refused("in use by another process.*another --run-name", run, copy, flags)
    refused("--lr is 0.02, but 0.01 in the run run: leave the flag out", run, copy, flags,
            "--lr 0.02")
    model = load(copy)[0]
    model.model.embed_tokens.weight.data[-1] += 1  # the last rows: hashes look everywhere
    model.save_pretrained(copy / "base")
    refused("--model .*the base changed", run, copy, flags)
    shutil.copy(copy / "test.jsonl", copy / "train.jsonl")
    refused("--data .*data or tokenizer changed", run, copy, flags)
    os.remove("checkpoints/run/state_000001.pt")
    refused("begin again, with another --run-name and without --resume", run, copy, flags)
    shutil.rmtree("checkpoints/run/step_000001")  # killed before its first checkpoint
    refused("begin again, without --resume", run, copy, flags)
    patch(train_math, gather=lambda value: [value | {"data": 7}])  # rank 0 read other rows
    refused("--data .*data or tokenizer changed", run, tiny, "--run-name other")


def test_a_full_disk_leaves_no_partial_checkpoint(tiny):
    resource = pytest.importorskip("resource")
    last = run(tiny, "--save-every 1")
    size = train_math.state_path(last).stat().st_size
    shutil.rmtree(last)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        refused("File too large", run, tiny, "--save-every 1 --resume", error=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(tiny, "--save-every 1 --resume") == last


@cases("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupting_saves_and_says_how_to_go_on(signum, tiny, patch, capsys):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(step, *rest):
        if step == 1:
            signal.raise_signal(signum)
            assert handlers() == before  # a second one ends it
        return learning_rate_at(step, *rest)

    before = handlers()
    patch(train_math, learning_rate_at=interrupt)
    refused(f"^{128 + signum}$", run, tiny, "--max-steps 4 --save-every 9", error=SystemExit)
    wanted = "checkpoints/run/step_000002 is saved. To go on: --run-name run --resume"
    assert wanted in capsys.readouterr().out
    assert newest_state(Path("checkpoints/run"))[1]["step"] == len(metrics()) == 2
    assert handlers() == before and Path("runs/run/loss.png").exists()


@cases("two_steps", [False, True])
def test_problems_of_the_demo_are_right(two_steps):
    for seed in range(200):
        problem = demo_problem(random.Random(seed), two_steps)
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+) \.", problem["answer"])
        have = re.search(r"has (\d+) ", problem["question"])[1]
        assert len(steps) == 1 + two_steps
        for left, sign, change, result in steps:
            assert left == have
            assert int(left) + int(sign + change) == int(result) <= 20
            assert f"{'gets' if sign == '+' else 'gives'} {change} " in problem["question"]
            have = result
        assert problem["answer"].endswith(f"The answer is {have}")


def test_the_demo_deletes_no_other_run(tiny):
    last = run(tiny, "--max-steps 1 --run-name demo")
    refused("--demo checkpoints/demo/run.json: a run of your own", train_math.main,
            parse_args(["--demo"]))
    begun = Path("checkpoints/demo/run.json")
    begun.write_text(begun.read_text().replace(f"{tiny}/train.jsonl", "demo/two-step-train.jsonl"))
    with filelock.FileLock(begun.with_name(".lock")):  # another demo, still at work
        refused("in use by another process", train_math.main, parse_args(["--demo"]))
    assert last.exists()


def test_an_adapter_tells_how_it_was_trained(tiny, patch):
    """Base, chat (which messages are) and NF4 come from it, unless given, and are then told."""
    model, tokenizer = load(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    write_rows("chat.jsonl", *({"messages": [USER, BOT]} for _ in range(8)))
    last = run(tiny, "--model base --nf4 --max-steps 1 --data chat.jsonl")
    found = parse_args(["--adapter", str(last)])
    assert (found.model, found.chat, found.nf4) == ("base", True, True)
    read = []
    patch(eval_gsm8k, load_model=lambda *found: read.append(found) or load(tiny), ask=lambda *_: 0)
    for flags, model, trained, warned in (
            ("", "base", True, 0), ("--no-nf4 --no-chat", "base", False, 2),
            ("--model other", "other", True, 1)):
        args = eval_gsm8k.parse_args(f"--adapter {last} --ask x --device cpu {flags}".split())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            eval_gsm8k.main(args)
        assert (read[-1][0], read[-1][3], args.chat) == (model, trained, trained)
        assert len([w for w in told if "was trained " in str(w.message)]) == warned


def test_two_states_stay_whatever_lies_damaged_later():
    """Only then can a resumed run be resumed once more."""
    Path("step_000009").mkdir()
    model = injected(llama)
    optimizer, scaler = torch.optim.AdamW(model.parameters()), LossScaler(False)
    for step in (1, 2, 3):
        train_math.save_checkpoint(Path(f"step_00000{step}"), model, {}, step, optimizer, scaler)
    assert sorted(Path().glob("state_*")) == [Path("state_000002.pt"), Path("state_000003.pt")]


def test_a_log_is_read_without_its_damaged_lines():
    path = Path("metrics.jsonl")
    path.write_text('{"step": 0, "val_loss": 1}\nnull\n{"st\n{"step": 1}\n{"step": 2}\n{"st')
    train_math.open_log(path, 1)({"step": 2, "loss": 1.5})
    assert train_math.read_log(path) == [
        {"step": 0, "val_loss": 1}, {"step": 1}, {"step": 2, "loss": 1.5}]


def test_a_run_that_never_beats_its_start_is_warned_of():
    for step in (1, 2):
        Path(f"checkpoints/run/step_00000{step}").mkdir(parents=True)
    Path("runs/run").mkdir(parents=True)
    losses = {0: 1.5, 1: 1.7, 2: 1.6}
    for start, matched in ((1.5, "lower held-out loss than its start"), (1.8, None)):
        losses[0] = start
        lines = [json.dumps({"step": step, "val_loss": loss}) for step, loss in losses.items()]
        Path("runs/run/metrics.jsonl").write_text("\n".join(lines))
        with pytest.warns(match=matched) if matched else nullcontext():
            assert train_math.best_adapter("checkpoints/run").name == "step_000002"
    os.remove("runs/run/metrics.jsonl")  # as where checkpoints/run alone was copied
    with pytest.warns(match="no held-out loss of checkpoints/run is known"):
        assert train_math.best_adapter("checkpoints/run").name == "step_000002"
    os.rmdir("checkpoints/run/step_000001")
    with warnings.catch_warnings(action="error"):  # there is no choice
        assert train_math.best_adapter("checkpoints/run").name == "step_000002"


# --- train_math.py: command lines ---

def test_damaged_weights_say_what_to_do():
    saved("adapter")
    os.truncate(f"adapter/{WEIGHTS}", 99)
    refused("--adapter adapter: its weights are damaged, copy", parse_args, ["--adapter=adapter"])


@cases("flags, message", [
    ("--max-length 4", "4 leaves none of 64 rows"),
    ("--demo", "no effect beside --demo: leave out --model, --data"),
    ("--grad-accum 1", "--grad-accum 1 is too few: each of 2 processes")])
def test_wrong_input_is_one_line(flags, message, tiny, patch):
    patch(train_math, WORLD=2 if "accum" in flags else 1)
    refused(message, run, tiny, flags)
    assert not list(Path().rglob("step_*"))


# --- eval_gsm8k.py: answers ---

@cases("text, answers", [
    ("#### -$5", "-5"), ("#### $-5", "-5"), ("The answer is \u22125.", "-5"),
    ("#### .5", "1/2"), ("#### 1/0", "-"), (r"the answer is \boxed{6/8}", "3/4"),
    ("The answer is 3. The answer is:\n4,2", "4"), ("#### none\n#### 5,0123", "50123"),
    ("The answer is 3\n#### 4", "4"), ("#### 4\nThe answer is 3", "3"),
    (r"The answer is $2\frac{3}{4}$", "11/4"), (r"The answer is \$1{,}000", "1000"),
    (r"The answer is $1\,000$.", "1000"), ("The answer is 1\u202f000.", "1000"),
    (r"It: #### \boxed{12.}", "12"), ("The answer is 1e5.", "-"), ("#### 1.2.3", "-"),
    ("The answer is 1.5 \u00d7 10^6.", "-"), (r"It is 2\sqrt{3}", "-"), ("#### 3/4/2024", "-"),
    ("10-5=5, 20-30", "- 30"), ("(9)-5", "- 5"), ("it is -3.", "- -3"),
    pytest.param(f"#### -0.{'9' * 5000}", f"-0.{'9' * 5000}", id="no digit is rounded away")])
def test_strict_answers_need_a_marker_and_flexible_ones_do_not(text, answers):
    wanted = [None if word == "-" else Fraction(word) for word in answers.split() * 2]
    assert [extract_answer(text), extract_answer(text, flexible=True)] == wanted[:2]


def harness(text, flexible):
    """The two published filters of lm-evaluation-harness's gsm8k task, and its exact_match."""
    pattern = r"(-?[$0-9.,]{2,})|(-?[0-9]+)" if flexible else r"#### (\-?[0-9\.\,]+)"
    found = [match[0] for match in re.finditer(pattern, text)] or ["[invalid]"]
    return re.sub(r",|\$|(?s:.*)#### |\.$", "", found[-1 if flexible else 0])


def test_scores_equal_lm_evaluation_harness():
    """On 56 completions that end in "#### n" both modes must score as it does."""
    endings = ["18", "-5", "1,080", "0.5", "12,345,678.25", "7", "18.", "100"]
    for steps in ("", "He pays $1,250.50 for 3-4 of 12. ", "48/2 = 24 clips, 50%. x = -3; y = .5 ",
                  "First #### 7\nno, ", "#### none so far, -8 ", "10-5=5... 1/2 of 18 is 9.\n",
                  "\u00bd and 3\u00b2, $5 each; "):
        for ending, other, mode in itertools.product(endings, endings, (False, True)):
            text, reference = f"{steps}so\n#### {ending}", f"#### {other}"
            same = extract_answer(text, mode) == extract_answer(reference)
            assert same == (harness(text, mode) == harness(reference, False)), (text, other, mode)


@cases("text, value", [
    ("$1,250.50", "1250.5"), ("it makes 18", None), (r"The answer is: \frac{x}{4}", None),
    ("#### 1\u202f234", None), ("#### 5\n6", "5")])
def test_a_reference_has_a_marker_or_is_a_bare_number(text, value):
    """Any other row must be refused by its number: 57 of 175 Alpaca answers hold a digit."""
    row = Row("q", text, 9, "q")
    if value is None:
        return refused("^row 9: expected an answer that ends in ####", eval_gsm8k.reference, row)
    assert eval_gsm8k.reference(row) == Fraction(value)


# --- eval_gsm8k.py: generation ---

@cases("kind, options, batch", [
    ("llama", {}, 8), ("mamba", {}, 8),
    ("bart", dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
                  forced_eos_token_id=None), 1),
    ("openai-gpt", dict(n_embd=32, n_layer=2, n_head=4, n_positions=128), 8)],
    ids=["llama", "mamba", "bart", "openai-gpt"])
def test_a_batch_says_what_each_row_says_alone(kind, options, batch, tiny):
    """Padding, regrouping and the checkpoint's settings must change no token."""
    _, tokenizer = load(tiny)
    model = causal(kind, **options | dict(vocab_size=len(tokenizer), eos_token_id=None,
                                          max_position_embeddings=128))
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # or it would repeat one word
            parameter.data += 0.3 * torch.randn_like(parameter)
    prompts = [format_prompt(q) for q, _ in read_rows(f"{tiny}/test.jsonl", "test", 8)]
    inputs = [torch.tensor([encode_prompt(tokenizer, prompt)]) for prompt in prompts]
    alone = [model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=40)[0, ids.shape[1]:].tolist() for ids in inputs]
    # Three rare tokens are a question of its own, an EOS of the tokenizer, and one of the model.
    tokens = sum(alone, [])
    asks, *eos = (min(alone[row], key=tokens.count) for row in (0, 2, 7))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos[0])

    def say(ids, **_):
        return " ".join("Question:" if i == asks else str(i) for i in ids if i != eos[0])

    tokenizer.decode = say
    own = dict(eos_token_id=eos[1:], do_sample=True, no_repeat_ngram_size=1,
               min_new_tokens=40, pad_token_id=10**6)  # a pad without an embedding
    vars(model.generation_config).update(own)
    wanted, last = [], []
    for said in alone:
        end = next((i for i, token in enumerate(said, 1) if token in [*eos, asks]), None)
        wanted.append((say(said[:end]).removesuffix("Question:"), end is None))
        last += said[:end][-1:]
    widths = []
    model.register_forward_hook(lambda _, args, out: widths.append(len(out.logits)))
    assert complete(model, tokenizer, prompts, 8, 40) == wanted
    assert {cut_off for _, cut_off in wanted} == {True, False} and {asks, *eos} <= {*last}
    assert max(widths) == max(batch, 2) > widths[-1]  # 2: the trial with a padded row
    assert own.items() <= vars(model.generation_config).items()  # kept, for --save-merged


# --- eval_gsm8k.py: scores, questions, export ---

def evaluation(tiny, *flags):
    common = (f"--model {tiny}/base --data {tiny}/test.jsonl --max-new-tokens 8 --dtype float32 "
              "--device cpu")
    return [*common.split(), *" ".join(flags).split()]


def evaluate(tiny, *flags):
    eval_gsm8k.main(eval_gsm8k.parse_args(evaluation(tiny, *flags)))


def records_of(name, out="eval_results", n=16):
    return [json.loads(line) for line in open(f"{out}/{name}-test-{n}.jsonl")]


def test_intervals_and_exact_test_give_published_values():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    first, second = [True] + [False] * 9 + [True] * 90, [False] + [True] * 99
    assert mcnemar_p(first, second) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_p(second, first) == mcnemar_p(first, second) < mcnemar_p(first, first) == 1


def test_shots_stand_in_the_prompt_and_answers_are_counted_by_kind(patch):
    said, asked = [("#### 1", False), ("2", False), ("", True), ("9", False)], []
    patch(eval_gsm8k, complete=lambda _, __, prompts, *rest: asked.extend(prompts) or said)
    rows = [("a?", "#### 7"), *(("q", str(n)) for n in (1, 2, 3, 4))]
    result = eval_gsm8k.summarise(eval_gsm8k.answer(None, None, rows, shots=1))
    assert asked == 4 * ["Question: a?\nAnswer: #### 7\n\nQuestion: q\nAnswer:"]
    wanted = dict(n=4, correct=1, accuracy=0.25, correct_flexible=2, accuracy_flexible=0.5,
                  no_answer=3, truncated=1)
    assert wanted.items() <= result.items()
    said[:] = [("Question: q\nThe answer is 5", False)]  # in a chat it may repeat the question
    assert eval_gsm8k.answer(None, None, [([USER], "#### 5")])[0]["correct"]


def test_checkpoints_are_scored_in_order_and_by_two_processes_as_by_one(tiny):
    for step in ("step_999000", "step_1000000"):
        saved(f"checkpoints/run/{step}", lambda: load(tiny)[0])
    names = [*eval_gsm8k.list_adapters(["checkpoints/run"], True)]
    assert names == ["run-step_999000", "run-step_1000000"]
    assert [*eval_gsm8k.list_adapters(["checkpoints/run"], False)] == names[1:]  # the last
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/metrics.jsonl").write_text('{"step": 0, "val_loss": 0}\n'  # it has no adapter
                                              '{"step": 999000, "val_loss": 1}\n'
                                              '{"step": 1000000, "val_loss": 2}\n')
    assert [*eval_gsm8k.list_adapters(["checkpoints/run"], False)] == names[:1]  # the best
    flags = "--adapter checkpoints/run --batch-size 3 --out"
    evaluate(tiny, flags, "one")
    done = torchrun(HERE / "eval_gsm8k.py", evaluation(tiny, flags, "two"))
    assert done.stdout.count("16 problems, scores in two/") == 1, done.stderr
    for name in ["base", *names]:
        one, two = (json.load(open(f"{out}/{name}-test-16.json")) for out in ("one", "two"))
        assert one == two | {"seconds": one["seconds"]}
        assert ("p_value" in one) == (one["adapter"] is not None) == (name != "base")
        assert records_of(name, "one") == records_of(name, "two")
    assert len(os.listdir("one")) == 7 and Path("one/test-16.png").exists()  # two each, a chart


@cases("flags", ["", "--nf4"])
def test_a_merged_model_answers_the_same_and_loads_elsewhere(flags, tiny):
    """The heads must be those of the adapter, and afterwards those of the base."""
    saved("adapter", lambda: load(tiny)[0], also_train="lm_head")
    evaluate(tiny, "--adapter adapter", flags)
    evaluate(tiny, "--adapter adapter --save-merged merged --data none", flags)
    evaluate(tiny, "--model merged --out again")
    assert records_of("adapter") == records_of("base", "again") != records_of("base")
    evaluate(tiny, "--out alone", flags)
    assert records_of("base") == records_of("base", "alone")
    say = transformers.pipeline("text-generation", "merged", device="cpu")
    assert say("Question: Ann", max_new_tokens=3)[0]["generated_text"].startswith("Question: Ann")


def test_asking_prints_base_and_adapters_one_under_the_other(tiny, patch, capsys):
    def say(model, tokenizer, prompts, *rest):
        return [(f"{len(wrappers(model))} wrappers, {text!r}", False) for text in prompts]

    saved("adapter", lambda: load(tiny)[0])
    patch(eval_gsm8k, complete=say)
    with pytest.warns(match="no effect beside --ask: leave out --data, --shots$"):
        evaluate(tiny, "--adapter adapter --ask Ann Ben --shots 1")
    said = "".join(f"""
{name}
--- base
0 wrappers, 'Question: {name}\\nAnswer:'
--- adapter
4 wrappers, 'Question: {name}\\nAnswer:'
""" for name in ("Ann", "Ben"))
    assert capsys.readouterr().out.endswith(said)
    patch(eval_gsm8k, complete=lambda _, __, prompts, *rest: [(str(prompts), False)])
    evaluate(tiny, "--chat --system Be --ask Ann")
    turns = [dict(role="system", content="Be"), dict(role="user", content="Ann")]
    assert capsys.readouterr().out.endswith(f"--- base\n{[turns]}\n")
    refused("--system is a turn of a chat", evaluate, tiny, "--system Be --ask Ann")


def test_a_score_is_read_and_only_of_the_same_settings_and_contents(tiny, patch):
    """Other settings, adapter, data or base under a name must be refused."""
    shutil.copytree(tiny, ".", dirs_exist_ok=True)
    saved("a", lambda: load(tiny)[0])
    flags = "--model base --data test.jsonl --adapter a --nb-samples 3"
    evaluate(tiny, flags)
    patch(eval_gsm8k, complete=lambda *_: pytest.fail("generated"))
    evaluate(tiny, flags, f"--model {tiny}/base")  # another spelling
    assert len(records_of("base", n=3)) == len(records_of("a", n=3)) == 3
    refused("shots was 0, now it is 1", evaluate, tiny, flags, "--shots 1")
    saved("a", lambda: load(tiny)[0], r=2)
    refused("adapter_hash was", evaluate, tiny, flags)
    shutil.copy(tiny / "train.jsonl", "test.jsonl")
    refused("data_hash was", evaluate, tiny, flags)
    model = load(tiny)[0]
    model.model.norm.weight.data += 1
    model.save_pretrained("base")
    refused("base_hash was", evaluate, tiny, flags)
    for name, text in (("base-test-3.jsonl", "{}\n" * 3), ("base-test-3.json", "{")):
        Path("eval_results", name).write_text(text)  # the next one would stand without its p
        refused("--out .*base-test-3.json: ", evaluate, tiny, flags)


@cases("flags, message", [
    ("--adapter a --adapter a", "another score is called a"),
    ("--data x.jsonl", "--data x.jsonl: row 2: expected an answer that ends in ####"),
    ("--adapter a --save-merged a", "--save-merged a exists"),
    ("--adapter b --ask q", "--adapter b: an adapter for SEQ_CLS, expected one for CAUSAL_LM"),
    ("--save-merged c", "takes one --adapter, found 0"),
    ("--shots 16", "--shots 16 leaves none of 16")])
def test_bad_runs_end_before_a_model_is_loaded(flags, message, tiny, patch):
    saved("a", SmallGPT)
    saved("b", roberta, **HEAD)
    write_rows("x.jsonl", dict(question="q", answer="5"), dict(question="q", answer="Paris 2024"))
    patch(eval_gsm8k, load_model=lambda *_: pytest.fail("loaded"))
    refused(message, evaluate, tiny, flags)


# --- eval_gsm8k.py: the edge ---

@cases("script, flag, value", [
    (eval_gsm8k, "--shots", "-1"), (train_math, "--lr", "nan"), (train_math, "--clip", "inf")])
def test_bad_flags_are_one_line_and_exit_code_2(script, flag, value, capsys):
    refused("^2$", script.parse_args, [flag, value], error=SystemExit)
    assert re.fullmatch(f".* {flag}: .*\n", capsys.readouterr().err)


@cases("script, flags", [(eval_gsm8k, ["--ask"]), (eval_gsm8k, ["--system"]),
                         (train_sst2, ["--adapter", "a", "--predict"])])
def test_half_a_character_is_named_with_its_flag(script, flags):
    refused(f"^{flags[-1]} holds half of a character", script.parse_args, [*flags, "caf\udce9"])


@cases("error, word", [(ValueError("two\nlines"), "two lines"),
                       (MemoryError(), "--batch-size")])
def test_errors_end_in_one_line(error, word, patch, capsys):
    def fails(*_):
        raise error

    patch(warnings, formatwarning=None)
    refused("^2$", train_math.run_script, "x.py", fails, lambda: None, error=SystemExit)
    assert re.fullmatch(f"x.py: .*{word}.*\n", capsys.readouterr().err)


def test_a_console_that_cannot_show_a_character_ends_no_run(patch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    patch(sys, stdout=console)
    patch(warnings, formatwarning=None)
    train_math.run_script("x.py", lambda args: print("\u6f22", flush=True), lambda: None)
    assert console.buffer.getvalue().strip() == b"\\u6f22"


# --- train_sst2.py ---

@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The demo's folder, with fewer sentences: base, data, runs and adapters."""
    write = train_sst2.write_demo
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sst2"))
        patch.setattr(train_sst2, "write_demo", lambda *where: write(*where, 96, 40))
        for _ in range(2):  # it can be repeated
            assert len(train_sst2.main(train_sst2.parse_args(["--demo"]))) == 6
        return Path("demo-sst2").absolute()


def sst2(encoder, flags=""):
    return train_sst2.parse_args([
        "--model", f"{encoder}/base", "--data", str(encoder), *"--device cpu --dtype float32 "
        "--epochs 1 --batch-size 16 --lr 5e-3".split(), *flags.split()])


def prepared(encoder, flags=""):
    args = sst2(encoder, flags)
    args.device = CPU
    return args, {split: train_sst2.read_data(args, split) for split in ("train", "validation")}


def test_an_ablation_writes_a_line_per_run_and_skips_finished_ones(encoder, capsys):
    """The same contents under another name are the same experiment; others are refused."""
    flags = "--ranks 1 2 --seeds 0 1 --full-finetune"
    runs = train_sst2.main(sst2(encoder, flags))
    assert [(run["r"], run["seed"], run["adapter_parameters"]) for run in runs] == [
        (1, 0, 512), (1, 1, 512), (2, 0, 1024), (2, 1, 1024), (None, 0, 0), (None, 1, 0)]
    assert [run["trainable"] for run in runs[::5]] == [512 + 64 * 2 + 2, runs[5]["total"]]
    assert len({run["val_loss"] for run in runs}) == 6
    train_sst2.report([run | {"accuracy": n / 10} for n, run in enumerate(runs)], "curves.png")
    assert re.search(r"r=2 +1024 +1154 .* 0.25 +0.07071 +2\n", capsys.readouterr().out)
    shutil.copytree(encoder, "copy")
    same = sst2(encoder, f"{flags} --data copy --model copy/base")
    path = Path("runs/sst2/sst2.jsonl")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    again = train_sst2.main(same)
    assert again[:-1] == runs[:-1] and again[-1]["val_loss"] == runs[-1]["val_loss"]
    assert len(path.read_text().splitlines()) == 6 and Path("curves.png").exists()
    with filelock.FileLock("runs/sst2/.lock"):
        refused("in use by another process.*another --out", train_sst2.main, same)
    refused("lr was 0.005, now it is 0.1; give another --out", train_sst2.main,
            sst2(encoder, "--lr 0.1"))
    model = train_sst2.load_encoder(prepared(encoder)[0], None, 0)
    model.bert.pooler.dense.bias.data += 1
    model.bert.save_pretrained("copy/base")
    refused("base_hash was", train_sst2.main, same)
    Path("copy/validation.tsv").write_text("sentence\tlabel\nlovely story\t1\n")
    refused("data_hash was", train_sst2.main, same)


def test_an_adapter_with_its_head_scores_and_predicts_the_same_elsewhere(encoder):
    os.chdir(encoder.parent)
    run = json.loads(Path("demo-sst2/sst2.jsonl").read_text().splitlines()[3])
    assert len(run["history"]) == 6  # of six steps; else four an epoch
    flags = "--adapter demo-sst2/r4-s1 --data demo-sst2 --device cpu --dtype float32".split()
    args = train_sst2.parse_args(flags)
    assert train_sst2.main(args) == (run["accuracy"], run["val_loss"])
    texts = ["superb music but dull story", "dull music but superb story"]
    found = train_sst2.main(train_sst2.parse_args([*flags, "--predict", *texts]))
    ids = torch.tensor(train_sst2.encode(args, texts))
    model = train_sst2.load_adapted(args)
    assert found == pytest.approx(model(ids).logits.softmax(-1)[:, 1].tolist())
    saved("headless", lambda: strip_lora(model), targets="query")
    args.adapter, args.head = "headless", None
    refused("has no classifier", train_sst2.load_adapted, args)  # it would be a random one


@cases("kind", [transformers.LlamaForSequenceClassification,
                transformers.BertForSequenceClassification])
def test_padding_changes_neither_loss_nor_accuracy(kind, patch):
    """A decoder finds the end of a row by its own pad id. What padding does change is refused."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**SMALL | dict(pad_token_id=2, num_labels=2))).eval()
    examples = [(list(range(5, 8 + n % 5)), n % 2) for n in range(20)]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([ids])).logits for ids, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    wanted = (logits.argmax(-1) == labels).float().mean(), F.cross_entropy(logits, labels)
    close(torch.tensor(train_sst2.evaluate(model, examples, "float32")), torch.stack(wanted))
    train_sst2.check_rows(model, examples)
    patch(train_sst2, logits_of=lambda model, rows, dtype: torch.ones(len(rows), 2) * len(rows))
    refused("other logits when it is padded", train_sst2.check_rows, model, examples)


def test_a_run_at_chance_says_so(encoder, patch, capsys):
    args, data = prepared(encoder, "--ranks 1 --lr 1e-9")
    for right in (0.5, 0.95):
        patch(train_sst2, evaluate=lambda *_: (right, 0.5))
        train_sst2.train(args, data, 1, 0)
        assert ("r=1, seed 0 ends within chance" in capsys.readouterr().out) == (right == 0.5)


def test_four_batches_of_eight_are_one_of_thirty_two(encoder):
    shutil.copytree(encoder / "base", "dry")
    text = (encoder / "base/config.json").read_text()
    Path("dry/config.json").write_text(text.replace("0.1", "0.0"))
    weights = []
    for size in ("--batch-size 32", "--batch-size 8 --grad-accum 4"):
        args, data = prepared(encoder, f"--model dry --dropout 0 --nb-samples 76 {size}")
        _, model = train_sst2.train(args, data, 2, 0)
        weights.append(bits(model))
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-4)


def test_recomputed_blocks_give_equal_gradients_and_save_less(encoder):
    grown, sizes = [], []
    for flags in ("", "--checkpoint-activations"):
        args, data = prepared(encoder, flags)
        model = train_sst2.load_encoder(args, 4, 0)
        perturb(model.train())  # B = 0 would hide A's gradient
        sizes.append(saved_for_backward(lambda: train_sst2.classify(
            model, data["train"][:16], "float32")[0].backward(), model.parameters()))
        grown.append(gradients(model))
    assert len(grown[0]) == 10 and same_bits(*grown) and sizes[1] < sizes[0] / 4


def test_skipped_steps_leave_weights_and_schedule_and_twenty_end_a_run(encoder, patch):
    """The first step taken must have the peak rate; gradients are unscaled, then clipped."""
    args, data = prepared(encoder, "--dtype float16 --batch-size 8 --full-finetune --full-lr 0.05")
    steps, step, scaler = [], torch.optim.AdamW.step, train_sst2.LossScaler

    def recorded(optimizer):
        matrices, others = optimizer.param_groups  # the others are biases and LayerNorm
        assert (matrices["weight_decay"], others["weight_decay"]) == (0.01, 0)
        assert {p.dim() > 1 for p in matrices["params"]} == {True}
        assert {p.dim() > 1 for p in others["params"]} == {False}
        gradients = [p.grad for p in matrices["params"]]
        steps.append((matrices["lr"], nn.utils.get_total_norm(gradients)))
        step(optimizer)

    def run(scale):
        patch(train_sst2, LossScaler=lambda enabled: scaler(enabled, scale))
        line, model = train_sst2.train(args, data, None, 0)
        return line["skipped"], bits(model)

    patch(torch.optim.AdamW, step=recorded)
    skipped, weights = run(2.0**120)
    assert skipped == 12 and same_bits(bits(train_sst2.load_encoder(args, None, 0)), weights)
    assert 0 < run(2.0**22)[0] < 12
    assert [lr for lr, _ in steps[:2]] == pytest.approx([0.05, 0.05 * 11 / 12])
    assert steps[0][1] < 0.5 and max(norm for _, norm in steps) < 1.001
    args.epochs = 2
    refused("at step 20: try a lower learning rate", run, 2.0**120)


def test_the_seed_reaches_head_adapter_and_dropout(encoder):
    """Seeds must differ also beyond the 32 bits that torch's CPU generator uses."""
    args, seen = prepared(encoder)[0], []
    for seed in (0, 2**32):
        model = train_sst2.load_encoder(args, 2, seed)
        _, layer = next(lora_layers(model))
        seen.append([model.classifier.weight, layer.lora_A, F.dropout(torch.ones(64))])
    assert not any(map(torch.equal, *seen))


def test_training_rows_are_drawn_with_seed_0_and_cut(encoder):
    """Every run must take the same rows; one that outgrows the positions is refused."""
    _, data = prepared(encoder)
    _, few = prepared(encoder, "--nb-samples 8 --max-length 5")
    wanted = random.Random(0).sample(data["train"], 8)
    assert few["train"] == [(ids[:4] + ids[-1:], label) for ids, label in wanted]
    for split in ("train", "validation"):
        Path(f"{split}.jsonl").write_text(json.dumps({"sentence": 99 * "music ", "label": 1}))
    refused("101 tokens.* 32 positions: lower --max-length", train_sst2.main,
            sst2(encoder, "--data ."))  # its tokenizer knows no maximum


def test_what_a_checkpoint_lacks_is_trained_or_named(encoder):
    distilbert().base_model.save_pretrained("distil")
    args, _ = prepared(encoder)
    args.model = "distil"
    model = train_sst2.load_encoder(args, 2, 0)  # its head has two layers
    assert count_parameters(model)[0] == 2 * 2 * 2 * (32 + 32) + 32 * 33 + 2 * 33
    args.head = ["classifier"]
    refused("distil has no pre_classifier.*--head", train_sst2.load_encoder, args, 2, 0)
    transformers.DistilBertConfig.from_pretrained("distil", num_labels=3).save_pretrained("distil")
    refused("a classifier of 3 classes, expected 2", train_sst2.load_encoder, args, 2, 0)


def test_sentences_are_read_as_they_stand():
    """Lone quotation marks, null and numbers must stay text."""
    rows = [('"half open', 1), ("null", 0), ("2.0", 1)]
    write_rows("train.jsonl", *(dict(sentence=text, label=label) for text, label in rows))
    assert train_sst2.read_sentences(".", "train") == rows
    Path("train.tsv").write_text("sentence\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in rows))
    refused("found train.tsv, train.jsonl", train_sst2.read_sentences, ".", "train")
    Path("train.jsonl").unlink()
    assert train_sst2.read_sentences(".", "train") == rows


@cases("name, text, message", [
    ("train.jsonl", '{"sentence": "a", "label": -1}', "row 1: .*label 0 or 1"),
    ("train.jsonl", '{"sentence": "\\ud83d", "label": 1}', "surrogate"),
    ("train.csv", "label,sentence\n1,A film, and so on\n", "train, row 1: ")])
def test_bad_sentences_are_a_clear_error(name, text, message):
    Path(name).write_text(text)
    refused(f"--data .: .*{message}", train_sst2.read_sentences, ".", "train")


# --- bench/section7.py ---

def basis(rows, width, seed=0):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rows)).Q.T  # orthonormal rows


def test_subspace_similarity_is_one_zero_or_chance():
    """One subspace in another must be 1, orthogonal 0, random near max(i, j) / k."""
    phi, rows = section7.subspace_similarity, basis(12, 64)
    A = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ rows[:4]
    close(phi(A, A), torch.ones(4, 4))
    close(phi(A, rows[4:]), torch.zeros(4, 8))
    rotated = phi(A, basis(4, 4, seed=1) @ rows[:4])  # other directions of the same subspace
    close(rotated[3], torch.ones(4))
    by_chance = phi(basis(8, 512), basis(64, 512, seed=1))
    for i, j in ((8, 8), (8, 64), (3, 40)):
        assert abs(by_chance[i - 1, j - 1] - max(i, j) / 512) < 0.02


@cases("kind", [nn.Linear, Conv1D])
def test_amplification_is_what_it_is_by_hand(kind):
    U, V, values = basis(6, 40).T, basis(6, 30, seed=1), torch.tensor([9.0, 7, 5, 3, 2, 1])
    layer = LoRALinear(linear(kind, 30, 40), LoRAConfig(r=2, alpha=1))  # scaling 0.5
    W = U @ torch.diag(values) @ V
    layer.weight.data = W if kind is nn.Linear else W.T
    for some in (slice(0, 2), slice(2, 4)):
        layer.lora_B.data, layer.lora_A.data = U[:, some] * values[some], V[some]
        part, top = values[some].norm(), values[:2].norm()
        *columns, onto_random, factor = section7.amplification(layer)
        close(torch.stack(columns), torch.stack([values.norm(), 0.5 * part, part, top]))
        assert onto_random < 0.5 * top
        close(factor, torch.tensor(0.5))


def test_compare_names_layers_and_refuses_what_it_cannot_compare(encoder):
    os.chdir(encoder.parent)

    def compare(*flags):
        return section7.main(section7.parse_args([*flags, "--out", "pictures"]))

    maps = compare("demo-sst2/r4-s0", "demo-sst2/r4-s1")
    first, last = (f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1))
    A1, A2 = (weights(f"demo-sst2/r4-s{seed}")[f"base_model.model.{last}.lora_A.weight"]
              for seed in (0, 1))
    close(maps[last], section7.subspace_similarity(A1, A2))
    close(maps["mean of 2 attention.self.query"], (maps[first] + maps[last]) / 2)
    assert Path("pictures/compare-r4-s0-r4-s1.png").exists()
    model = train_sst2.load_encoder(prepared(encoder)[0], None, 0)
    saved("c", lambda: model, **HEAD | {"targets": "dense"})
    refused("share no layer", compare, "demo-sst2/r4-s0", "c", "--model", f"{encoder}/base")


# --- the CUDA path, on fake tensors ---

@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_cuda_path_mixes_no_devices_or_dtypes():
    """On a CUDA device that is pretended, every mix would raise."""
    code = """
import sys
sys.path.insert(0, "bench")
import memory
memory.pretend_cuda()
import torch
shape = memory.SHAPES["TinyLlama-1.1B"] | {"num_hidden_layers": 3}
for dtype, nf4 in ((torch.float16, True), (torch.bfloat16, False)):
    rest, kept = memory.alive(shape, dtype, nf4, False, "all-linear", length=64)
    _, recomputed = memory.alive(shape, dtype, nf4, True, "all-linear", length=64)
    assert 0 < rest < recomputed < kept
"""
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


# --- the README ---

def test_every_command_in_the_readme_parses(patch):
    patch(train_math, saved_flags=lambda args: {})  # the run and the adapter are not there
    shell = "".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    commands = re.findall(r"(train_math|eval_gsm8k|train_sst2)\.py([^#\n]*)", shell)
    assert len(commands) > 10
    for script, flags in commands:
        sys.modules[script].parse_args(shlex.split(flags))


@cases("folder", [".", "results"])
def test_every_link_leads_somewhere(folder):
    text = (HERE / folder / "README.md").read_text(encoding="utf8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, section = link.partition("#")
        name = name or "README.md"  # a section of the same file
        assert link.startswith("https://") or (HERE / folder / name).exists(), link
        if section:
            words = section.replace("-", " ")
            assert f"# {words}\n" in (HERE / folder / name).read_text(encoding="utf8").lower()


def test_published_figures_are_those_of_the_raw_data():
    def lines(name):
        return [json.loads(line) for line in (HERE / "results" / name).read_text().splitlines()]

    for name in ("base", "seed0", "seed1", "seed2"):
        score = json.loads((HERE / f"results/gsm8k-{name}.json").read_text())
        low, high = (100 * bound for bound in score["ci95"])
        assert (f"| {score['accuracy']:.1%} | {low:.1f} to {high:.1f} | "
                f"{score['no_answer'] / score['n']:.1%} |") in README
    for targets, r in ((["query"], 8), (None, 4), (None, 1), (None, 64)):
        runs = [100 * run["accuracy"] for run in lines("sst2-section7.jsonl")
                if (run["targets"], run["r"]) == (targets, r)]
        name = f"| {targets[0] if targets else 'query and value'}, r={r} |"
        assert re.search(re.escape(name) + r" [\d,]+ \| " + re.escape(
            f"{statistics.mean(runs):.1f}% +/- {statistics.stdev(runs):.1f} |"), README)
    lora_, full = (statistics.mean(100 * run["accuracy"] for run in lines("sst2-pairs.jsonl")
                                   if run["r"] == r) for r in (8, None))
    assert f"LoRA r=8 {lora_:.1f}%, full fine-tuning {full:.1f}%" in README
    rounds = {}
    for line in lines("vs-peft.jsonl"):
        what = json.dumps([line[key] for key in ("targets", "flags", "dtype", "huge_pages")])
        rounds.setdefault(what, []).append(line)
    text = (HERE / "results/README.md").read_text(encoding="utf8")
    for same in rounds.values():
        cells = [len(same)]
        for kind in ("ours", "peft", "peft-tuned"):
            speed, peak = (statistics.median(line[kind][key] for line in same)
                           for key in ("tokens_per_s", "peak_gib"))
            cells.append(f"{speed:.1f} at {peak:.2f}")
        for kind in ("peft", "peft-tuned"):
            speed, peak = (statistics.median(line["ours"][key] / line[kind][key] for line in same)
                           for key in ("tokens_per_s", "peak_gib"))
            cells.append(f"x{speed:.2f}, x{peak:.2f}")
        assert f" | {' | '.join(map(str, cells))} |\n" in text


def test_the_table_from_paper_to_code_names_what_exists():
    from operator import attrgetter
    rows = re.findall(r"^\|[^|]+\| `([\w/]+)\.py`: `([\w.]+)` \|$", README, re.M)
    assert len(rows) >= 10
    for file, name in rows:
        assert attrgetter(name)(sys.modules[Path(file).name])


# --- train_math.py: what starts processes ---

SCRIPT = str(HERE / "train_math.py")


def test_sigkill_at_random_moments(tiny):
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


def test_two_processes_train_like_one_also_after_one_died(tiny):
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
    close(weights(Path("checkpoints/run", alone.name)), weights(alone), 1e-6)
    for one, two in zip(metrics("alone"), metrics(), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["tokens"] == two["tokens"]
