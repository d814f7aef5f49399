"""Every claim, as a test: python -m pytest -q. Tiny seeded models, nothing downloaded.

In the order of the files that are tested; what starts processes comes last.
"""
import argparse
import copy
import dataclasses
import gc
import importlib.util
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
import threading
import time
import warnings
from decimal import Decimal
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
                        encode, epoch_batches, kept_by_block, learning_rate_at, newest_state,
                        parse_args)
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


def train(model, steps):
    """Return the losses of some steps of AdamW."""
    losses, labels = [], IDS if hasattr(model, "lm_head") else torch.tensor([0, 1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
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
    """Training must move every A, every B and the named head, and no bit of the base."""
    model = roberta().train()
    inject_lora(model, LoRAConfig(r=4, **HEAD))
    before = bits(model)
    train(model, 3)
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


# --- injection and its refusals ---

@cases("bad", [
    dict(r=0), dict(r=1.5), dict(r="8"), dict(alpha=0), dict(alpha=math.nan),
    dict(alpha=10**400), dict(dropout=1.0), dict(dropout=-0.1), dict(targets=()),
    dict(rslora="false")])
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
    refused("'q_porj'.*: eq_proj, lm_head, mlp, q_proj, v_proj",
            inject_lora, model, LoRAConfig(targets=("q_proj", "q_porj")))
    refused("also_train 'head'", inject_lora, model, LoRAConfig(also_train="head"))
    assert same_bits(bits(model), bits(SmallGPT()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    inject_lora(model, LoRAConfig())
    refused("strip_lora", inject_lora, model, LoRAConfig())


def test_leftover_gradients_do_not_move_the_base():
    """An optimizer over all parameters must find no gradient from before the injection."""
    model = SmallGPT()
    model(IDS).sum().backward()
    inject_lora(model, LoRAConfig())
    assert all(parameter.grad is None for parameter in model.parameters())


@cases("device", ["cpu", "meta"])
def test_a_tied_weight_is_refused(device, tmp_path):
    """Training a head that is the embedding too would change both: refused in either role."""
    with torch.device(device):
        model = llama(tie_word_embeddings=True)
    model.tie_weights()
    for config in (LoRAConfig(targets=("q_proj", "lm_head")), LoRAConfig(also_train="lm_head")):
        refused("lm_head shares its weight with model.embed_tokens", inject_lora, model, config)
    saved(tmp_path, targets="lm_head")
    refused("lm_head shares its weight", load_adapter, model, tmp_path)
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


def test_layers_that_are_read_but_never_called_are_refused(monkeypatch):
    """torch's attention and encoder read .weight: an adapter there would do nothing."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    for name in ("out_proj", "linear1"):
        refused(f"{name}.* that can be adapted", inject_lora, model, LoRAConfig(targets=name))
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    inject_lora(model, LoRAConfig(targets="linear1"))


def test_what_only_looks_linear_is_left_alone():
    """Composites, convolutions, weights of shape (in, out) and lazy layers must stay plain."""
    composite = nn.ModuleDict({"inner": nn.Linear(8, 8)})
    conv = type("Conv1D", (nn.Conv1d,), {})(8, 8, 3)  # not that of transformers
    transposed = nn.Embedding(8, 4)  # stands for a layer of somebody's own
    for layer in (composite, transposed):
        layer.in_features, layer.out_features = 8, 4
    wrapper = type("Conv1D", (nn.Module,), {})()  # without a weight of its own
    model = nn.Sequential(composite, conv, transposed, nn.LazyLinear(3), wrapper,
                          nn.LazyConvTranspose1d(3, 3))
    for name in "012345":
        refused(f"'{name}' matches no layer", inject_lora, model, LoRAConfig(targets=name))
    assert inject_lora(model[:3], LoRAConfig(targets="all-linear")) == ["0.inner"]
    refused("no linear layer", inject_lora, nn.Linear(8, 8), LoRAConfig(targets="all-linear"))


EXPERTS = SMALL | dict(num_local_experts=2, intermediate_size_mlp=48, head_dim=8)


@cases("kind", ["phimoe", "llama4_text"])
def test_all_linear_leaves_out_routers(kind):
    """Routers return tuples: all-linear must train without them, a named one must say so."""
    model = make(kind, **EXPERTS)
    names = inject_lora(model, LoRAConfig(r=2, targets="all-linear"))
    assert len(names) >= 8 and not any("router" in name for name in names)
    train(model, 1)
    inject_lora(strip_lora(model), LoRAConfig(targets="router"))
    refused("Router returns a tuple.*targets", model, IDS)


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


def test_a_head_with_running_statistics_is_refused():
    """They would be in no file."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    refused("1 has buffers", inject_lora, model, LoRAConfig(targets="0", also_train="1"))


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


# --- merged, switched off, compiled, copied ---

def test_a_merged_model_neither_trains_nor_saves_nor_loads(tmp_path):
    """Each would lose the adapter or apply it twice: RuntimeError with the cure."""
    model, config = injected(llama)
    state = model.state_dict()
    logits(merge_lora(model).train())
    refused("model.eval.. to use.*unmerge_lora", model, IDS, error=RuntimeError)
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


def test_disable_is_the_base_also_after_an_exception(tmp_path):
    """Inside, the output must be the base's; after it, also after an error, the adapter's."""
    model, _ = saved(tmp_path)
    adapted = logits(model)
    with pytest.raises(KeyError), disable_lora(model):
        with disable_lora(model):
            pass
        assert torch.equal(logits(model), logits(llama()))
        refused("switched off", merge_lora, model, error=RuntimeError)
        refused("switched off", load_adapter, model, tmp_path, error=RuntimeError)
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


class Recorder(TorchDispatchMode):
    """Record the name and the result of each operation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        self.seen.append((str(function), output))
        return output


@cases("wrap", [lambda layer: layer, NF4Linear])
def test_an_adapted_layer_keeps_its_input_once(wrap):
    """For backward it may keep x, once, and tensors of the rank's size: nothing d wide."""
    layer = LoRALinear(wrap(nn.Linear(96, 80).bfloat16()), r=4, alpha=8).train()
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    kept, x = {}, torch.randn(50, 96).bfloat16().requires_grad_()

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    of_rank_size = 2 * 4 * (2 * 50 + 96 + 80)  # z, scaled z, A and B in bf16
    assert x.nbytes <= sum(kept.values()) <= x.nbytes + of_rank_size


def test_a_checkpointed_layer_does_not_run_its_base_again():
    """Backward does not need W0 x: recomputing must stop before it."""
    layer, x = LoRALinear(nn.Linear(32, 16), r=4, alpha=8), torch.randn(5, 32, requires_grad=True)
    with Recorder() as recorder:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert sum("addmm" in name for name, _ in recorder.seen) == 1  # the product with a bias


# --- adapter files ---

NUMPY = dict(r=numpy.int64(2), alpha=numpy.float32(4), dropout=numpy.float32(0.5))


@cases("build, first, second", [
    (llama, {}, dict(targets="all-linear", rslora=True)), (roberta, HEAD, dict(targets="dense")),
    (gpt2, dict(targets=("c_attn", "c_fc")), dict(targets="c_proj")),
    (lambda: SmallGPT().eval(), NUMPY, dict(targets="mlp"))])
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
    "q_proj.lora_A.*missing": lambda f: edit_tensors(f, lambda t: t.pop(KEY)),
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


VALUES = [None, True, 0, 1, -1, 3.5, 1e308, 10**400, math.nan, "", "q_proj", "\0", "x" * 10000, [],
          [1], ["q_proj"], [["q_proj"]], {}, {"q_proj": 4}]
SAMPLES = ["", "null", "1", "{}", f"[{10**400}]", "[[1], [2]]", "[true]", '"x"', "[" * 9999]
OPTIONS = ["use_dora", "rank_pattern", "layers_to_transform", "exclude_modules", "nosuch"]


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def mutant(weights, config, rng):
    """Return both files with one change: a bit, a cut, an option, an entry of the header."""
    end = 8 + int.from_bytes(weights[:8], "little")
    header, data, options = json.loads(weights[8:end]), weights[end:], json.loads(config)
    kind = rng.randrange(8)
    if kind < 3:  # a bit of the header, of the tensors, of the config
        parts = [weights[:end], data, config]
        parts[kind] = flip(parts[kind], rng)
        return parts[0] + parts[1], parts[2]
    if kind == 3:
        return weights[:rng.randrange(len(weights))], config
    if kind == 4:
        return weights, config[:rng.randrange(len(config))]
    if kind == 5:
        options[rng.choice([*options, *OPTIONS])] = rng.choice(VALUES)
        return weights, json.dumps(options).encode()
    if kind == 6:
        entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
        entry[rng.choice(["shape", "data_offsets"])] = rng.choices([0, 4, 16, 64, -1, 2**63], k=2)
    if kind == 7:
        header["__metadata__"] = {"base": rng.choice(SAMPLES)}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data, config


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


def test_a_hundred_adapters_on_one_base(tmp_path):
    """Each must answer like the model it was saved from, and nothing may pile up."""
    model, answers, counts = SmallGPT(), [], []
    for i in range(100):
        config = LoRAConfig(r=1 + i % 5, targets=["q_proj", "all-linear", "mlp"][i % 3])
        inject_lora(model, config)
        shake(model, 0.01 * (i + 1))
        save_adapter(model, config, tmp_path / str(i))
        answers.append(logits(model))
        strip_lora(model)
    for _ in range(2):
        for i, answer in enumerate(answers):
            load_adapter(model, tmp_path / str(i))
            assert torch.equal(logits(model), answer)
        gc.collect()
        counts.append(sum(type(x) in (torch.Tensor, nn.Parameter) for x in gc.get_objects()))
    assert counts[0] == counts[1]
    assert same_bits(bits(strip_lora(model)), bits(SmallGPT()))


@cases("here", [*DTYPES, "nf4"])
def test_another_base_warns_and_another_dtype_does_not(here, tmp_path):
    """A sample of the base must tell another seed, and not be misled by rounding."""
    saved(tmp_path, lambda: in_dtype(SmallGPT(), here))
    for there in (*DTYPES, "nf4"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_adapter(in_dtype(SmallGPT(), there), tmp_path)
        with pytest.warns(UserWarning, match="another base"):
            load_adapter(in_dtype(SmallGPT(seed=1), there), tmp_path)


def test_bf16_files_give_fp32_adapters(tmp_path):
    """A and B must be fp32 whatever the file and the base hold."""
    saved(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({key: t[key].bfloat16() for key in t}))
    load_adapter(model := llama().bfloat16(), tmp_path)
    assert {t.dtype for t in adapter_state_dict(model).values()} == {torch.float32}


def test_saving_refuses_what_would_not_load_again(tmp_path):
    """Another config, NaN and a weight unfrozen by hand must raise, and leave the old file."""
    model, config = saved(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    refused("was injected", save_adapter, model, LoRAConfig(r=4, alpha=16), tmp_path)
    norm = model.model.norm.requires_grad_(True)
    refused("model.norm.weight trains.*also_train.*before", save_adapter, model, config, tmp_path)
    norm.requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.lora_A.data[0, 0] = math.nan
    refused("layers.1.self_attn.q_proj.lora_A.* NaN", save_adapter, model, config, tmp_path)
    refused("no adapter", save_adapter, llama(), config, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    inject_lora(model := llama(), config)
    with pytest.warns(UserWarning, match="4 adapted layers.*never trained.*optimizer"):
        save_adapter(model, config, tmp_path)


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


def test_confusing_names_come_back(tmp_path):
    """Whole names that are endings of others, and a head called lora_head, frozen, must load."""
    def build():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"q": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
        return nn.ModuleDict({"q": nn.Linear(4, 4), "b": inner, "lora_head": nn.Linear(4, 2)})

    for targets in ("all-linear", "b.q"):  # "q" would mean two layers
        model, config = injected(build, targets=targets, also_train="lora_head")
        save_adapter(model.requires_grad_(False), config, tmp_path)
        load_adapter(other := build(), tmp_path)
        assert same_bits(bits(other), bits(model))


@quiet
@cases("build, options", [
    (llama, dict(target_modules=r".*layers\.1\..*\.(q|v)_proj", use_rslora=True)),
    (llama, dict(target_modules="all-linear")),
    (llama, dict(target_modules=["q_proj"], layers_to_transform=0)),
    (llama, dict(target_modules=["q_proj"], exclude_modules=["model.layers.0.self_attn.q_proj"])),
    (llama, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    (llama, dict(target_modules=["q_proj", "lm_head"])),
    (gpt2, dict(target_modules=["c_attn"], fan_in_fan_out=True)),
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
        base = "base_model.model.lm_head.base_layer.weight"
        edit_tensors(tmp_path, lambda t: t[base].add_(1))
        refused("another base weight for lm_head", load_adapter, model, tmp_path)


def test_every_option_of_peft_is_honoured_harmless_or_refused(tmp_path):
    """What makes another kind of adapter must be refused by name; an unknown option must warn."""
    peft = pytest.importorskip("peft")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert known <= lora.SUPPORTED | lora.UNSUPPORTED and len(lora.UNSUPPORTED) >= 17
    assert not lora.SUPPORTED & lora.UNSUPPORTED
    model, _ = saved(tmp_path)
    for option in lora.UNSUPPORTED:
        edit_config(tmp_path, **{option: {"q_proj": 1}})
        refused(f"{option} = .*PEFT", load_adapter, model, tmp_path)
        edit_config(tmp_path, **{option: None})
    for start in ("pissa", "olora", "loftq", "corda", "lora_ga"):
        edit_config(tmp_path, init_lora_weights=start)
        refused(f"init_lora_weights is '{start}'", load_adapter, model, tmp_path)
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


def test_nf4_keeps_nothing_and_its_index_is_small():
    """Backward must find no weight kept, and no integers above 2 bytes a weight be made."""
    layer, kept = packed(torch.randn(64, 128)), []
    x = torch.randn(2, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    assert not kept and not any(tensor.shape == (64, 128) for tensor in tensors)
    with Recorder() as recorder:
        y.sum().backward()
    integers = [t.nbytes for _, t in recorder.seen if not t.is_floating_point()]
    assert 0 < max(integers) <= 2 * 64 * 128


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
    model, own = llama(), type("Own", (nn.Linear,), {})
    assert len(quantize_nf4(model, ("q_proj",))) == 12
    assert quantize_nf4(model, ()) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    layers[1].weight = layers[0].weight
    with pytest.warns(UserWarning, match="0 shares its weight.*stays dense"):
        assert quantize_nf4(layers) == ["2"]
    damaged = nn.Sequential(nn.Linear(8, 8))
    damaged[0].weight.data[3, 3] = math.nan
    for model, reason in ((nn.Sequential(own(8, 8)), "but a Own"), (damaged, "of finite floats"),
                          (SmallGPT().to("meta"), "on meta")):
        with pytest.warns(UserWarning, match=reason):
            refused("no linear layer to quantise", quantize_nf4, model)


def test_quantising_comes_before_injection():
    """Over an adapter it must be refused; a head in 4 bits cannot be in also_train."""
    inject_lora(model := llama(), LoRAConfig())
    refused("quantise the base first", quantize_nf4, model)
    refused("classifier has buffers", inject_lora, in_dtype(roberta(), "nf4"), LoRAConfig(**HEAD))


# --- eval_gsm8k.py: helpers ---

def test_prompts(tiny, count=16):
    return [format_prompt(q) for q, _ in read_rows(str(tiny / "test.jsonl"), "test", count)]


test_prompts.__test__ = False


def lively(model, std=0.5):
    """Larger weights: an untrained model then does not repeat one word."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.detach().normal_(std=std)
    return model


def save_random_adapter(tiny, folder):
    model, config = load(tiny)[0], LoRAConfig(r=4)
    inject_lora(model, config)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, config, folder)


def evaluate(tiny, *flags):
    common = ["--model", tiny / "base", "--data", tiny / "test.jsonl", "--max-new-tokens", "8",
              "--dtype", "float32", "--device", "cpu"]
    return eval_gsm8k.main(eval_gsm8k.parse_args([str(flag) for flag in [*common, *flags]]))


# --- eval_gsm8k.py: prompt and answer ---

@pytest.mark.parametrize("text, strict", [
    ("#### 1,234", "1234"), ("5 + 5 = 10\n#### 10\n#### 11", "10"), ("#### -5", "-5"),
    ("The answer is: $29.00.", "29"), ("#### $-5", "-5"), ("#### -$5", "-5"), ("#### .5", "0.5"),
    ("The answer is 12 apples.", "12"), ("#### 1/2", "0.5"), ("#### \u22125", "-5"),
    (r"The answer is: \boxed{18}", "18"), (r"The answer is: $\frac{3}{4}$", "0.75"),
    (r"The answer is -\frac{3}{4}", "-0.75"), ("So the answer is 3. The answer is 4.", "4"),
    ("#### 7\nThe answer is: 7\n\nQuestion: next\nAnswer: The answer is 9", "7"),
    ("The answer is 1,2 and 3", "1"), ("#### 12,345,678.25 dollars", "12345678.25"),
    ("#### 1/0", None), ("#### none\n5", None), ("#### none\n#### 5", "5"), ("", None),
    ("She has 5 apples.", None), ("\u0130\u0130 x. The answer is 12", "12"),
    ("Question: #### 5", None), ("The answer is:\n18", "18"), ("#### 50%", "50")])
def test_a_strict_answer_needs_a_marker(text, strict):
    """Only a number behind a marker counts, before the next question."""
    assert extract_answer(text) == (None if strict is None else Decimal(strict))


@pytest.mark.parametrize("text, flexible", [
    ("She has 5, then 6 apples.", "6"), ("10-5=5 and 20-30", "30"), ("#### 7 or 8", "7"),
    ("nothing", None), ("so it is -3.", "-3"), ("5 then\nQuestion: 7", "5"), ("29.00", "29"),
    ("The answer is unknown, 4", "4"), ("#### 10\n#### 11", "11")])
def test_a_flexible_answer_falls_back_to_the_last_number(text, flexible):
    """Without a number behind a marker the last one counts."""
    wanted = None if flexible is None else Decimal(flexible)
    assert extract_answer(text, flexible=True) == wanted


def test_numbers_of_any_length_compare_exactly():
    """No digit may be rounded away, in front of the point or behind it, nor in a quotient."""
    long = "9" * 40
    assert extract_answer(f"#### {long}") == int(long) != extract_answer(f"#### {long[:-1]}8")
    assert extract_answer(f"#### -0.{long}") != extract_answer(f"#### -0.{long}1")
    assert extract_answer("#### 1/3") == Fraction(1, 3) != extract_answer(f"#### 0.{'3' * 40}")
    assert extract_answer("#### " + "7" * 5000) == extract_answer(f"#### {'7' * 5000}.0")
    assert extract_answer("#### 1/" + "7" * 5000) < 1
    assert json.dumps([extract_answer("#### 18"), extract_answer("0.50", True)],
                      default=str) == '["18", "0.50"]'


def harness(text, flexible):
    """The two published filters of lm-evaluation-harness's gsm8k task, and its exact_match."""
    pattern = r"(-?[$0-9.,]{2,})|(-?[0-9]+)" if flexible else r"#### (\-?[0-9\.\,]+)"
    found = re.findall(pattern, text)
    if not found:
        return "[invalid]"
    last = found[-1] if flexible else found[0]
    answer = last if isinstance(last, str) else next(group for group in last if group)
    return normalised(answer.strip())


def normalised(answer):
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(ignored, "", answer)
    return answer.lower()


STEPS = ["", "2 + 2 = 4. ", "He pays $1,250.50 for 3-4 of 12. ", "48/2 = 24 clips, i.e. 50%. ",
         "First #### 7\nno, ", "#### none so far, -8 ", "It is 10-5=5... ", "x = -3; y = .5 ",
         "We know that 1/2 of 18 is 9.\n", "\u00bd and 3\u00b2, $5 each; "]
ENDINGS = ["18", "-5", "1,080", "1080", "0.5", "12,345,678.25", "7", "70000", "18."]


def test_scores_equal_lm_evaluation_harness():
    """On completions that end in "#### n" both modes must score as the two published filters."""
    cases = 0
    for steps in STEPS:
        for ending in ENDINGS:
            text = f"{steps}so\n#### {ending}"
            for reference in ("18", "-5", "1,080", "0.5", "7", "12,345,678.25"):
                for flexible in (False, True):
                    theirs = harness(text, flexible) == normalised(f"Steps.\n#### {reference}")
                    ours = extract_answer(text, flexible) == extract_answer(f"#### {reference}")
                    assert ours == theirs, (text, reference, flexible)
                    cases += 1
    assert cases > 1000 and harness("#### 1,080", True) == "1080"


class AppendsEOS:
    """A tokenizer that puts BOS in front and EOS behind."""
    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) for letter in text]
        return argparse.Namespace(input_ids=[1, *ids, 2] if add_special_tokens else ids)


def test_prompt_has_bos_once_and_never_eos():
    """An EOS at the end of the prompt would end it before the answer."""
    assert encode_prompt(AppendsEOS(), "ab") == [1, 97, 98]
    assert format_prompt("1 + 1?") == "Question: 1 + 1?\nAnswer:"


# --- eval_gsm8k.py: data ---

def test_rows_of_all_schemas_and_kinds_of_file(workdir):
    """MetaMathQA, GSM8K and Alpaca rows must come out as question and answer, text as text."""
    rows = {"a.jsonl": ({"query": "q", "response": "r", "type": "t"}, ("q", "r")),
            "b.json": ({"question": "q", "answer": "r\u2028s"}, ("q", "r\u2028s")),
            "c.json": ({"instruction": "do", "input": "it", "output": "so"}, ("do\nit", "so")),
            "d.jsonl": ({"instruction": "do", "input": "", "output": "so"}, ("do", "so"))}
    for name, (row, wanted) in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for _ in range(3))
        Path(name).write_text(json.dumps([row] * 3) if name == "c.json" else lines)
        assert read_rows(name, "train") == [wanted] * 3 and len(read_rows(name, "train", 2)) == 2
    Path("e.csv").write_text('question,answer\nhow many?,2\nNA,"b,\nc"\n')
    assert read_rows("e.csv", "train") == [("how many?", "2"), ("NA", "b,\nc")]
    Path("f[0]*.jsonl").write_text('{"question": "q", "answer": "a"}\n')  # a name, no pattern
    Path("f01.jsonl").write_text('{"question": "q", "answer": "b"}\n')
    assert read_rows("f[0]*.jsonl", "train") == [("q", "a")]
    import pyarrow
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"query": ["q"], "response": ["r"]}), "g.parquet")
    assert read_rows("g.parquet", "train") == [("q", "r")]


def test_rows_without_an_answer_are_dropped_and_counted(workdir, capsys):
    """Alpaca has 28 empty outputs: they must neither stop a run nor be trained on."""
    rows = [{"instruction": str(i), "output": text} for i, text in enumerate(["a", "", None, "b"])]
    Path("alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows("alpaca.jsonl", "train") == [("0", "a"), ("3", "b")]
    assert "alpaca.jsonl: 2 rows without an answer" in capsys.readouterr().out


def test_only_calculator_marks_are_removed(workdir):
    """<<48/2=24>> goes, code between << and >> stays."""
    code = 'std::cout << "a"; std::cin >> b; x <<= 1; y = 1 << 2 >> 3'
    texts = ["48/2 = <<48/2=24>>24, .5*(3-1)=<<.5*(3-1)=1>>1", code]
    rows = [{"question": "q", "answer": text} for text in texts]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [a for _, a in read_rows("x.jsonl", "t")] == ["48/2 = 24, .5*(3-1)=1", code]


@pytest.mark.parametrize("name, text, message", [
    ("x.csv", None, "no such file"), ("x.jsonl", "", "is empty"), ("x.json", "[]", "is"),
    ("x.csv", "query,response\n", "is empty"),
    ("x.jsonl", "{broken\n", "JSONDecodeError"), ("x.jsonl", "\0" * 99, "JSONDecodeError"),
    ("x.jsonl", "null", "cannot be read"), ("x.parquet", "PAR1", "cannot be read"),
    ("x.jsonl", '{"text": "a", "tag": 1}', "row 1: expected texts as query and response"),
    ("x.jsonl", '{"query": "q", "response": "a"}\n{"query": 1, "response": "b"}', "row 2")])
def test_bad_data_is_one_clear_error(name, text, message, workdir):
    """Every way that a data file can be wrong must be a ValueError of one line that names it."""
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(ValueError, match=f"--data {name}") as caught:
        read_rows(name, "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- eval_gsm8k.py: the Hub ---

@pytest.fixture
def hub(monkeypatch):
    """Answer for the Hub: call hub(x) to set what asking it returns, raises or does."""
    def set_answer(answer):
        class Api:
            def repo_info(self, name, repo_type, timeout):
                assert timeout < 10
                return answer()
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return set_answer


CALLS = [lambda: read_rows("someone/data", "train"),
         lambda: load_model("someone/model", torch.float32, CPU)]


@pytest.mark.parametrize("call", CALLS)
def test_without_a_hub_one_line_names_the_ways_out(call, monkeypatch):
    """A Hub out of reach must end in seconds, naming --model DIR, --data FILE and --demo."""
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9"))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="cannot be reached.*--model DIR and --data FILE.*--demo"):
        call()
    assert time.monotonic() - begin < 20


def test_a_hanging_name_look_up_counts_as_no_hub(hub, monkeypatch):
    """A look-up obeys no timeout of the request, so the wait for it must have one of its own."""
    hub(lambda: time.sleep(60))
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda thread, wait: join(thread, wait / 40))
    with pytest.raises(ValueError, match="cannot be reached"):
        CALLS[1]()


@pytest.mark.parametrize("call", CALLS)
def test_a_repository_that_is_not_there_is_told_from_a_hub_that_is_not(call, hub):
    """The line must name it, and must not blame the network."""
    class Response:
        headers, request, status_code = {}, None, 404

    def missing():
        raise huggingface_hub.errors.RepositoryNotFoundError("404", response=Response())
    hub(missing)
    with pytest.raises(ValueError, match="someone/.*: no such file.*no such repository") as caught:
        call()
    assert "cannot be reached" not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_here_is_not_asked_of_the_hub(tiny, hub):
    """A folder and a file must load without a request."""
    hub(lambda: pytest.fail("asked"))
    load(tiny)
    read_rows(str(tiny / "test.jsonl"), "test")


# --- eval_gsm8k.py: device, dtype, model ---

def test_a_process_of_torchrun_touches_its_own_gpu_alone(monkeypatch):
    """Touching "cuda" first would open a context on GPU 0 in every process."""
    touched = []
    monkeypatch.setattr(eval_gsm8k, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "empty", lambda *_, device: touched.append(str(device)))
    for name in ("auto", "cuda"):
        assert eval_gsm8k.pick_device(name) == torch.device("cuda", 1)
    assert touched == ["cuda:1"] * 2


def test_half_precision_without_units_is_the_user_s_choice(monkeypatch):
    """On a CPU without half-precision units auto must be float32; by name it warns, and obeys."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert eval_gsm8k.pick_dtype("auto", CPU)[0] == torch.float32
    with pytest.warns(UserWarning, match="--dtype bfloat16"):
        assert eval_gsm8k.pick_dtype("bfloat16", CPU)[0] == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert eval_gsm8k.pick_dtype("auto", CPU)[0] == torch.bfloat16


def test_the_dtype_asked_for_is_the_dtype_loaded(tiny, workdir):
    """transformers takes the checkpoint's own dtype unless told."""
    model, tokenizer = load(tiny)
    model.bfloat16().save_pretrained("half")
    tokenizer.save_pretrained("half")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        parameters = load_model("half", dtype, CPU)[0].parameters()
        assert {parameter.dtype for parameter in parameters} == {dtype}


def test_models_that_cannot_serve_are_refused(tiny, workdir):
    """No folder, an empty one, junk, and missing weights must each be one line."""
    model, tokenizer = load(tiny)
    for name in ("empty", "junk", "partial"):
        Path(name).mkdir()
    Path("junk/config.json").write_text("{")
    tokenizer.save_pretrained("partial")
    model.save_pretrained("partial", state_dict={k: v for k, v in model.state_dict().items()
                                                 if "up_proj" not in k})
    for name in ("./none", "empty", "junk", "partial"):
        with pytest.raises(ValueError, match=f"--model {name}") as caught:
            load_model(name, torch.float32, CPU)
        assert "\n" not in str(caught.value)
    for device in ("cuda:7", "gpu", "meta"):
        with pytest.raises(ValueError, match=f"--device {device}"):
            eval_gsm8k.pick_device(device)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_4_bit_model_lets_go_of_the_dense_file(tiny, workdir):
    """One embedding that stayed a view of the file would keep all of it beside the 4-bit copy."""
    model, tokenizer = load(tiny)
    model.save_pretrained("mapped")
    tokenizer.save_pretrained("mapped")
    for nf4 in (False, True):
        model = load_model("mapped", torch.float32, CPU, nf4)[0]
        assert ("mapped/model.safetensors" in Path("/proc/self/maps").read_text()) != nf4
        del model


# --- eval_gsm8k.py: generation ---

def test_batched_generation_equals_one_by_one(tiny):
    """Left padding with a mask must not change a token, and the order must be kept."""
    model, tokenizer = load(tiny)
    lively(model)
    prompts = test_prompts(tiny)
    assert len({len(encode_prompt(tokenizer, prompt)) for prompt in prompts}) > 1
    alone = [complete(model, tokenizer, [prompt], 1, 12)[0] for prompt in prompts]
    assert complete(model, tokenizer, prompts, 16, 12) == alone and len(set(alone)) > 1


@pytest.mark.parametrize("pad", [None, 10**6])
def test_a_pad_id_without_an_embedding_is_replaced(tiny, pad):
    """Llama's tokenizers have no pad id, or one added beyond the embeddings: any id serves."""
    model, tokenizer = load(tiny)
    prompts = test_prompts(tiny)
    wanted = complete(model, tokenizer, prompts, 8, 20)

    class OtherPad:
        pad_token_id, eos_token_id = pad, tokenizer.eos_token_id
        decode, batch_decode = tokenizer.decode, tokenizer.batch_decode
        __call__ = staticmethod(tokenizer.__call__)
    assert complete(model, OtherPad(), prompts, 8, 20) == wanted


@pytest.mark.parametrize("wish", [
    dict(do_sample=True, temperature=3.0), dict(no_repeat_ngram_size=1), dict(min_new_tokens=20),
    dict(repetition_penalty=9.0), dict(cache_implementation="static"), dict(num_beams=3)])
def test_a_checkpoint_s_own_generation_settings_do_not_enter_the_scores(tiny, wish):
    """Decoding must be greedy, and the settings must be there again for --save-merged."""
    model, tokenizer = load(tiny)
    prompts = test_prompts(tiny, 4)
    greedy = complete(model, tokenizer, prompts, 4, 20)
    for key, value in wish.items():
        setattr(model.generation_config, key, value)
    own = model.generation_config.to_dict()
    assert complete(model, tokenizer, prompts, 4, 20) == greedy
    assert model.generation_config.to_dict() == own


def generate_alone(model, tokenizer, prompt, length):
    """What transformers' generate says, one prompt at a time: the new ids."""
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=length)
    return out[0, ids.shape[1]:].tolist()


def test_rows_that_have_ended_leave_the_batch(tiny):
    """Every row must say what generate says of it alone, while the batch becomes narrower."""
    model, tokenizer = load(tiny)
    lively(model)
    prompts = test_prompts(tiny, 8)
    endless = [generate_alone(model, tokenizer, prompt, 50) for prompt in prompts]
    first_said = {token: min(said.index(token) for said in endless if token in said)
                  for token in sorted(set(sum(endless, [])))}
    late = [token for token, place in first_said.items() if place > 5]
    eos = model.generation_config.eos_token_id = [tokenizer.eos_token_id, *late[::3]]
    alone = [generate_alone(model, tokenizer, prompt, 50) for prompt in prompts]
    widths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    batched = complete(model, tokenizer, prompts, 8, 50)
    hook.remove()
    assert batched == [(tokenizer.decode(new, skip_special_tokens=True),
                        len(new) == 50 and new[-1] not in eos) for new in alone]
    assert len({len(new) for new in alone}) > 3
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] == 8


@pytest.mark.parametrize("config", [
    OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4),
    MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2)])
def test_models_without_a_cache_or_with_a_state_beside_it_answer_too(tiny, config):
    """There are no rows to take out: each must say what generate says of it alone."""
    _, tokenizer = load(tiny)
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.pad_token_id = 0
    model = lively(AutoModelForCausalLM.from_config(config).eval(), 0.3)
    prompts = test_prompts(tiny)
    length = len(encode_prompt(tokenizer, prompts[0]))  # GPT-1 counts padding as positions
    same = [p for p in prompts if len(encode_prompt(tokenizer, p)) == length][:3]
    alone = [tokenizer.decode(generate_alone(model, tokenizer, prompt, 40),
                              skip_special_tokens=True) for prompt in same]
    assert [text for text, _ in complete(model, tokenizer, same, 3, 40)] == alone
    assert len(same) > 1


def test_rows_beyond_the_model_s_positions_are_refused(tiny):
    """Learned positions would end in an index error, rotary ones in silent nonsense."""
    model, tokenizer = load(tiny)
    model.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match="the model has 40 positions: lower --max-new-tokens"):
        complete(model, tokenizer, test_prompts(tiny, 1), 1, 40)
    with pytest.raises(ValueError, match="they do not belong together"):
        eval_gsm8k.check_ids(model, [[10**6]])


# --- eval_gsm8k.py: scores, and a run of evaluations ---

def test_intervals_and_exact_test_give_published_values():
    """Wilson's interval and McNemar's exact p must equal values worked out elsewhere."""
    for (correct, n), wanted in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605),
                                 (0, 20): (0.0, 0.1611)}.items():  # Newcombe 1998, Table I
        assert wilson_interval(correct, n) == pytest.approx(wanted, abs=1e-4)
    first = [True] * 1 + [False] * 9 + [True] * 90
    second = [False] * 1 + [True] * 9 + [True] * 90
    assert mcnemar_p(first, second) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_p(second, first) == mcnemar_p(first, second) and mcnemar_p(first, first) == 1


def test_evaluation_writes_scores_for_base_and_every_checkpoint(tiny, workdir):
    """A run folder stands for its checkpoints, by number. What it says must be in the files."""
    for step in ("step_999000", "step_1000000"):
        save_random_adapter(tiny, f"checkpoints/run/{step}")
    scores = evaluate(tiny, "--adapter", "checkpoints/run")
    assert [name for name, _ in scores] == ["base", "run-step_999000", "run-step_1000000"]
    result = json.loads(Path("eval_results/run-step_1000000-test.json").read_text())
    assert {"model", "adapter", "data", "n", "correct", "accuracy", "ci95", "correct_flexible",
            "accuracy_flexible", "no_answer", "truncated", "seconds", "p_value"} <= set(result)
    assert result["n"] == 16 and result == scores[2][1]
    lines = Path("eval_results/base-test.jsonl").read_text().splitlines()
    assert len(lines) == 16 and json.loads(lines[0])["reference"].isdigit()
    assert json.loads(Path("eval_results/base-test.json").read_text())["adapter"] is None
    assert pytest.importorskip("matplotlib") and Path("eval_results/run-test.png").exists()


def test_a_merged_model_answers_the_same_and_loads_elsewhere(tiny, workdir):
    """transformers must load it, with the logits of base and adapter."""
    save_random_adapter(tiny, "adapter")
    evaluate(tiny, "--adapter", "adapter", "--save-merged", "merged")
    files = [Path(f"eval_results/{name}-test.jsonl") for name in ("adapter", "adapter-merged")]
    plain, merged = ([json.loads(line)["completion"] for line in file.read_text().splitlines()]
                     for file in files)
    assert plain == merged
    model, ids = load(tiny)[0], torch.arange(3, 20)[None]
    load_adapter(model, "adapter")
    reloaded = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
    wanted = model.eval()(ids).logits
    torch.testing.assert_close(reloaded(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_different_evaluation_under_the_same_name_is_refused(tiny, workdir, monkeypatch):
    """It must be refused before the model is loaded; the same one may be done again."""
    evaluate(tiny, "--nb-samples", "3")
    before = Path("eval_results/base-test.json").read_text()
    evaluate(tiny, "--nb-samples", "3")
    monkeypatch.setattr(eval_gsm8k, "load_model", lambda *_: pytest.fail("loaded"))
    for flags in (["--nb-samples", "4"], ["--nb-samples", "3", "--shots", "1"]):
        with pytest.raises(ValueError, match="base-test.json holds another.*give another --out"):
            evaluate(tiny, *flags)
    assert json.loads(before)["n"] == 3


def test_bad_runs_are_refused(tiny, workdir):
    """What cannot be scored must say so, before an hour of generation."""
    Path("full").mkdir()
    Path("full/file").write_text("")
    save_random_adapter(tiny, "adapter")
    for flags, message in ((["--save-merged", "merged"], "exactly one adapter"),
                           (["--adapter", "nowhere"], "nowhere is no adapter"),
                           (["--adapter", "adapter", "--save-merged", "full"], "empty"),
                           (["--adapter", "adapter", "adapter"], "two results"),
                           (["--shots", "16"], "no problem is left")):
        with pytest.raises(ValueError, match=message):
            evaluate(tiny, *flags)


def test_two_processes_score_like_one(tiny, workdir):
    """JSON and completions must be those of one process, but for the seconds."""
    save_random_adapter(tiny, "adapter")
    flags = ["--adapter", "adapter", "--batch-size", "3"]
    evaluate(tiny, *flags, "--out", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "--", HERE / "eval_gsm8k.py", "--model", tiny / "base", "--data",
               tiny / "test.jsonl", "--max-new-tokens", "8", "--dtype", "float32", "--device",
               "cpu", *flags, "--out", "two"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("scores and completions are in") == 1
    for path in Path("one").glob("*.json*"):
        one, two = path.read_text(), Path("two", path.name).read_text()
        assert re.sub('"seconds": .*', "", one) == re.sub('"seconds": .*', "", two)
    assert len(list(Path("two").glob("*.json*"))) == 4


# --- eval_gsm8k.py: the edge ---

@pytest.mark.parametrize("flags, culprit", [
    (["--batch-size", "0"], "--batch-size"), (["--batch-size", "two"], "--batch-size"),
    (["--seed", "1e400"], "--seed"), (["--dtype", "float8"], "--dtype"), (["--r", "4"], "--r")])
def test_bad_flags_are_one_line_and_exit_code_2(flags, culprit, capsys):
    """argparse must answer with one line that names the flag, and no usage block."""
    with pytest.raises(SystemExit) as stopped:
        eval_gsm8k.parse_args(flags)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and culprit in err


def test_numbers_out_of_range_are_refused():
    """NaN and infinity are no numbers of any range."""
    kind = eval_gsm8k.number(float, 0, 1)
    assert kind("0") == 0 and eval_gsm8k.number(float, 0)("1e300") == 1e300
    for bad in ("1.1", "-1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(bad)
    with pytest.raises(argparse.ArgumentTypeError):
        eval_gsm8k.number(float, 0)("inf")


@pytest.mark.parametrize("error, code, line", [
    (ValueError("two\nlines"), 2, "x.py: two lines\n"), (ValueError(), 2, "x.py: ValueError: no"),
    (torch.OutOfMemoryError(), 2, "--batch-size, --nf4"), (KeyboardInterrupt(), 130, "")])
def test_errors_end_in_one_line(error, code, line, capsys):
    """Also an error without a message, which must not break its own handler."""
    def fails(args):
        raise error
    with pytest.raises(SystemExit) as stopped:
        eval_gsm8k.run_script("x.py", fails, lambda: None)
    err = capsys.readouterr().err
    assert stopped.value.code == code and line in err and err.count("\n") == (code == 2)


def test_evaluation_ends_in_one_line_without_traceback(workdir):
    """From the shell: exit code 2, one line on stderr."""
    Path("x.jsonl").write_text("{")
    done = subprocess.run([sys.executable, str(HERE / "eval_gsm8k.py"), "--data", "x.jsonl"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "x.jsonl" in done.stderr


# --- train_math.py: helpers ---

ROW = list(range(10, 26))  # 16 token ids


def causal(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def rows_of(tiny):
    return read_rows(str(tiny / "train.jsonl"), "train")


def adapted(tiny, **options):
    """Return a model with an adapter that is not zero, training, and its rows."""
    model, tokenizer = load(tiny)
    torch.manual_seed(0)
    inject_lora(model, LoRAConfig(r=4, **options))
    for parameter in trained(model):
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.train(), encode(rows_of(tiny), tokenizer, 512)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def command(tiny, *flags, name="run"):
    return ["--model", str(tiny / "base"), "--data", str(tiny / "train.jsonl"), "--device", "cpu",
            "--run-name", name, "--dtype", "float32", "--lr", "1e-2", "--r", "4",
            "--batch-size", "4", "--grad-accum", "2", *flags]


def run(tiny, *flags, name="run"):
    """Run main() in this process; return the last checkpoint's folder."""
    return train_math.main(parse_args(command(tiny, *flags, name=name)))


def metrics(name="run"):
    return [json.loads(line) for line in open(f"runs/{name}/metrics.jsonl")]


def saved_state(folder):
    """Return (the adapter's tensors, AdamW's moments)."""
    adapter = (Path(folder) / "adapter_model.safetensors").read_bytes()
    state = torch.load(Path(folder) / "trainer_state.pt")["optimizer"]["state"]
    moments = {(i, key): value for i, group in state.items() for key, value in group.items()}
    return safetensors.torch.load(adapter), moments


def gradients(model):
    return {i: parameter.grad.clone() for i, parameter in enumerate(trained(model))}


# --- train_math.py: data ---

def test_training_masks_exactly_what_generation_is_given(tiny):
    """A row must be the prompt's ids, the answer's and EOS; all but the prompt is a target."""
    _, tokenizer = load(tiny)
    tokenizer.pad_token = tokenizer.eos_token  # pad == eos must not lose the final EOS
    texts = rows_of(tiny)[:5]
    ids, rows, columns = collate(encode(texts, tokenizer, 512), "cpu")
    for i, (question, answer) in enumerate(texts):
        prompt = encode_prompt(tokenizer, format_prompt(question))
        targets = columns[rows == i].tolist()
        assert ids[i, :targets[0]].tolist() == prompt
        assert tokenizer.decode(ids[i, targets]) == f"{answer} <eos>"


@pytest.mark.parametrize("merges, answer", [([], "▁2"), ([(":", "▁")], "▁▁2")])
def test_prompt_and_answer_are_tokenised_as_one_text(merges, answer):
    """No second space token may start an answer, unless a token would span the seam."""
    words = ["<s>", "</s>", *sorted(set("Question:▁1+1?\nAnswer:▁2")), ":▁"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, merges))
    inner.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    [(ids, prompt)] = encode([("1+1?", "2")], tokenizer, 512)
    assert ids[:prompt] == encode_prompt(tokenizer, format_prompt("1+1?"))
    assert tokenizer.convert_ids_to_tokens(ids[prompt:]) == [*answer, "</s>"]
    assert [ids.index(0), ids.count(0), ids.count(1)] == [0, 1, 1]


def test_batches_follow_from_seed_and_epoch_and_start_with_the_largest():
    """An epoch must hold each row once, pad little, and mix short and long batches."""
    lengths = random.Random(0).choices(range(10, 500), k=1003)
    batches = epoch_batches(lengths, 8, 0, 0)
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert sorted(sum(batches, [])) == list(range(1003))
    assert batches == epoch_batches(lengths, 8, 0, 0)
    assert batches not in (epoch_batches(lengths, 8, 0, 1), epoch_batches(lengths, 8, 1, 0))
    assert padded[0] == max(padded)
    assert sum(padded) < 1.1 * sum(lengths)
    assert padded[1:] != sorted(padded[1:])


# --- train_math.py: loss, attention ---

@pytest.mark.parametrize("chunk", [2**22, 300])
def test_loss_and_gradients_equal_the_full_computation(tiny, chunk, monkeypatch):
    """Logits in chunks, at targets alone, must give what labels of -100 and a mask give."""
    monkeypatch.setattr(train_math, "CHUNK", chunk)
    model, examples = adapted(tiny)
    batch = collate(examples[:6], "cpu")
    total = backward_loss(model, batch, 0.5)
    ours = gradients(model)
    model.zero_grad()
    ids, rows, columns = batch
    labels = torch.full_like(ids, -100)
    labels[rows, columns] = ids[rows, columns]
    loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss * len(rows)
    (0.5 * loss).backward()
    torch.testing.assert_close(total, loss.detach())
    torch.testing.assert_close(ours, gradients(model), atol=1e-5, rtol=1e-4)


def test_accumulation_equals_one_big_batch(tiny, workdir):
    """8 x 1, 4 x 2 and 1 x 8 rows of unequal length must give one gradient."""
    for batch, accumulate in (("8", "1"), ("4", "2"), ("1", "8")):
        last = run(tiny, "--nb-samples", "8", "--epochs", "1", "--dropout", "0", "--batch-size",
                   batch, "--grad-accum", accumulate, name=batch)
        wanted = saved_state(Path("checkpoints/8/step_000001"))[1]  # the gradient's moments
        torch.testing.assert_close(saved_state(last)[1], wanted, atol=1e-8, rtol=1e-4)
        assert metrics(batch)[0]["loss"] == pytest.approx(metrics("8")[0]["loss"], rel=1e-6)
    assert len({len(ids) for ids, _ in adapted(tiny)[1][:8]}) > 1


@pytest.mark.parametrize("name, options", [
    ("Gemma2", {}), ("Granite", {"logits_scaling": 2.0}), ("Llama4Text", {"num_local_experts": 2})])
def test_heads_that_do_more_than_multiply_are_refused(name, options):
    """A cap, a scale, or no hidden states beside the logits: one line must say so."""
    with pytest.raises(ValueError, match=f"^{name[:6]}.*ForCausalLM .* not supported here$"):
        train_math.check_head(causal(name, **options), ROW)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "FalconMamba", "NemotronH"])
def test_state_space_models_train_in_half_precision(name, dtype):
    """fp32 logits or hidden states must neither crash the check nor the loss."""
    options = {"state_size": 4, "ssm_state_size": 8, "num_heads": 4, "head_dim": 16,
               "n_groups": 1, "chunk_size": 8}
    if name == "NemotronH":
        options.update(layers_block_type=["mamba", "attention"], mamba_num_heads=4,
                       mamba_head_dim=16, head_dim=8)
    model = causal(name, dtype, **options)
    train_math.check_head(model, ROW)
    inject_lora(model, LoRAConfig(targets=["in_proj"]))
    assert 40 < backward_loss(model.train(), collate([(ROW, 4)], "cpu"), 1 / 12) < 60
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def attend(model, dropout):
    """Return the logits of two rows, and their gradients in the projections."""
    model.train(dropout > 0).zero_grad()
    torch.manual_seed(3)
    logits = model(torch.tensor([ROW, ROW[::-1]])).logits.float()
    logits.square().sum().backward()
    grown = {name: p.grad.float() for name, p in model.named_parameters() if "_proj" in name}
    return {"logits": logits.detach(), **grown}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, window", [("Llama", None), ("Mistral", 4)])
def test_attention_is_transformers_own(name, window, dtype, dropout):
    """Logits and gradients must be eager attention's: grouped heads, window, dropout."""
    model = causal(name, dtype, attn_implementation="eager", sliding_window=window,
                   attention_dropout=dropout, initializer_range=0.1)
    wanted = attend(model, dropout)
    train_math.check_head(model.eval(), ROW)
    assert model.config._attn_implementation == "lora_training"
    for key, value in attend(model, dropout).items():
        error = (value - wanted[key]).norm() / wanted[key].norm()
        assert error < (1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps), key


@pytest.mark.parametrize("name, options", [
    ("Gemma2", {"final_logit_softcapping": None}),  # a cap of 50: hardly seen here
    ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}), ("GPTJ", {"rotary_dim": 8})])
def test_an_architecture_with_an_attention_of_its_own_keeps_it(name, options):
    """With a cap, sinks, or no way to switch, the model must stay as it was."""
    model = causal(name, **options)
    before, logits = bits(model), model(torch.tensor([ROW])).logits
    train_math.check_head(model, ROW)
    assert model.config._attn_implementation == "eager"
    assert same_bits(bits(model), before)
    assert torch.equal(model(torch.tensor([ROW])).logits, logits)


def kept_for_backward(function, *inputs, **options):
    """Return the bytes that function() keeps, each tensor counted once."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*inputs, **options)
    return sum(tensor.nbytes for tensor in kept.values())


def test_key_and_value_are_not_repeated_on_a_cpu():
    """8 heads over 1 must keep Q, K, V and the weights, and nothing else."""
    query = torch.randn(1, 8, 16, 32, requires_grad=True)
    key, value = torch.randn(2, 1, 1, 16, 32).requires_grad_()
    kept = kept_for_backward(train_math.attention, None, query, key, value, None)
    assert kept == query.nbytes + key.nbytes + value.nbytes + 4 * 8 * 16 * 16


# --- train_math.py: recomputation, the memory plan ---

def test_recomputing_gives_the_same_gradients_and_keeps_block_inputs(tiny):
    """Behind frozen embeddings, with dropout: the same bits, every A and B reached."""
    grown, kept = [], []
    for recompute in (False, True):
        model, examples = adapted(tiny, dropout=0.1)
        batch = collate(examples[:8], "cpu")
        if recompute:
            train_math.checkpoint_blocks(model)
        kept.append(kept_for_backward(model.base_model, batch[0], use_cache=False))
        torch.manual_seed(0)
        backward_loss(model, batch)
        grown.append(gradients(model))
    assert same_bits(*grown)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in grown[1].values())
    assert kept[1] < min(6 * 4 * 32 * batch[0].numel(), 0.2 * kept[0])


@pytest.mark.parametrize("more, flags, recompute", [
    (1, [], False), (-1, [], True), (None, [], True), (-1, ["--no-checkpoint-activations"], False),
    (2**60, ["--checkpoint-activations"], True)])
def test_the_plan_chooses_and_flags_force_it(more, flags, recompute, tiny, monkeypatch, capsys):
    """Recompute where 1.25 times the need exceeds what is free, or where that is unknown."""
    model, _ = adapted(tiny)
    _, whole = kept_by_block(model, 40)
    plan = train_math.memory_plan(model, 4, whole, whole)
    need = sum(plan.values()) - plan["base weights"] - plan["trained weights"]
    free = None if more is None else int(1.25 * need) + more
    monkeypatch.setattr(train_math, "free_memory", lambda *_: free)
    train_math.plan_memory(model, parse_args(command(tiny, *flags)), 40, 4)
    assert f"{need / 2**30:.2f} GiB beside the weights" in capsys.readouterr().out
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    backward_loss(model, collate([(ROW, 4)], "cpu"))
    assert len(calls) == 1 + recompute


def test_vram_limits_the_allocator_and_the_plan(monkeypatch):
    """With --vram 4 the allocator must get 3.5 GiB, also of "cuda", and the plan what is left."""
    GB, capped = 2**30, []
    card = SimpleNamespace(total_memory=16 * GB)
    for name, result in (("current_device", 0), ("get_device_properties", card),
                         ("mem_get_info", (10 * GB, 16 * GB)), ("memory_reserved", 2 * GB),
                         ("memory_allocated", GB)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *args: capped.append(args),
                        raising=False)
    for name in ("cuda", "cuda:0"):
        train_math.limit_vram(4.0, torch.device(name))
    assert capped == 2 * [(3.5 / 16, 0)]
    with pytest.raises(ValueError, match="--vram 24 is above this card's own 16.0 GiB"):
        train_math.limit_vram(24.0, torch.device("cuda"))
    assert train_math.free_memory(torch.device("cuda"), None) == 11 * GB
    assert train_math.free_memory(torch.device("cuda"), 4.0) == 2.5 * GB


def test_mps_with_dropout_is_not_recomputed(tiny, monkeypatch):
    """Its random state is not restored: kept by default, refused when asked for."""
    parameter = SimpleNamespace(device=torch.device("mps"))
    model, done = SimpleNamespace(parameters=lambda: iter([parameter])), []
    for name, fake in (("kept_by_block", lambda *_: (1, 1)), ("checkpoint_blocks", done.append),
                       ("free_memory", lambda *_: None),  # as on a Mac, which has no /proc
                       ("memory_plan", lambda *_: {"base weights": 0, "trained weights": 0})):
        monkeypatch.setattr(train_math, name, fake)

    def plan(*flags):
        train_math.plan_memory(model, parse_args(command(tiny, *flags)), 40, 4)

    plan()
    with pytest.raises(ValueError, match="mps.*--dropout 0"):
        plan("--checkpoint-activations")
    assert not done
    plan("--dropout", "0")
    assert done


@pytest.mark.parametrize("recompute, nf4", [(False, False), (True, False), (True, True)])
def test_the_memory_plan_is_what_a_step_holds(recompute, nf4, monkeypatch):
    """All tensors alive at once, as torch's profiler counts them: within 25% of the plan."""
    monkeypatch.setattr(train_math, "CHUNK", 2**18)
    model = causal("Llama", vocab_size=2048, hidden_size=256, intermediate_size=704, head_dim=64,
                   num_hidden_layers=6).train()
    if nf4:
        quantize_nf4(model)
    train_math.use_attention(model)
    inject_lora(model, LoRAConfig(targets="all-linear"))
    block_input, whole = kept_by_block(model, 128)
    plan = train_math.memory_plan(model, 4, block_input if recompute else whole, whole)
    if recompute:
        train_math.checkpoint_blocks(model)
    optimizer = torch.optim.AdamW(trained(model))
    for _ in range(2):  # AdamW's moments are there after the first
        with torch.profiler.profile(profile_memory=True) as profiler:
            backward_loss(model, collate([(list(range(128)), 1)] * 4, "cpu"), 1 / 508)
            optimizer.step()
            optimizer.zero_grad()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    peak += sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    peak += plan["AdamW's moments"]
    assert 0.75 < peak / sum(plan.values()) < 1.25


# --- train_math.py: loss scaling, schedule, numbers that go wrong ---

def test_loss_scaler_agrees_with_torch_s_grad_scaler():
    """On a recorded sequence of good and overflowing steps, scale and skips must be the same."""
    ours, scales = LossScaler(True, scale=2.0**16, interval=3), set()
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    mine, weight, unreached = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    sgd, their_sgd = torch.optim.SGD([mine], lr=0.1), torch.optim.SGD([weight], lr=0.1)
    for gradient in [1, 2, math.inf, 3, 1, 2, 3, math.nan, math.inf, 1, 1, 1, 1, 1, 1, 1]:
        weight.grad = torch.full((2,), gradient * theirs.get_scale())
        theirs.scale(torch.ones(1))  # it wants to be asked first
        theirs.step(their_sgd)
        theirs.update()
        mine.grad = torch.full((2,), gradient * ours.scale)
        ours.unscale([mine, unreached])
        finite = bool(mine.grad.isfinite().all())
        if finite:
            sgd.step()
        ours.update(finite)
        assert ours.scale == theirs.get_scale()
        assert torch.equal(mine, weight)
        scales.add(ours.scale)
    assert scales == {2.0**14, 2.0**15, 2.0**16}


def test_schedule_warms_up_then_falls_to_zero():
    """At most a tenth of the steps rise to the peak, then half a cosine."""
    rates = [learning_rate_at(step, 100, 1000, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert [rates[10], rates[55], rates[99]] == pytest.approx([1, 0.5, 0], abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate_at(0, 1, 100, 1.0) == learning_rate_at(0, 5, 0, 1.0) == 1.0


def test_a_skipped_step_changes_nothing_but_the_scale(tiny, workdir, monkeypatch, recwarn):
    """In fp16, also where a layer gets no gradient, which must be named once."""
    weights = []

    def overflow(model, batch, weight):
        loss = backward_loss(model, batch, weight)
        weights.append(bits(model))
        if len(weights) == 2:
            trained(model)[0].grad.fill_(math.inf)
        return loss

    def with_tower(*args):
        model, tokenizer = eval_gsm8k.load_model(*args)
        torch.manual_seed(0)
        model.tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
        return model, tokenizer

    warnings.simplefilter("always")
    monkeypatch.setattr(train_math, "backward_loss", overflow)
    monkeypatch.setattr(train_math, "load_model", with_tower)
    flags = ["--dtype", "float16", "--max-steps", "3", "--grad-accum", "1", "--warmup-steps", "0",
             "--save-every", "1"]
    last = run(tiny, *flags)
    lines = metrics()
    assert [line["skipped"] for line in lines] == [False, True, False]
    assert [line["loss_scale"] for line in lines] == [2**16, 2**15, 2**15]
    assert lines[1]["grad_norm"] is None  # NaN is not JSON
    assert same_bits(weights[1], weights[2]) and not same_bits(weights[0], weights[1])
    assert lines[0]["lr"] != lines[1]["lr"] == lines[2]["lr"]
    assert {float(m) for key, m in saved_state(last)[1].items() if key[1] == "step"} == {2.0}
    [named] = [str(said.message) for said in recwarn if "gradient" in str(said.message)]
    assert named.startswith("2 weights") and "tower.q_proj" in named
    os.truncate(last / "trainer_state.pt", 100)
    run(tiny, *flags, "--resume")
    assert all(metrics()[2][key] == lines[2][key] for key in ("lr", "loss_scale", "loss"))


@pytest.mark.parametrize("dtype, loss, message", [
    ("float32", lambda *_: torch.tensor(math.nan), "^step 1: loss nan.*--lr, or --dtype.*/run"),
    ("bfloat16", lambda *_: torch.tensor(math.inf), "^step 1: loss inf"),
    ("float16", lambda *_: torch.tensor(math.nan), "^step 20: loss nan")])
def test_a_run_that_diverges_says_what_may_help(dtype, loss, message, tiny, workdir, monkeypatch):
    """NaN must stop fp32 and bf16 at once, fp16 after 20 skips."""
    monkeypatch.setattr(train_math, "backward_loss", loss)
    with pytest.raises(ValueError, match=message):
        run(tiny, "--dtype", dtype)


# --- train_math.py: the run, its files, resuming ---

def test_training_learns_and_writes_what_it_says(tiny, workdir, capsys):
    """The loss must fall, every step leave a line, the checkpoint load; facts come first."""
    last = run(tiny, "--epochs", "6", "--save-every", "10", "--max-length", "38")
    lines, out = metrics(), capsys.readouterr().out
    losses = [line["loss"] for line in lines]
    dropped = sum(len(ids) > 38 for ids, _ in adapted(tiny)[1])
    facts = ("4 layers adapted", f", {dropped} dropped over 38", "memory plan", "tok/s",
             "peak memory", "score it")
    assert sorted(facts, key=out.index) == list(facts)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert " ".join(lines[0]) == ("step loss lr grad_norm loss_scale tokens tokens_per_s "
                                  "peak_memory_gb skipped")
    assert sum(losses[-8:]) < sum(losses[:8]) - 0.4
    states = [(folder / "trainer_state.pt").exists() for folder in checkpoints(last.parent)]
    assert states == (len(states) - 2) * [False] + [True, True]  # every adapter stays
    assert 0 < dropped < 64 and len(states) > 2
    assert load_adapter(load(tiny)[0], last).targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("file, more", [
    ("trainer_state.pt", []), ("adapter_model.safetensors", ["--nf4", "--targets", "all-linear"])])
def test_resume_continues_bitwise(file, more, tiny, workdir, recwarn):
    """Where the newest checkpoint is damaged, the one before must lead to the same bits."""
    flags = ["--nb-samples", "7", "--batch-size", "1", "--grad-accum", "4", "--dropout", "0.1",
             "--save-every", "3", *more]
    last = run(tiny, *flags)
    whole, lines = saved_state(last), metrics()
    os.truncate(last / file, 100)
    assert run(tiny, *flags, "--resume", "--checkpoint-activations") == last
    assert any("step_000006 is damaged" in str(warning.message) for warning in recwarn)
    for one, two in zip(whole, saved_state(last)):
        assert same_bits(one, two)
    for one, two in zip(lines, metrics(), strict=True):
        varying = {"tokens_per_s", "peak_memory_gb"}
        assert all(one[key] == two[key] for key in one.keys() - varying)
    assert run(tiny, *flags, "--resume") == last  # finished already


def test_the_seed_reaches_dropout(tiny, workdir, monkeypatch):
    """With A and the order of rows held, seeds must differ, also by 2**31; one repeats."""
    monkeypatch.setattr(train_math, "epoch_batches", lambda *_: [[0], [1]])
    losses = []
    for seed in ("0", "0", "1", str(2**31)):
        model, examples = adapted(tiny, dropout=0.5)
        train_math.train(model, examples, parse_args(command(tiny, "--seed", seed)))
        losses.append(metrics()[0]["loss"])
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_resume_refuses_what_it_cannot_continue(tiny, workdir):
    """A run that never was, a taken name, another flag, data or base: refused by name."""
    copy = Path(shutil.copytree(tiny, "copy"))

    def refuse(message, *flags):
        with pytest.raises(ValueError, match=message):
            run(copy, "--max-steps", "1", *flags)

    refuse("no whole checkpoint to continue from", "--resume")
    run(copy, "--max-steps", "1")
    refuse("has checkpoints up to step_000001: add --resume")
    refuse("--resume: --lr was 0.01, is 0.02", "--resume", "--lr", "0.02")
    model, _ = load(copy)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(copy / "base")
    refuse("--resume: base was ", "--resume")
    shutil.copytree(tiny / "base", copy / "base", dirs_exist_ok=True)
    (copy / "train.jsonl").write_text((tiny / "train.jsonl").read_text().replace("Ann", "Ben"))
    refuse("--resume: data was ", "--resume")


def test_checkpoints_sort_as_numbers(tiny, workdir):
    """step_1000000 must come after step_999000 and keep its state, whatever lies damaged later."""
    model, folder = adapted(tiny)[0], Path("checkpoints/run")
    for later in ("step_1002000", "step_1003000"):
        (folder / later).mkdir(parents=True)
    for step in (998000, 999000, 1000000):
        state = {"step": step, "optimizer": {}, "identity": {}}
        train_math.save_checkpoint(folder / f"step_{step}", model, LoRAConfig(r=4), state)
    kept = {path.parent.name for path in folder.glob("*/trainer_state.pt")}
    assert kept == {"step_999000", "step_1000000"}
    assert newest_state(folder)[1]["step"] == 1000000


def test_a_full_disk_leaves_the_last_checkpoint(tiny, workdir, monkeypatch):
    """The one before must stay whole, and --resume go on from it."""
    save = torch.save

    def full(state, file):
        if state["step"] == 3:
            raise OSError(28, "No space left on device")
        save(state, file)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full)
        run(tiny, "--save-every", "1")
    assert newest_state(Path("checkpoints/run"))[1]["step"] == 2
    run(tiny, "--save-every", "1", "--resume")


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_interrupting_saves_and_says_how_to_go_on(name, code, tiny, workdir, monkeypatch, capsys):
    """The step must be finished and saved, and the exit code be the signal's."""
    def interrupt(step, *rest):
        if step == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return learning_rate_at(step, *rest)

    monkeypatch.setattr(train_math, "learning_rate_at", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(tiny, "--max-steps", "4")
    assert stopped.value.code == code
    assert "run/step_000002; with --resume" in capsys.readouterr().out
    assert newest_state(Path("checkpoints/run"))[1]["step"] == len(metrics()) == 2


# --- train_math.py: command lines ---

@pytest.mark.parametrize("flags, message", [
    (["--r", "0"], "--r"), (["--lr", "nan"], "--lr"), (["--dropout", "1"], "--dropout"),
    (["--run-name", "../up"], "--run-name"), (["--targets", "q_porj"], "'q_porj' matches no"),
    (["--device", "cuda:9"], "--device cuda:9"), (["--vram", "4"], "--vram 4 caps the CUDA"),
    (["--data", "none.jsonl"], "no such file"), (["--max-length", "4"], "4 leaves no row"),
    (["--model", "TIED", "--targets", "lm_head"], "shares its weight")])
def test_wrong_input_is_one_line(flags, message, tiny, workdir, capsys):
    """What a flag or a file can cause must be named, before anything is written."""
    with pytest.raises((ValueError, SystemExit)) as error:
        run(tiny, *[str(tiny / "tied") if flag == "TIED" else flag for flag in flags])
    said = capsys.readouterr().err or f"{error.value}\n"
    assert message in said and said.count("\n") == 1
    assert not list(workdir.iterdir())


def test_processes_that_differ_are_refused(tiny, workdir, monkeypatch):
    """Another rank with other flags or rows would train something else in silence."""
    monkeypatch.setattr(train_math, "RANK", 1)
    monkeypatch.setattr(train_math, "gather", lambda value: [[*value[:-1], "other"], value])
    with pytest.raises(ValueError, match="the processes differ in flags, data"):
        run(tiny)


# --- train_sst2.py ---

@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder: a tiny random BERT (bert/), one without dropout (dry/), sentences (data/)."""
    folder, rng = tmp_path_factory.mktemp("sst2"), random.Random(0)
    for name, dropout in [("bert", 0.1), ("dry", 0.0)]:
        model, tokenizer = train_sst2.demo_encoder()
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = dropout
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    for split, count in [("train", 96), ("validation", 40)]:
        rows = map(json.dumps, train_sst2.demo_sentences(rng, count, "story"))
        (folder / f"data/{split}.jsonl").write_text("\n".join(rows))
    return folder


def sst2(encoder, *flags):
    return train_sst2.parse_args([
        "--model", str(encoder / "bert"), "--data", str(encoder / "data"), "--device", "cpu",
        "--dtype", "float32", "--epochs", "1", "--batch-size", "16", "--lr", "5e-3", *flags])


def prepared(encoder, *flags):
    args = sst2(encoder, *flags)
    return args, train_sst2.read_data(args)


def test_an_ablation_writes_a_line_per_run_and_skips_finished_ones(encoder, workdir, capsys):
    """Each run must stand in sst2.jsonl as a line; started again, only a lost one is done."""
    args = sst2(encoder, "--ranks", "1", "2", "--seeds", "0", "1", "--full-finetune")
    runs = train_sst2.main(args)
    assert [(run["r"], run["seed"]) for run in runs] == [
        (1, 0), (1, 1), (2, 0), (2, 1), (None, 0), (None, 1)]
    assert [run["adapter_parameters"] for run in runs] == [512, 512, 1024, 1024, 0, 0]
    assert [run["trainable"] for run in runs[::5]] == [512 + 64 * 2 + 2, runs[5]["total"]]
    assert len({run["loss"] for run in runs}) == 6
    train_sst2.report([run | {"accuracy": n / 10} for n, run in enumerate(runs)])
    assert re.search(r"r=2 +1,024 +1,154 +25.00% +7.07", capsys.readouterr().out)
    assert Path("runs/sst2/sst2.png").exists()
    path = Path("runs/sst2/sst2.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    again = train_sst2.main(args)
    assert again[:-1] == runs[:-1] and again[-1]["loss"] == runs[-1]["loss"]
    assert capsys.readouterr().out.count("in runs/sst2/sst2.jsonl already") == 5
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
    low, high = wilson_interval(round(accuracy * 40), 40)
    assert f"{accuracy:.2%} [{low:.2%}, {high:.2%}] of 40" in (out := capsys.readouterr().out)
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
        model, _, _ = train_sst2.start_run(args, r, 0)
        for _, layer in lora_layers(model):
            nn.init.ones_(layer.lora_B)  # B = 0 would hide A's gradient
        sizes = []
        pack = lambda tensor: sizes.append(tensor.nbytes) or tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train_sst2.backward_loss(model.train(), data["train"][:16], 1.0, "float32")
        parameters = model.named_parameters()
        gradients.append({name: p.grad for name, p in parameters if p.grad is not None})
        saved.append(sum(sizes))
    assert len(gradients[0]) >= 10 and same_bits(*gradients) and saved[1] < saved[0] / 4


def test_both_scripts_scale_the_loss_alike():
    """On a recorded sequence scale and gradients must be train_math.py's, which are torch's."""
    scalers = LossScaler(True, 2.0**10, 3), Sst2LossScaler(True, 2.0**10, 3)
    weights = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for finite in [1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0]:
        for scaler, weight in zip(scalers, weights):
            weight.grad = torch.full((3,), scaler.scale)
            scaler.unscale([weight, weights[2]])
            assert (weight.grad == 1).all()
            scaler.update(bool(finite))
        assert scalers[0].scale == scalers[1].scale


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
            start, _, _ = train_sst2.load_encoder(args, 0)
            assert run["skipped"] == 12 and same_bits(bits(start), bits(model))
    assert 0 < run["skipped"] < 12 and steps[0][0] == args.full_lr
    assert max(norm for _, norm in steps) < 1.001  # clipped
    args.epochs, scale = 2, 2.0**120
    refused("at step 20: try a lower --full-lr", train_sst2.train, args, data, None, 0)


def test_without_scaling_the_first_bad_loss_stops(encoder, workdir):
    """A NaN loss in fp32 must end the run at its step, naming --lr."""
    shutil.copytree(encoder / "bert", "broken")
    tensors = load_file("broken/model.safetensors")
    tensors["embeddings.word_embeddings.weight"][2] = math.nan
    save_file(tensors, "broken/model.safetensors", metadata={"format": "pt"})
    refused("loss nan.*at step 1: try a lower --lr", train_sst2.main,
            sst2(encoder, "--model", "./broken"))


def test_padding_does_not_change_an_encoder_s_loss(encoder):
    """One by one or in padded batches labels must be equal and in order, and the loss too."""
    args, data = prepared(encoder)
    examples = data["validation"]
    model, _, _ = train_sst2.load_encoder(args, 0)
    model.classifier.weight.data.normal_()
    with torch.no_grad():
        logits = train_sst2.classify(model.eval(), examples, "float32")[0]
        model.classifier.bias -= logits.mean(0)  # so that both labels are predicted
    labels, _, loss = train_sst2.evaluate(model, examples, "float32")
    assert 0 < labels.sum() < len(examples)
    assert torch.equal(labels, (logits - logits.mean(0)).argmax(-1))
    alone, _, losses = zip(*[train_sst2.evaluate(model, [one], "float32") for one in examples])
    assert labels.tolist() == [int(label) for label in alone]
    assert loss == pytest.approx(sum(losses) / len(examples), abs=1e-5)


def test_the_seed_reaches_head_adapter_data_and_dropout(encoder):
    """Seeds must differ in all four, also beyond the 32 bits that torch's CPU generator uses."""
    args, data = prepared(encoder)
    seen = []
    for seed in (0, 1, 2**32):
        model, _, _ = train_sst2.start_run(args, 2, seed)
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
    assert [label for _, label in few["train"]] == [label for _, label in wanted]
    assert [ids[:4] for ids, _ in few["train"]] == [ids[:4] for ids, _ in wanted]
    assert {len(ids) for ids, _ in few["train"]} == {5}


def test_what_a_checkpoint_lacks_is_trained_or_named(encoder, workdir):
    """DistilBERT's head has two layers; a random module outside of --head must be refused."""
    config = transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4)
    transformers.DistilBertModel(config).save_pretrained("distil")
    config = transformers.BertConfig.from_pretrained(encoder / "bert")
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained("headless")
    args = sst2(encoder, "--model", "distil")
    _, _, facts = train_sst2.start_run(args, 2, 0)
    assert facts["trainable"] == 2 * 2 * 2 * (32 + 32) + 32 * 33 + 2 * 33
    args.model = "headless"
    refused("headless has no bert.pooler.*--head", train_sst2.start_run, args, 2, 0)


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
    (["--data", "empty"], "one train file"), (["--data", "hollow"], "--data hollow: "),
    (["--data", "columns"], "'sentence'"), (["--data", "unlabelled"], "'a', -1"),
    (["--targets", "q_porj"], "'q_porj' matches no layer"), (["--head", "top"], "top"),
    (["--model", "./none"], "no such folder"), (["--adapter", "nowhere"], "nowhere"),
    (["--device", "tpu9"], "--device tpu9: ")])
def test_bad_input_to_sst2_is_a_clear_error(flags, message, encoder, workdir):
    """Folders, columns, labels, targets, devices: each must be one line that names it."""
    Path("empty").mkdir()
    for name, text in [("columns", '{"text": "a", "label": 1}'), ("hollow", ""),
                       ("unlabelled", '{"sentence": "a", "label": -1}')]:
        Path(name).mkdir()
        Path(name, "train.jsonl").write_text(text)
    refused(message, train_sst2.main, sst2(encoder, *flags))


@cases("failure, message", [
    (RepositoryNotFoundError, "no such folder, and no public model"),
    (OSError, "cannot be reached"), ("hangs", "cannot be reached")])
def test_a_missing_repository_is_told_from_a_silent_hub(failure, message, monkeypatch):
    """The Hub must be asked once; what it does not answer must say so in seconds."""
    asked = []

    def repo_info(self, name, repo_type, timeout):
        asked.append(name)
        if failure == "hangs":
            time.sleep(5)
        raise failure.__new__(failure)  # without a message
    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    get = ApplyResult.get
    monkeypatch.setattr(ApplyResult, "get", lambda self, timeout: get(self, timeout / 40))
    train_sst2.hub_problem.cache_clear()
    args, start = train_sst2.parse_args(["--model", "someone/some"]), time.perf_counter()
    for _ in range(2):
        refused(f"--model someone/some: .*{message}", train_sst2.main, args)
    assert asked == ["someone/some"] and time.perf_counter() - start < 4


def test_half_precision_is_chosen_where_the_cpu_has_units(monkeypatch):
    """Elsewhere fp32 must be the default, and bf16 by name a warning."""
    for units, dtype in [(True, "bfloat16"), (False, "float32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
        assert train_sst2.pick_dtype("auto", CPU)[0] == dtype
    with pytest.warns(match="--dtype bfloat16: this CPU has no units"):
        train_sst2.pick_dtype("bfloat16", CPU)


@cases("flags", [["--ranks", "0"], ["--ranks"], ["--lr", "nan"], ["--lr", "inf"], ["--seeds", "x"]])
def test_sst2_flags_out_of_range_are_one_line(flags, capsys):
    """argparse must answer with one line that names the flag, and exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        train_sst2.parse_args(flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[0] in error


@cases("error, code, text", [
    (ValueError(), 2, "ValueError"), (OSError("a\nb"), 2, "a"), (KeyboardInterrupt(), 130, ""),
    (RuntimeError("can't allocate memory"), 2, "--checkpoint-activations")])
def test_the_edge_prints_one_line_whatever_the_error(error, code, text, monkeypatch, capsys):
    """An error, also one with no message, must end in at most one line and its exit code."""
    def fail(args):
        raise error
    monkeypatch.setattr(train_sst2, "main", fail)
    monkeypatch.setattr(sys, "argv", ["train_sst2.py"])
    monkeypatch.setattr(warnings, "formatwarning", None)
    with pytest.raises(SystemExit, match=str(code)):
        train_sst2.run_script()
    printed = capsys.readouterr().err
    assert printed.count("\n") == (code == 2) and text in printed


def test_what_would_train_wrongly_is_refused(encoder, monkeypatch):
    """On MPS recomputed blocks draw other dropout masks; several processes write one file."""
    args = sst2(encoder, "--checkpoint-activations")
    with monkeypatch.context() as patch:
        mps = SimpleNamespace(device=torch.device("mps"))
        patch.setattr(torch, "zeros", lambda *_, device: mps)
        refused("--checkpoint-activations: on MPS", train_sst2.prepare, args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("python, not torchrun", train_sst2.main, args)


def test_the_demo_repeats_and_deletes_nothing_of_others(workdir, monkeypatch):
    """Twice in one folder, with fewer sentences: six new runs each, another's file is kept."""
    make = train_sst2.demo_sentences
    fewer = lambda rng, count, about: make(rng, count // 50, about)
    monkeypatch.setattr(train_sst2, "demo_sentences", fewer)
    Path("demo-sst2").mkdir()
    Path("demo-sst2/mine").touch()
    for seed in (0, 1):
        runs = train_sst2.main(train_sst2.parse_args(["--demo", "--seeds", str(seed)]))
        assert [run["seed"] for run in runs] == 3 * [seed, seed + 1]
    assert Path("demo-sst2/mine").exists() and Path("demo-sst2/base/model.safetensors").exists()


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
        model = AutoModelForSequenceClassification.from_pretrained(encoder / "bert")
        config = LoRAConfig(r, targets=targets, also_train=["classifier"])
        inject_lora(model, config)
        shake(model)
        save_adapter(model, config, folder)
        return dict(lora_layers(model))

    a, b = adapter("a", 2, "query", "value"), adapter("b", 4, "query", "dense")
    adapter("c", 2, "value")
    compare = lambda *folders: train_sst2.main(train_sst2.parse_args(["--compare", *folders]))
    [maps] = compare("a", "b")
    first, last = (f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1))
    V1, V2 = (torch.linalg.qr(layers[last].lora_A.T).Q for layers in (a, b))
    phi = (V1.T @ V2).square().sum() / 2
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(last)]
    W, dW = b[last].weight, b[last].delta()
    assert rows[0][-1] == f"{phi:.2f}"
    assert rows[2][1:4] == ["4", f"{W.norm():.2f}", f"{dW.norm():.2f}"]
    close(maps["mean of 2 attention.self.query"], (maps[first] + maps[last]) / 2)
    close(maps["chance, max(i, j) / k"][1], torch.tensor([2, 2, 3, 4]) / 64)
    assert maps["random"].shape == (2, 4) and Path("runs/sst2/compare-a-b.png").exists()
    refused("none", compare, "b", "none")
    refused("share no layer", compare, "b", "c")


# --- the CUDA path, on fake tensors ---

@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_cuda_path_mixes_no_devices_or_dtypes():
    """Two steps on a CUDA device that is pretended: every mix of devices or dtypes would raise."""
    code = """
import sys, itertools
sys.path.insert(0, "bench")
import memory
memory.pretend_cuda()
import torch
shape = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2)
for dtype, nf4 in itertools.product((torch.float16, torch.bfloat16), (False, True)):
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

SCRIPT = [sys.executable, str(HERE / "train_math.py")]

def test_the_script_ends_in_one_line_without_traceback(workdir):
    """From the shell: exit code 2, one line on stderr."""
    wrong = [["--data", "none.jsonl"], ["--alpha", "inf"]]
    started = [subprocess.Popen([*SCRIPT, *flags], stderr=subprocess.PIPE) for flags in wrong]
    for process, flags in zip(started, wrong):
        said = process.communicate(timeout=100)[1].decode()
        assert process.returncode == 2
        assert flags[-1] in said and said.count("\n") == 1


def test_sigkill_at_random_moments(tiny, workdir):
    """Killed at any moment, every other time while it saves, a run must end in the same bits.

    KILLS=20 python -m pytest -q -k sigkill is the stress run.
    """
    rng, kills = random.Random(0), int(os.environ.get("KILLS", 2))
    flags = ["--dropout", "0.1", "--epochs", str(3 + kills), "--save-every", "1"]
    alone, folder = saved_state(run(tiny, *flags, name="alone"))[0], Path("checkpoints/run")
    for kill in range(kills):
        goal = len(checkpoints(folder)) + rng.randint(1, 5)
        for part in folder.glob("*.part"):  # left by the last kill
            shutil.rmtree(part)
        flag = ["--resume"] if kill else []
        process = subprocess.Popen([*SCRIPT, *command(tiny, *flags, *flag)])
        while process.poll() is None and len(checkpoints(folder)) < goal:
            time.sleep(0.001)
        while process.poll() is None and kill % 2 and not list(folder.glob("*.part")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0 if kill % 2 else 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it did not end by itself
    assert same_bits(saved_state(run(tiny, *flags, "--resume"))[0], alone)
    assert [line["loss"] for line in metrics()] == [line["loss"] for line in metrics("alone")]


def torchrun(script, flags):
    """Run two processes on gloo; each rank's stderr is in the result."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*call, "--", str(script), *flags], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


TWO = ["--nb-samples", "8", "--epochs", "2", "--batch-size", "1", "--grad-accum", "3",
       "--dropout", "0.1"]


def test_two_processes_resume_and_train_like_one(tiny, workdir):
    """Windows of 3 over 2 processes, the last of 1, dropout on: the weights of one process."""
    whole = saved_state(run(tiny, *TWO, "--save-every", "3"))
    lines = metrics()
    shutil.rmtree("checkpoints/run/step_000006")
    flags = command(tiny, *TWO, "--save-every", "3", "--resume")
    done = torchrun(SCRIPT[1], flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layers adapted") == 1  # rank 0 alone speaks
    again = saved_state("checkpoints/run/step_000006")[0]
    torch.testing.assert_close(again, whole[0], atol=1e-6, rtol=0)
    for one, two in zip(lines, metrics(), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    counts = [line["tokens"] for line in metrics()]
    assert sum(counts) == 2 * sum(len(ids) for ids, _ in adapted(tiny)[1][:8])
    assert counts[-1] < min(counts[:-1])


DIES = """
import sys
sys.path.insert(0, {folder!r})
import train_math
real, calls = train_math.backward_loss, []
def dies(*args):
    calls.append(1)
    if train_math.RANK == 1 and len(calls) == 2:
        raise train_math.torch.OutOfMemoryError("rank 1's card is full")
    return real(*args)
train_math.backward_loss = dies
train_math.run_script("train_math.py", train_math.main, train_math.parse_args)
"""


def test_a_process_that_dies_ends_the_run_with_its_reason(tiny, workdir):
    """Rank 1 alone fails in step 2: its line must be there, and step 1 as one process has it."""
    (workdir / "dies.py").write_text(DIES.format(folder=str(HERE)))
    done = torchrun(workdir / "dies.py", command(tiny, *TWO, "--save-every", "1"))
    assert done.returncode != 0
    assert "train_math.py (rank 1): out of memory (OutOfMemoryError: rank 1's card" in done.stderr
    assert newest_state(Path("checkpoints/run"))[1]["step"] == 1
    run(tiny, *TWO, name="alone")
    for key in ("loss", "grad_norm"):
        assert metrics()[0][key] == pytest.approx(metrics("alone")[0][key], rel=1e-5)
