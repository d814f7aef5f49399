"""Every claim, as a test: python -m pytest -q. Tiny seeded models, nothing downloaded; in the order of the files they test."""
import argparse
import functools
import gc
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from decimal import Decimal
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AutoModelForCausalLM, DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel,
                          LlamaConfig, LlamaForCausalLM, MambaConfig, OpenAIGPTConfig, RobertaConfig, RobertaForSequenceClassification)
from transformers.pytorch_utils import Conv1D

import eval_gsm8k
import train_math
import train_sst2
from eval_gsm8k import complete, encode_prompt, extract_answer, format_prompt, mcnemar_p, read_rows, wilson_interval
from lora import (BLOCK, NF4, LoRAConfig, LoRALinear, NF4Linear, adapter_state_dict, count_parameters, dequantize_nf4, disable_lora,
                  inject_lora, linear_layers, load_adapter, lora_layers, merge_lora, quantize_nf4, save_adapter, strip_lora, unmerge_lora)
from train_math import (LossScaler, backward_loss, checkpoint_blocks, collate, demo_base, demo_problem, encode, epoch_batches,
                        learning_rate_at)

HERE = Path(__file__).parent
HALF = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                  num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2), **options})).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)).eval()


def roberta():
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                          intermediate_size=48, max_position_embeddings=40)).eval()


def shake(model, scale=0.1):
    """Gives everything that trains a random value, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- lora.py: the layer ---

@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_zero_init_leaves_output_bit_identical(kind, dtype):
    """Step 0 must be the frozen base, bit for bit (Sec. 4.1: B = 0)."""
    torch.manual_seed(0)
    base = kind(24, 16).to(dtype)
    x = torch.randn(5, base.weight.shape[0] if kind is Conv1D else 24).to(dtype)
    before = base(x)
    layer = LoRALinear(base, r=4, alpha=8)
    assert torch.equal(layer(x), before) and layer.lora_A.any() and not layer.lora_B.any()


@pytest.mark.parametrize("rslora", [False, True])
def test_forward_is_a_dense_layer_with_the_update_added(rslora):
    """y must equal x (W0 + s B A)^T + b, with s = alpha / r or alpha / sqrt(r)."""
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    layer = LoRALinear(base, r=4, alpha=12, rslora=rslora)
    shake(layer)
    scale = 12 / (2 if rslora else 4)
    x = torch.randn(3, 5, 24)
    dense = F.linear(x, base.weight + scale * layer.lora_B @ layer.lora_A, base.bias)
    torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.delta(), scale * (layer.lora_B @ layer.lora_A).detach())


def test_gradients_are_the_closed_form():
    """For dL/dy = G must hold: dL/dB = s G^T x A^T, dL/dA = s B^T G^T x, dL/dx = G (W0 + s B A), and none for W0."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 16).double(), r=4, alpha=8)
    shake(layer)
    x, G, s = torch.randn(5, 24, dtype=torch.float64, requires_grad=True), torch.randn(5, 16, dtype=torch.float64), 2.0
    (layer(x) * G).sum().backward()
    A, B, X = layer.lora_A.detach().double(), layer.lora_B.detach().double(), x.detach()
    torch.testing.assert_close(layer.lora_B.grad.double(), s * G.T @ X @ A.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.lora_A.grad.double(), s * B.T @ G.T @ X, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, G @ (layer.base.weight + s * B @ A))
    assert layer.base.weight.grad is None


def test_conv1d_agrees_with_linear():
    """Over GPT-2's transposed Conv1D the same A and B must give the same output, update and merge."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(24, 16), Conv1D(16, 24)
    conv.weight.data, conv.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    a, b = LoRALinear(linear, 4, 8), LoRALinear(conv, 4, 8)
    shake(a)
    b.lora_A.data, b.lora_B.data = a.lora_A.data, a.lora_B.data
    x = torch.randn(5, 24)
    assert (b.in_features, b.out_features) == (24, 16) and b.lora_A.shape == (4, 24) and b.lora_B.shape == (16, 4)
    torch.testing.assert_close(a(x), b(x))
    merge_lora(a), merge_lora(b)
    torch.testing.assert_close(linear.weight.T, conv.weight)


def test_full_rank_reaches_any_delta():
    """At r = min(d, k) B A must be able to represent any change of W (Sec. 4.1: LoRA generalises full fine-tuning)."""
    torch.manual_seed(0)
    layer, wanted = LoRALinear(nn.Linear(24, 16), r=16, alpha=16), torch.randn(16, 24)
    U, S, V = torch.linalg.svd(wanted, full_matrices=False)
    layer.lora_B.data, layer.lora_A.data = U * S, V
    torch.testing.assert_close(layer.delta(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_adapter_stays_float32_over_any_base(dtype):
    """A, B and their gradients must be fp32 while activations keep the base's dtype."""
    layer = LoRALinear(nn.Linear(8, 8).to(dtype), 2, 4)
    y = layer(torch.randn(3, 8).to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and all(p.dtype == p.grad.dtype == torch.float32 for p in (layer.lora_A, layer.lora_B))


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    """Dropout must leave base(x) alone, do nothing in eval, and keep the update's expectation."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 4), r=4, alpha=4, dropout=0.5)
    x = torch.randn(1, 64)
    assert torch.equal(layer(x), layer.base(x))             # B = 0, whatever is dropped
    shake(layer)
    wanted = layer.eval()(x)
    torch.testing.assert_close(wanted, F.linear(x, layer.base.weight + layer.delta(), layer.base.bias))
    mean = layer.train()(x.expand(20000, 64)).mean(0)
    torch.testing.assert_close(mean, wanted[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("bad", [dict(r=0), dict(r=1.5), dict(r=True), dict(alpha=0), dict(alpha=math.nan), dict(alpha=10**400), dict(dropout=1.0),
                                 dict(dropout=-0.1), dict(dropout=math.nan), dict(rslora="yes"), dict(targets=("",)), dict(targets=(1,))])
def test_config_refuses_values_out_of_range(bad):
    """A bad value must be a ValueError that names the field."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoRAConfig(**bad)


# --- lora.py: injection ---

class Odd(nn.Module):
    """A model that is no transformers model, with names made to confuse."""
    def __init__(self):
        super().__init__()
        self.q_proj, self.eq_proj, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.inner = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "mlp": nn.Sequential(nn.Linear(8, 8), nn.ReLU())})
        self.lm_head = nn.Linear(8, 5)

    def forward(self, x):
        return self.lm_head(self.inner["mlp"](self.inner["q_proj"](self.norm(self.eq_proj(self.q_proj(x))))))


def test_targets_match_whole_names():
    """q_proj must match inner.q_proj and q_proj, never eq_proj; all-linear is all but the head and also_train."""
    assert inject_lora(Odd(), LoRAConfig(targets=["q_proj"])) == ["q_proj", "inner.q_proj"]
    assert inject_lora(Odd(), LoRAConfig(targets="inner.q_proj")) == ["inner.q_proj"]
    assert inject_lora(Odd(), LoRAConfig(targets=["all-linear"], also_train=("inner.mlp",))) == ["q_proj", "eq_proj", "inner.q_proj"]
    assert len(inject_lora(llama(), LoRAConfig(targets="all-linear"))) == 14
    assert len(inject_lora(gpt2(), LoRAConfig(targets="all-linear"))) == 8
    assert len(inject_lora(roberta(), LoRAConfig(targets="all-linear", also_train="classifier"))) == 12


def test_a_target_without_match_names_what_exists():
    """A misspelt target must name itself and the layers there are, and leave the model untouched."""
    model = Odd()
    before = bits(model)
    with pytest.raises(ValueError, match=r"'q_porj' matches no linear layer.*eq_proj, lm_head, mlp.0, q_proj"):
        inject_lora(model, LoRAConfig(targets=("q_proj", "q_porj")))
    with pytest.raises(ValueError, match="also_train 'head'"):
        inject_lora(model, LoRAConfig(also_train=("head",)))
    assert same_bits(bits(model), before) and all(p.requires_grad for p in model.parameters())


def test_injecting_twice_is_refused():
    """A second injection would wrap wrappers: it must raise and say how to go on."""
    model = llama()
    inject_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="strip_lora"):
        inject_lora(model, LoRAConfig())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_weight_is_refused(device):
    """Adapting a head that shares the embedding's storage would change both: refused, as target and in also_train."""
    with torch.device(device):
        model = LlamaForCausalLM(llama(tie_word_embeddings=True).config)
    model.tie_weights()
    for config in (LoRAConfig(targets=("q_proj", "lm_head")), LoRAConfig(also_train=("lm_head",))):
        with pytest.raises(ValueError, match="lm_head shares its weight with model.embed_tokens"):
            inject_lora(model, config)
    assert not list(lora_layers(model))


def test_a_module_under_two_names_is_adapted_under_both():
    """One layer standing in two places must stay one layer."""
    model = Odd()
    model.inner["q_proj"] = model.q_proj
    inject_lora(model, LoRAConfig(targets=("q_proj",)))
    assert model.q_proj is model.inner["q_proj"] and isinstance(model.q_proj, LoRALinear)


def test_layers_that_are_read_but_never_called_are_refused():
    """torch's own attention and encoder fast path read .weight: an adapter there would silently do nothing."""
    with pytest.raises(ValueError, match="MultiheadAttention"):
        inject_lora(nn.Sequential(nn.MultiheadAttention(8, 2)), LoRAConfig(targets="out_proj"))
    torch.manual_seed(0)
    layer = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        inject_lora(layer, LoRAConfig(targets="linear1"))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inject_lora(layer, LoRAConfig(targets="linear1"))
        shake(layer)
        with torch.no_grad():
            x = torch.randn(1, 3, 8)
            adapted = layer(x)
            with disable_lora(layer):
                assert not torch.equal(adapted, layer(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_what_only_looks_linear_is_left_alone():
    """Composites that state in_features, foreign Conv1D classes, lazy layers and a bare layer must not be half wrapped."""
    class Experts(nn.Module):
        in_features = out_features = 8
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3, 3))
    model = nn.Sequential(nn.Linear(8, 8), Experts(), Conv1D(), nn.LazyLinear(3))
    assert inject_lora(nn.Sequential(nn.Linear(8, 8), Experts(), Conv1D()), LoRAConfig(targets="all-linear")) == ["0", "1.inner"]
    with pytest.raises(ValueError, match="no linear layer"):
        inject_lora(nn.Linear(8, 8), LoRAConfig(targets="all-linear"))
    with pytest.raises(ValueError, match="'3' matches no linear layer"):
        inject_lora(model, LoRAConfig(targets="3"))


def test_modules_that_cannot_be_trained_in_full_well_are_named():
    """A head in half precision warns, a module with running statistics is refused: the file would not hold them."""
    with pytest.warns(UserWarning, match="classifier.dense.weight trains in torch.bfloat16"):
        inject_lora(roberta().bfloat16(), LoRAConfig(targets="query", also_train="classifier"))
    with pytest.raises(ValueError, match="1 has buffers"):
        inject_lora(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), LoRAConfig(targets="0", also_train="1"))


def on_meta(cls, config, lora):
    with torch.device("meta"):
        model = cls(config)
    total = count_parameters(model)[1]
    inject_lora(model, lora)
    return count_parameters(model)[0], total, sum(l.lora_A.numel() + l.lora_B.numel() for _, l in lora_layers(model))


def test_parameter_counts_of_the_published_models():
    """Counts must be those of the papers and model cards (no weights needed: the meta device)."""
    tiny = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4)
    assert on_meta(LlamaForCausalLM, tiny, LoRAConfig())[:2] == (1_126_400, 1_100_048_384)
    assert on_meta(LlamaForCausalLM, tiny, LoRAConfig(r=64, targets="all-linear"))[0] == 50_462_720
    llama2 = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    assert on_meta(LlamaForCausalLM, llama2, LoRAConfig())[0] == 4_194_304
    medium = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    # r=4 on the fused c_attn: A (4, 1024), B (3072, 4); q and v's share of B is 2/3, of A the paper's two: 393,216 by its formula
    trained, _, _ = on_meta(GPT2LMHeadModel, medium, LoRAConfig(r=4, targets="c_attn"))
    assert trained == 24 * 4 * (1024 + 3072) and 24 * 2 * 4 * (1024 + 1024) == 393_216


@pytest.mark.parametrize("r, alone, with_head", [(1, 36_864, 38_402), (2, 73_728, 75_266), (4, 147_456, 148_994), (8, 294_912, 296_450)])
def test_parameter_counts_of_roberta(r, alone, with_head):
    """RoBERTa-base, q and v, with the 1,538-weight output head (the paper's Table 2 counts)."""
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    lora = LoRAConfig(r=r, targets=("query", "value"), also_train=("classifier.out_proj",))
    trained, _, adapter = on_meta(RobertaForSequenceClassification, config, lora)
    assert (adapter, trained) == (alone, with_head)


def test_parameter_counts_of_distilbert_and_gpt3():
    """DistilBERT q,v r=8 with its head 739,586 of 67,102,466; GPT-3 r=1 and r=8 from the paper's own dimensions."""
    lora = LoRAConfig(r=8, targets=("q_lin", "v_lin"), also_train=("pre_classifier", "classifier"))
    trained, total, adapter = on_meta(DistilBertForSequenceClassification, DistilBertConfig(), lora)
    assert trained == 739_586 and total + adapter == 67_102_466
    for r, wanted in ((1, 4_718_592), (8, 37_748_736)):
        with torch.device("meta"):
            model = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(12288, 12288), "v_proj": nn.Linear(12288, 12288)}) for _ in range(96))
        inject_lora(model, LoRAConfig(r=r))
        assert count_parameters(model)[0] == wanted


def test_only_adapters_and_named_heads_move():
    """Training must move every A, B and the head, and leave every bit of the base."""
    model = roberta()
    inject_lora(model, LoRAConfig(r=4, targets=("query", "value"), also_train=("classifier",)))
    before = bits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        F.cross_entropy(model.train()(IDS).logits, torch.tensor([0, 1])).backward()
        optimizer.step(), optimizer.zero_grad()
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(adapter_state_dict(model)) == {n for n in before if "lora_" in n or n.startswith("classifier.")}


# --- lora.py: merge, strip, switch off ---

@pytest.mark.parametrize("dtype", HALF)
def test_merge_rounds_once_and_unmerge_restores_every_bit(dtype):
    """Merged W must be round(W0 + s B A), twice as once; unmerged W0 must be the old bits, in any dtype."""
    model = llama().to(dtype)
    inject_lora(model, LoRAConfig(r=4, alpha=8))
    shake(model)
    before, wanted = bits(model), {n: (l.base.weight.float() + 2.0 * l.lora_B @ l.lora_A).to(dtype) for n, l in lora_layers(model)}
    unmerged = model(IDS).logits
    merge_lora(model)
    once = bits(model)
    merge_lora(model)
    assert same_bits(bits(model), once) and all(torch.equal(l.base.weight, wanted[n]) for n, l in lora_layers(model))
    if dtype == torch.float32:
        torch.testing.assert_close(model(IDS).logits, unmerged, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    assert same_bits(bits(model), before)
    unmerge_lora(model)
    assert same_bits(bits(model), before)


def test_merged_models_neither_train_nor_save(tmp_path):
    """Both would silently lose the adapter: RuntimeError with the cure. Switching off a merged adapter too."""
    model = llama()
    inject_lora(model, LoRAConfig())
    merge_lora(model)
    model.eval()(IDS)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        model.train()(IDS)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        save_adapter(model, LoRAConfig(), tmp_path)
    with pytest.raises(RuntimeError, match="unmerge_lora"), disable_lora(model):
        pass


def test_a_failed_merge_leaves_nothing_merged():
    """Weights that are computed or quantised cannot be merged into: ValueError, and the layers before it unmerged again."""
    model = Odd()
    torch.nn.utils.parametrizations.weight_norm(model.inner["q_proj"])
    inject_lora(model, LoRAConfig(r=2, targets="q_proj"))
    shake(model)
    before = bits(model)
    with pytest.raises(ValueError, match="cannot merge into ParametrizedLinear"):
        merge_lora(model)
    assert same_bits(bits(model), before) and not model.q_proj.merged


def test_merging_does_not_mix_with_other_states(tmp_path):
    """state_dict() while merged, merging or loading while switched off: each would apply an update wrongly, so each raises."""
    model, _ = saved(tmp_path)
    with disable_lora(model):
        for call in (lambda: merge_lora(model), lambda: load_adapter(model, tmp_path)):
            with pytest.raises(RuntimeError, match="switched off"):
                call()
    wanted = {n: (l.base.weight + 2.0 * l.lora_B @ l.lora_A) for n, l in lora_layers(model)}
    with torch.autocast("cpu", torch.bfloat16):             # the sum stays fp32 under autocast
        merge_lora(model)
    assert all(torch.equal(layer.base.weight, wanted[name]) for name, layer in lora_layers(model))
    with pytest.raises(RuntimeError, match="twice"):
        model.state_dict()


@pytest.mark.parametrize("merged", [False, True])
def test_strip_leaves_plain_layers_and_the_original_keys(merged):
    """After strip_lora the state_dict must have the original keys, with W0 or W0 + delta."""
    model, keys = llama(), list(llama().state_dict())
    before = bits(model)
    inject_lora(model, LoRAConfig())
    shake(model)
    wanted = model(IDS).logits
    if merged:
        merge_lora(model)
    assert strip_lora(model) is model and list(model.state_dict()) == keys and not list(lora_layers(model))
    if merged:
        torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    else:
        assert same_bits(bits(model), before)


def test_disable_is_the_base_also_after_an_exception():
    """Inside disable_lora the output must be the base's bits; after it, also when it raised, the adapter's."""
    model = llama()
    base = model(IDS).logits
    inject_lora(model, LoRAConfig())
    shake(model)
    adapted = model(IDS).logits
    with pytest.raises(KeyError), disable_lora(model):
        assert torch.equal(model(IDS).logits, base)
        raise KeyError
    assert torch.equal(model(IDS).logits, adapted) and not torch.equal(base, adapted)


# --- lora.py: NF4 ---

def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


@pytest.mark.parametrize("dtype", HALF)
def test_the_sixteen_values_come_back_exactly(dtype):
    """A weight made of the code book's own values, one absmax for all blocks, must come back bit for bit, with all 16 codes used."""
    values = torch.tensor(NF4)
    w = values[torch.randint(16, (48, 64), generator=torch.Generator().manual_seed(0))]
    w[:, 0] = 1                             # every block reaches its absmax
    layer = NF4Linear(linear((w * 0.5).to(dtype)))
    codes = torch.stack([layer.codes >> 4, layer.codes & 15], 1).flatten().long()
    assert torch.equal(values[codes], w.flatten()) and len(set(codes.tolist())) == 16
    assert torch.equal(layer.dequantize(dtype), (w * 0.5).to(dtype))


@pytest.mark.parametrize("shape", [(8, 128), (13, 7), (1, 1), (300, 70), (512, 64)])
def test_nf4_error_is_within_half_a_gap(shape):
    """|W - dequantised| must stay below half the code book's gap around it times the block's absmax, plus the absmax's own rounding."""
    torch.manual_seed(0)
    w = torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None]           # rows of very different size
    layer = NF4Linear(linear(w))
    blocks = F.pad(w.flatten(), (0, -w.numel() % BLOCK)).view(-1, BLOCK)
    absmax, values = blocks.abs().amax(1, keepdim=True), torch.tensor(NF4)
    nearest = (blocks[..., None] / absmax[..., None] - values).abs().amin(-1) * absmax          # what the code book alone costs
    back = F.pad(layer.dequantize(torch.float32).flatten(), (0, -w.numel() % BLOCK)).view(-1, BLOCK)
    groups = F.pad(absmax.flatten(), (0, -len(absmax) % 256), value=absmax[-1].item()).view(-1, 256)
    ratio = (groups.amax(1) / groups.amin(1)).pow(1 / 255).repeat_interleave(256)[:len(absmax), None]      # between two steps of the absmax
    assert ((back - blocks).abs() <= nearest + 1.001 * (ratio.sqrt() - 1) * absmax + 1e-5 * absmax).all()
    assert (nearest <= 0.152 * absmax).all()                                    # half the widest gap, -1 to -0.696
    if shape == (512, 64):
        assert (back - blocks).pow(2).mean().sqrt() < 0.1 * blocks.pow(2).mean().sqrt()
        assert sum(8 * b.numel() * b.element_size() for b in layer.buffers()) / w.numel() < 4.13


def test_nf4_codes_agree_with_bitsandbytes():
    """The same block size and code book must give the very same packed bytes, and values as close as the absmax's rounding."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    w = 0.02 * torch.randn(256, 320)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    layer = NF4Linear(linear(w))
    assert torch.equal(packed.flatten(), layer.codes)
    torch.testing.assert_close(layer.dequantize(torch.float32), functional.dequantize_4bit(packed, state), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_nf4_computes_and_differentiates_like_the_dense_layer(kind, dtype):
    """Output and dL/dx must equal those of a dense layer with the dequantised values, over Linear and Conv1D, with a bias."""
    torch.manual_seed(0)
    base = (nn.Linear(40, 24) if kind is nn.Linear else Conv1D(24, 40)).to(dtype)
    nn.init.normal_(base.bias)
    layer, g = NF4Linear(base), torch.randn(3, 5, 24).to(dtype)
    x, y = (torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_() for _ in range(2))
    dense = F.linear(y, layer.weight.T if kind is Conv1D else layer.weight, base.bias)
    assert torch.equal(layer(x), dense)
    layer(x).backward(g)
    dense.backward(g)
    torch.testing.assert_close(x.grad, y.grad)
    back = layer.dense()
    torch.testing.assert_close(back(x), dense)
    assert type(back) is kind and back.weight.shape == base.weight.shape and back.weight.dtype == dtype


def test_nf4_keeps_no_dense_weight_for_backward(monkeypatch):
    """Between forward and backward nothing may be kept: no saved bytes, and the dequantised W freed as soon as it was used."""
    layer, made, sizes = NF4Linear(nn.Linear(64, 64)), [], []
    dequantize = NF4Linear.dequantize

    def watched(self, dtype):
        w = dequantize(self, dtype)
        made.append(weakref.ref(w))
        return w
    monkeypatch.setattr(NF4Linear, "dequantize", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        y = layer(torch.randn(2, 64, requires_grad=True))
    assert sum(sizes) == 0 and len(made) == 1 and made[0]() is None
    y.sum().backward()
    assert len(made) == 2 and made[1]() is None


def test_lora_over_nf4_trains_saves_and_merges(tmp_path):
    """QLoRA: only A and B get gradients; the file loads onto a dense base too; merging gives dequantised W plus delta, unmerging 4 bits."""
    model = llama()
    names = quantize_nf4(model)
    assert len(names) == 14 and "lm_head" not in names and count_parameters(model)[1] == count_parameters(llama())[1]
    config = LoRAConfig(r=4, targets="all-linear")
    assert inject_lora(model, config) == names
    before = bits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    trained = set(adapter_state_dict(model))
    assert {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])} == trained
    save_adapter(model, config, tmp_path)
    load_adapter(llama(), tmp_path)
    out, packed = model.eval()(IDS).logits, bits(model)
    wanted = {name: layer.base.dequantize(torch.float32) + layer.delta() for name, layer in lora_layers(model)}
    merge_lora(model)
    torch.testing.assert_close(model(IDS).logits, out, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(layer.weight, wanted[name]) for name, layer in lora_layers(model))
    unmerge_lora(model)
    assert same_bits(bits(model), packed) and torch.equal(model(IDS).logits, out)
    merge_lora(model)
    strip_lora(model)
    assert set(model.state_dict()) == set(llama().state_dict())


def test_the_way_back_from_nf4():
    """dequantize_nf4 must leave plain layers with the original keys, which compute the same."""
    model = llama()
    quantize_nf4(model)
    out = model(IDS).logits
    dequantize_nf4(model)
    assert torch.equal(model(IDS).logits, out) and set(model.state_dict()) == set(llama().state_dict())
    assert quantize_nf4(model)
    torch.testing.assert_close(model(IDS).logits, out, atol=1e-5, rtol=1e-5)   # quantising its own values changes nothing


@pytest.mark.filterwarnings("ignore:.*is not quantised")
def test_quantising_leaves_what_it_must():
    """Embeddings and skipped layers stay; a tied layer stays with the reason; adapters, NaN and an empty choice are refused untouched."""
    model = llama(tie_word_embeddings=True)
    assert "lm_head" not in quantize_nf4(model, skip=("q_proj",))
    tied = llama()
    tied.model.layers[0].mlp.up_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    with pytest.warns(UserWarning, match="layers.0.mlp.up_proj is not quantised: it shares its weight with model.layers.1.mlp.up_proj"):
        assert len(quantize_nf4(tied)) == 12
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert all(isinstance(layer, NF4Linear) != name.endswith(("q_proj", "lm_head")) for name, layer in linear_layers(model).items())
    with pytest.raises(ValueError, match="no linear layer to quantise"):
        quantize_nf4(model, skip=("q_proj", "lm_head"))
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
    before = bits(model)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj holds NaN"):
        quantize_nf4(model)
    inject_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="carries an adapter"):
        quantize_nf4(model)
    strip_lora(model)
    assert all(torch.equal(t, before[n]) or n.endswith("layers.1.mlp.up_proj.weight") for n, t in bits(model).items())
    with pytest.warns(UserWarning, match="out_proj is not quantised: it is a NonDynamicallyQuantizableLinear"), pytest.raises(ValueError, match="no linear layer"):
        quantize_nf4(nn.Sequential(nn.MultiheadAttention(8, 2)))
    with pytest.warns(UserWarning, match="linear1 is not quantised: TransformerEncoderLayer reads its weight"), pytest.raises(ValueError, match="no linear layer"):
        quantize_nf4(nn.TransformerEncoderLayer(8, 2))
    with pytest.warns(UserWarning, match="it is a Linear of torch.float64"), pytest.raises(ValueError, match="no linear layer"):
        quantize_nf4(llama().double())
    model = llama()
    quantize_nf4(model, skip=())                                # the head is known by what it is, not by its name
    assert type(model.lm_head) is nn.Linear
    model = roberta()
    quantize_nf4(model)
    with pytest.raises(ValueError, match="classifier.*is in 4 bits and cannot train: name it in the skip"):
        inject_lora(model, LoRAConfig(targets="query", also_train="classifier"))


def test_nf4_keeps_its_mode_its_range_and_its_dtype():
    """Eval stays eval (else dropout would act in inference); a later .half() computes in half and does not round the scales."""
    model = llama().eval()
    quantize_nf4(model)
    inject_lora(model, LoRAConfig(r=2, dropout=0.5))
    shake(model)
    assert not any(module.training for module in model.modules()) and torch.equal(model(IDS).logits, model(IDS).logits)
    model = llama()
    quantize_nf4(model)
    before = {name: tensor for name, tensor in bits(model).items() if name.endswith((".range", ".codes", ".absmax"))}
    model.half()
    assert all(torch.equal(tensor, bits(model)[name]) for name, tensor in before.items())
    inject_lora(model, LoRAConfig(r=2))
    merge_lora(model)
    assert model(IDS).logits.dtype == torch.float16 and model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float16


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_nf4_does_not_mix_with_other_states(make, tmp_path):
    """Loading over a merged 4-bit base must not leave the old update in it; the way back gives the original classes, keys and shapes."""
    model, targets = make(), {llama: ("q_proj", "down_proj"), gpt2: ("c_attn", "c_proj")}[make]
    quantize_nf4(model)
    plain = model(IDS).logits
    config = LoRAConfig(r=2, targets=targets)
    inject_lora(model, config)
    shake(model)
    save_adapter(model, config, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is (make is gpt2)
    wanted, packed, state = model(IDS).logits, bits(model), {key: t.clone() for key, t in model.state_dict().items()}
    merge_lora(model)
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        model.load_state_dict(state)
    load_adapter(model, tmp_path)
    assert torch.equal(model(IDS).logits, wanted) and same_bits(bits(model), packed)
    with disable_lora(model):
        assert torch.equal(model(IDS).logits, plain)
    merge_lora(model)
    strip_lora(model)
    dequantize_nf4(model)
    assert {key: t.shape for key, t in model.state_dict().items()} == {key: t.shape for key, t in make().state_dict().items()}
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_an_outlier_does_not_spoil_its_neighbours():
    """One weight 250 times the usual stretches its group's range; the other blocks must keep nearly the error that they had."""
    torch.manual_seed(0)
    w = 0.02 * torch.randn(256, 128)
    error = lambda w: (NF4Linear(linear(w)).weight - w)[1:].pow(2).mean().sqrt() / w[1:].pow(2).mean().sqrt()
    usual = error(w)
    w[0, 5] = 5.0
    assert usual < 0.1 and error(w) < 1.02 * usual
    w[3] = 0                                # nor does an empty block
    assert error(w) < 1.02 * usual and not NF4Linear(linear(w)).weight[3].any()
    w[4] *= 1e-6                            # far below what the range resolves it becomes 0 or keeps its size, and never grows
    w[0, 5] = 300.0
    assert error(w) < 1.2 * usual and NF4Linear(linear(w)).weight[4].abs().max() <= w[4].abs().max()


def test_an_adapted_layer_keeps_its_input_once():
    """At dropout 0 a layer may keep for backward x, in x's dtype, and tensors of the rank's size: no d-wide one, no copy of x."""
    for base in (nn.Linear(96, 80).bfloat16(), NF4Linear(nn.Linear(96, 80).bfloat16())):
        layer, kept = LoRALinear(base, r=4, alpha=8).train(), {}
        own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}

        def keep(t):
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        x = torch.randn(50, 96).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(x)
        rank_sized = 2 * 4 * (2 * 50 + 96 + 80)         # z and the scaled z, A and B in bf16
        assert x.nbytes <= sum(kept.values()) <= x.nbytes + rank_sized
        y.sum().backward()


# --- lora.py: adapter files ---

def saved(folder, make=llama, base_name=None, **options):
    model, config = make(), LoRAConfig(**{"r": 4, "alpha": 8, **options})
    inject_lora(model, config)
    shake(model)
    model.config._name_or_path = base_name or ""
    save_adapter(model, config, folder)
    return model, config


@pytest.mark.parametrize("make, options", [(llama, {}), (llama, dict(targets="all-linear", rslora=True)), (gpt2, dict(targets=("c_attn", "c_fc"))),
                                           (roberta, dict(targets=("query", "value"), also_train=("classifier",)))])
def test_a_saved_adapter_loads_exactly(make, options, tmp_path):
    """Onto a fresh base, and onto one with another adapter, the file must give the same bits, with A and B in fp32."""
    model, config = saved(tmp_path / "a", make, **options)
    wanted = model(IDS).logits
    fresh = make()
    loaded = load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(IDS).logits, wanted) and (loaded.r, loaded.scaling, loaded.also_train) == (4, config.scaling, config.also_train)
    assert same_bits(adapter_state_dict(fresh), adapter_state_dict(model)) and sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]
    described = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert described["target_modules"] != ["all-linear"] and described["peft_type"] == "LORA" and described["fan_in_fan_out"] == (make is gpt2)


def test_loading_replaces_an_adapter_of_another_shape(tmp_path):
    """One base serves many adapters: another rank, other targets, merged or not, and the head goes back to its start."""
    first, _ = saved(tmp_path / "a", roberta, targets=("query", "value"), also_train=("classifier",))
    second, _ = saved(tmp_path / "b", roberta, r=2, targets=("dense",), also_train=())
    model = roberta()
    before = bits(model)
    for folder, wanted in (("a", first), ("b", second), ("a", first), ("b", second)):
        load_adapter(model, tmp_path / folder)
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)
        merge_lora(model)
    unmerge_lora(model)
    assert same_bits(bits(strip_lora(model)), before)


def test_a_custom_model_saves_and_loads(tmp_path):
    """A model without config or name must save and load as well."""
    torch.manual_seed(0)
    model, config = Odd(), LoRAConfig(r=2, targets="all-linear")
    inject_lora(model, config)
    shake(model)
    save_adapter(model, config, tmp_path)
    torch.manual_seed(0)
    other = Odd()
    load_adapter(other, tmp_path)
    assert torch.equal(other(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_half_precision_bases_get_float32_adapters(tmp_path):
    """Loading copies into fp32 tensors, also where file and base are bf16."""
    saved(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    model = llama().bfloat16()
    load_adapter(model, tmp_path)
    assert all(l.lora_A.dtype == l.lora_B.dtype == torch.float32 and l.lora_A.requires_grad for _, l in lora_layers(model))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "no such adapter folder": lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(),
    "has no adapter_config.json": lambda f: (f / "adapter_config.json").unlink(),
    "has no adapter_model.safetensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "is a pickle": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
    "not a whole safetensors file": lambda f: os.truncate(f / "adapter_model.safetensors", 3000),
    "not a whole": lambda f: (f / "adapter_model.safetensors").write_bytes(b"junk" * 100),
    "adapter_config.json: Expecting": lambda f: (f / "adapter_config.json").write_text("{'r': 8}"),
    "expected an object": lambda f: (f / "adapter_config.json").write_text("[]"),
    "larger than 1 MiB": lambda f: edit_config(f, x="x" * 2**20),
    "recursion": lambda f: (f / "adapter_config.json").write_text("[" * 10**5),
    "peft_type is 'IA3'": lambda f: edit_config(f, peft_type="IA3"),
    "use_dora = True": lambda f: edit_config(f, use_dora=True),
    "rank_pattern": lambda f: edit_config(f, rank_pattern={"q_proj": 2}),
    "bias is 'lora_only'": lambda f: edit_config(f, bias="lora_only"),
    "init_lora_weights is 'pissa'": lambda f: edit_config(f, init_lora_weights="pissa"),
    "r is '8'": lambda f: edit_config(f, r="8"),
    "lora_alpha is None": lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}'),
    "dropout is nan": lambda f: edit_config(f, lora_dropout=math.nan),
    "target_modules is": lambda f: edit_config(f, target_modules=[1]),
    "has shape .4, 32., expected .8, 32.": lambda f: edit_config(f, r=8),
    "disagrees on .*k_proj": lambda f: edit_config(f, target_modules=["q_proj", "k_proj", "v_proj"]),
    "lacks .*layers.0.self_attn.q_proj.lora_A": lambda f: edit_tensors(f, lambda t: t.pop(KEY)),
    "holds .*surprise": lambda f: edit_tensors(f, lambda t: t.update({"surprise": torch.ones(1)})),
    "no linear layer of this model": lambda f: edit_tensors(f, lambda t: t.update({KEY.replace("q_proj", "qkv"): t[KEY].clone()})),
    "holds NaN or infinity": lambda f: edit_tensors(f, lambda t: t[KEY].fill_(math.inf)),
    "is I64": lambda f: edit_tensors(f, lambda t: t.update({KEY: t[KEY].long()})),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_adapter_is_refused_and_the_model_left_as_it_was(message, tmp_path):
    """Each way to be broken must be a ValueError that says so, and nothing may change, also on a model with an adapter."""
    saved(tmp_path / "good", r=2, targets=("o_proj",))
    saved(tmp_path / "bad")
    BROKEN[message](tmp_path / "bad")
    model = llama()
    load_adapter(model, tmp_path / "good")
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path / "bad")
    assert same_bits(bits(model), before) and [l.lora_A.shape[0] for _, l in lora_layers(model)] == [2, 2]


def test_adapters_that_do_nothing_or_fit_another_base_warn(tmp_path):
    """An all-zero B changes nothing, another base means nonsense: both load, both must warn."""
    saved(tmp_path / "a", base_name="someone/base-one")
    model = llama()
    model.config._name_or_path = "models/base-two"
    with pytest.warns(UserWarning, match="someone/base-one, this model is models/base-two"):
        load_adapter(model, tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda t: [t[key].zero_() for key in t if "lora_B" in key])
    with pytest.warns(UserWarning, match="every lora_B is zero"):
        load_adapter(llama(), tmp_path / "a")


def test_saving_refuses_what_would_not_load_again(tmp_path):
    """Another config than the injected one, or a weight that trains unnamed, must raise."""
    model, config = saved(tmp_path)
    with pytest.raises(ValueError, match="the config that was injected"):
        save_adapter(model, LoRAConfig(r=4, alpha=16), tmp_path)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="model.norm.weight trains but is not in also_train"):
        save_adapter(model, config, tmp_path)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(llama(), config, tmp_path)


def test_files_are_the_same_from_inside_a_wrapper(tmp_path):
    """torch.compile and DataParallel prefix every name: the file must be that of the plain model, and load through a wrapper."""
    model, config = saved(tmp_path / "plain")
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        save_adapter(wrapped, config, tmp_path / "wrapped")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
        fresh = llama()
        load_adapter(nn.DataParallel(fresh), tmp_path / "wrapped")
        assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_odd_names_come_back(tmp_path):
    """A head called lora_head, frozen again after training, beside layers whose whole names are endings of others, must load."""
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(4, 4), "b": nn.ModuleDict({"q": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)}), "lora_head": nn.Linear(4, 2)})
    model, config = make(), LoRAConfig(r=2, targets="all-linear", also_train="lora_head")
    inject_lora(model, config)
    shake(model)
    model.requires_grad_(False)
    save_adapter(model, config, tmp_path)
    other = make()
    load_adapter(other, tmp_path)
    assert same_bits(bits(other), bits(model))


def mutations(folder):
    """Yields (what was done, bytes of the weights, bytes of the config), 1,000 times, from one whole adapter."""
    import random
    rng = random.Random(0)
    weights, config = (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    tensors, described = load_file(folder / "adapter_model.safetensors"), json.loads(config)
    values = [None, True, False, 0, 1, 4, -1, 3.5, 1e308, 10**400, math.nan, math.inf, "", "q_proj", "../../etc/passwd", "\0", "x" * 10000, [], [1], ["q_proj"],
              [["q_proj"]], ["q_proj", "v_proj", "nosuch"], {}, {"a": 1}, {"q_proj": 4}, 2**31, -2**63]

    def flipped(data, low, high):
        data, at = bytearray(data), rng.randrange(low, high)
        data[at] ^= 1 << rng.randrange(8)
        return bytes(data)

    def with_header(change):
        entries = json.loads(weights[8:header])
        change(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + weights[header:]

    def stored(change):
        copy = {key: tensor.clone() for key, tensor in tensors.items()}
        change(copy, rng.choice(sorted(copy)))
        save_file(copy, folder / "mutant")
        return (folder / "mutant").read_bytes()

    def spoil(copy, key, value):
        copy[key].view(-1)[rng.randrange(copy[key].numel())] = value
    kinds = {
        "a bit of the header": lambda: (flipped(weights, 8, header), config),
        "a bit of the length": lambda: (flipped(weights, 0, 8), config),
        "a bit of the tensors": lambda: (flipped(weights, header, len(weights)), config),
        "a bit of the config": lambda: (weights, flipped(config, 0, len(config))),
        "a cut": lambda: (weights[:rng.randrange(len(weights))], config),
        "a cut config": lambda: (weights, config[:rng.randrange(len(config))]),
        "more behind": lambda: (weights + rng.randbytes(rng.randrange(1, 99)), config),
        "junk": lambda: (rng.randbytes(rng.randrange(0, 999)), config),
        "a value of the config": lambda: (weights, json.dumps({**described, rng.choice(sorted(described)): rng.choice(values)}).encode()),
        "another option": lambda: (weights, json.dumps({**described, rng.choice(["use_dora", "rank_pattern", "layers_to_transform", "nosuch"]): rng.choice(values)}).encode()),
        "an option gone": lambda: (weights, json.dumps({k: v for k, v in described.items() if k != gone}).encode()) if (gone := rng.choice(sorted(described))) else None,
        "a shape in the header": lambda: (with_header(lambda e: e[rng.choice(sorted(set(e) - {"__metadata__"}))].update(
            {"shape": [rng.choice([0, 1, 4, 32, -1, 2**40, 2**63]) for _ in range(rng.randrange(4))]})), config),
        "offsets in the header": lambda: (with_header(lambda e: e[rng.choice(sorted(set(e) - {"__metadata__"}))].update(
            {"data_offsets": [rng.choice([0, 1, 512, 2**40, -1]) for _ in range(2)]})), config),
        "a key": lambda: (stored(lambda c, k: c.update({rng.choice([k + "x", k.replace("layers.0", "layers.7"), "../" + k, ""]): c.pop(k)})), config),
        "a shape": lambda: (stored(lambda c, k: c.update({k: c[k][:-1]} if rng.random() < 0.5 else {k: c[k].T.contiguous()})), config),
        "a dtype": lambda: (stored(lambda c, k: c.update({k: c[k].to(rng.choice([torch.float64, torch.float16, torch.int32, torch.bool]))})), config),
        "a number": lambda: (stored(lambda c, k: spoil(c, k, rng.choice([math.nan, math.inf, -math.inf, 1e38, 0.0]))), config),
    }
    for i in range(1000):
        name = list(kinds)[i % len(kinds)]
        yield name, *kinds[name]()


@pytest.mark.filterwarnings("ignore")
def test_mutated_adapters_load_exactly_or_leave_the_model_alone(tmp_path):
    """Of 1,000 mutated adapters each must load what its file says, to the bit, or raise ValueError with the model as it was."""
    model, _ = saved(tmp_path / "whole")
    before, layers, loaded = bits(model), [name for name, _ in lora_layers(model)], 0
    (tmp_path / "mutant").mkdir()
    for what, weights, config in mutations(tmp_path / "whole"):
        (tmp_path / "mutant/adapter_model.safetensors").write_bytes(weights)
        (tmp_path / "mutant/adapter_config.json").write_bytes(config)
        try:
            read = load_adapter(model, tmp_path / "mutant")
        except ValueError as error:
            assert same_bits(bits(model), before), f"{what}: {error}"
            assert len(str(error).splitlines()) == 1, f"{what}: {error}"
            continue
        loaded += 1
        described, tensors = json.loads(config), load_file(tmp_path / "mutant/adapter_model.safetensors")
        assert (read.r, read.alpha) == (described["r"], described["lora_alpha"])
        for name, layer in lora_layers(model):
            for x in "AB":
                assert torch.equal(getattr(layer, f"lora_{x}"), tensors.pop(f"base_model.model.{name}.lora_{x}.weight").float()), what
        assert not tensors, what
        load_adapter(model, tmp_path / "whole")
        assert same_bits(bits(model), before) and [name for name, _ in lora_layers(model)] == layers
    assert 50 < loaded < 500


def test_a_hundred_adapters_on_one_base(tmp_path):
    """Cycled over one base, with changing rank and targets, each must answer like a fresh load, and nothing may pile up."""
    wanted = []
    for i in range(100):
        model, config = llama(), LoRAConfig(r=1 + i % 5, targets=[("q_proj", "v_proj"), "all-linear", ("down_proj",)][i % 3])
        torch.manual_seed(i)
        inject_lora(model, config)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.1)
        save_adapter(model, config, tmp_path / str(i))
        wanted.append(model(IDS).logits)
    model, names = llama(), set()
    for round in range(2):
        for i in range(100):
            load_adapter(model, tmp_path / str(i))
            assert torch.equal(model(IDS).logits, wanted[i])
        gc.collect()
        names.add((sum(type(x) in (torch.Tensor, nn.Parameter) for x in gc.get_objects()), len(list(model.modules()))))
    assert len(names) == 1 and same_bits(bits(strip_lora(model)), bits(llama()))


# --- PEFT as oracle ---

CASES = [(llama, {}), (llama, dict(rslora=True)), (gpt2, dict(targets=("c_attn",))), (roberta, dict(targets=("query", "value"), also_train=("classifier",)))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, options", CASES)
def test_peft_loads_our_adapter_and_we_load_peft_s(make, options, tmp_path):
    """Logits must agree within 1e-5 both ways."""
    peft = pytest.importorskip("peft")
    model, _ = saved(tmp_path / "ours", make, **options)
    wanted = model(IDS).logits
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDS).logits, wanted, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "peft")
    again = make()
    assert load_adapter(again, tmp_path / "peft").scaling == pytest.approx(8 / (2 if options.get("rslora") else 4))
    torch.testing.assert_close(again(IDS).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_we_load_what_peft_made_from_its_own_config(tmp_path):
    """An adapter that PEFT created, SEQ_CLS with modules_to_save that half exist, must load and agree."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(roberta(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS", use_rslora=True))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = roberta()
    assert load_adapter(model, tmp_path).also_train == ("classifier",)
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, options", CASES)
def test_training_curve_equals_peft_s(make, options, tmp_path):
    """From equal starts 20 AdamW steps must give losses equal within 1e-4."""
    peft = pytest.importorskip("peft")
    model, config = make(), LoRAConfig(r=4, alpha=8, **options)
    inject_lora(model, config)
    save_adapter(model, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    curves = []
    for net in (model.eval(), theirs.eval()):
        parameters = [p for p in net.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
        for _ in range(20):
            labels = {"labels": torch.tensor([0, 1])} if make is roberta else {"labels": IDS}
            loss = net(input_ids=IDS, **labels).loss
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(float(loss))
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


# --- eval_gsm8k.py: prompt, answers, statistics ---

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of a tiny base model with its tokenizer, train file, test file), made once; the base is untrained."""
    import random
    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    problems = [demo_problem(rng, two_steps=i % 2 == 0) for i in range(80)]
    model, tokenizer = demo_base([format_prompt(p["question"]) + " " + p["answer"] for p in problems])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, part in (("train", problems[:64]), ("test", problems[64:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in part))
    return folder


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(tiny):
    return eval_gsm8k.load_model(str(tiny / "base"), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("text, strict", [
    ("#### 1,234", "1234"), ("5 + 5 = 10\n#### 10\n#### 11", "10"), ("The answer is: $29.00.", "29"), ("#### -5", "-5"), ("#### $-5", "-5"),
    ("#### -$5", "-5"), ("The answer is 12 apples.", "12"), ("#### 1/2", "0.5"), (r"The answer is: \boxed{18}", "18"),
    (r"The answer is: $\frac{3}{4}$", "0.75"), (r"The answer is -\frac{3}{4}", "-0.75"), ("The answer is 3. So the answer is 4.", "4"),
    ("#### 7\nThe answer is: 7\n\nQuestion: next\nAnswer: The answer is 9", "7"), ("#### 29.5", "29.5"), ("#### .5", "0.5"),
    ("The answer is 1,2 and 3", "1"), ("#### 12,345,678.25 dollars", "12345678.25"), ("#### 1/0", None), ("#### none\n5", None),
    ("She has 5 apples.", None), ("\u0130\u0130 x. The answer is 12", "12"), ("", None), ("Question: #### 5", None), ("#### \u22125", "-5"), ("The answer is:\n18", "18"), ("#### 50%", "50")])
def test_extract_answer_strict(text, strict):
    """Only a number behind a marker counts, before the next question, compared as a Decimal."""
    assert extract_answer(text) == (None if strict is None else Decimal(strict))


@pytest.mark.parametrize("text, flexible", [("She has 5, then 6 apples.", "6"), ("10-5=5 and 20-30", "30"), ("#### 7 or 8", "7"), ("nothing", None),
                                            ("so it is -3.", "-3"), ("5 then\nQuestion: 7", "5"), ("The answer is unknown, 4", "4")])
def test_extract_answer_flexible(text, flexible):
    """Without a number behind a marker the last number counts."""
    assert extract_answer(text, flexible=True) == (None if flexible is None else Decimal(flexible))
    assert extract_answer("29.00") is None and extract_answer("29.00", flexible=True) == 29 != extract_answer("29.5", flexible=True)


def test_intervals_and_exact_test_give_published_values():
    """Wilson's interval and McNemar's exact p must equal values worked out elsewhere."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)       # Newcombe 1998, Table I
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    first, second = [True] * 1 + [False] * 9 + [True] * 90, [False] * 1 + [True] * 9 + [True] * 90
    assert mcnemar_p(first, second) == pytest.approx(2 * (1 + 10) / 2**10) == mcnemar_p(second, first)
    assert mcnemar_p(first, first) == 1.0


class Template:
    """A tokenizer that puts BOS in front and EOS behind, as some do."""
    def __call__(self, text, add_special_tokens=True):
        ids = [ord(c) for c in text]
        return argparse.Namespace(input_ids=[1, *ids, 2] if add_special_tokens else ids)


def test_prompt_has_bos_once_and_never_eos():
    """What the tokenizer puts in front comes once; an EOS that it would append would end the prompt before the answer."""
    assert encode_prompt(Template(), "ab") == [1, 97, 98]
    assert format_prompt("1 + 1?") == "Question: 1 + 1?\nAnswer:"


def test_rows_of_all_three_schemas(workdir):
    """MetaMathQA, GSM8K (its <<...>> marks removed) and Alpaca rows must come out as question and answer."""
    for name, row, wanted in (("a.jsonl", {"query": "q", "response": "r", "type": "t"}, ("q", "r")),
                              ("b.jsonl", {"question": "q", "answer": "48/2 = <<48/2=24>>24\n#### 24"}, ("q", "48/2 = 24\n#### 24")),
                              ("c.jsonl", {"instruction": "do", "input": "this", "output": "done"}, ("do\nthis", "done")),
                              ("d.json", {"instruction": "do", "input": "", "output": "done"}, ("do", "done"))):
        Path(name).write_text(json.dumps([row] * 3) if name == "d.json" else (json.dumps(row) + "\n") * 3)
        assert read_rows(name, "train") == [wanted] * 3 and len(read_rows(name, "train", 2)) == 2
    Path("e.csv").write_text("question,answer\nhow many?,2\nNA,b\n")
    assert read_rows("e.csv", "train") == [("how many?", "2"), ("NA", "b")]
    Path("f[0]*.jsonl").write_text('{"question": "q", "answer": "a"}\n')       # a name, not a pattern
    Path("f01.jsonl").write_text('{"question": "q", "answer": "b"}\n')
    assert read_rows("f[0]*.jsonl", "train") == [("q", "a")]


@pytest.mark.parametrize("name, text, message", [
    ("x.jsonl", None, "no such file"), ("x.jsonl", "", "the file is empty"), ("x.jsonl", "{broken\n", "cannot be read"), ("x.txt", "a", "not a data file"),
    ("x.jsonl", '{"text": "a", "tag": 1}\n', "has the columns text, tag; expected query and response"), ("x.json", "[]", "x.json"),
    ("x.jsonl", '{"question": "q", "answer": "a"}\n{"question": "q", "answer": null}\n', "row 2"),
    ("x.jsonl", '{"question": " ", "answer": "a"}\n', "row 1"), ("x.csv", "question,answer\n", "holds no rows"), ("x.jsonl", "null", "expected a JSON object"),
    ("x.jsonl", "\0" * 99, "expected a JSON object"), ("x.json", '[{"instruction": "a", "input": 5, "output": "b"}]', "row 1"), ("data", None, "no such file")])
def test_bad_data_is_one_clear_error(name, text, message, workdir):
    """Every way that a data file can be wrong must be a ValueError of one line that names the file."""
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        read_rows(name, "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    eval_gsm8k.hub_reachable.cache_clear()
    yield
    eval_gsm8k.hub_reachable.cache_clear()


def test_without_a_hub_one_line_names_the_ways_out(no_hub):
    """A Hub out of reach must end in seconds, naming --model DIR, --data FILE and --demo."""
    for call in (lambda: read_rows("someone/data", "train"), lambda: eval_gsm8k.load_model("someone/model", torch.float32, torch.device("cpu"))):
        with pytest.raises(ValueError, match="cannot be reached.*--model DIR and --data FILE.*--demo"):
            call()


def test_models_that_cannot_serve_are_refused(workdir):
    """No folder, an empty folder, junk, and an encoder (its head would be random) must each be one line."""
    device = torch.device("cpu")
    Path("empty").mkdir()
    Path("junk").mkdir()
    Path("junk/config.json").write_text("{")
    roberta().save_pretrained("encoder")
    Path("encoder/tokenizer.json").write_text("{}")
    for name in ("./none", "empty", "junk", "encoder"):
        with pytest.raises(ValueError, match=f"--model {name}") as caught:
            eval_gsm8k.load_model(name, torch.float32, device)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--device cuda:7"):
        eval_gsm8k.pick_device("cuda:7")
    with pytest.raises(ValueError, match="--device gpu"):
        eval_gsm8k.pick_device("gpu")


def test_the_dtype_asked_for_is_the_dtype_loaded(tiny, workdir):
    """transformers takes the checkpoint's own dtype unless told: float32 asked of a bf16 checkpoint must be float32."""
    load(tiny)[0].bfloat16().save_pretrained("half")
    load(tiny)[1].save_pretrained("half")
    for dtype in HALF:
        assert {p.dtype for p in eval_gsm8k.load_model("half", dtype, torch.device("cpu"))[0].parameters()} == {dtype}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_4_bit_model_lets_go_of_the_dense_file(tiny, workdir):
    """Dense weights are views of the mapped file: one embedding that stays so would keep all of it in memory beside the 4-bit copy."""
    model, tokenizer = load(tiny)
    model.save_pretrained("mapped")
    tokenizer.save_pretrained("mapped")
    for nf4 in (False, True):
        model = eval_gsm8k.load_model("mapped", torch.float32, torch.device("cpu"), nf4)[0]
        assert ("mapped/model.safetensors" in Path("/proc/self/maps").read_text()) != nf4
        del model


def test_batched_generation_equals_one_by_one(tiny):
    """Left padding with a mask must not change a token, and the order of the prompts must be kept."""
    model, tokenizer = load(tiny)
    prompts = [format_prompt(q) for q, _ in read_rows(str(tiny / "test.jsonl"), "test")]
    assert len({len(encode_prompt(tokenizer, p)) for p in prompts}) > 1
    alone = [complete(model, tokenizer, [p], 1, 12)[0] for p in prompts]
    assert complete(model, tokenizer, prompts, 8, 12) == alone and len({text for text, _ in alone}) > 1


@pytest.mark.parametrize("wish", [dict(do_sample=True, temperature=3.0), dict(no_repeat_ngram_size=1), dict(repetition_penalty=9.0), dict(min_new_tokens=20),
                                  dict(cache_implementation="static"), dict(num_beams=3), dict(suppress_tokens=list(range(3, 30)))])
def test_a_checkpoint_s_own_generation_settings_do_not_enter_the_scores(tiny, wish):
    """Completions must be greedy whatever generation_config.json asks for, and it must be there again for --save-merged."""
    model, tokenizer = load(tiny)
    prompts = [format_prompt(q) for q, _ in read_rows(str(tiny / "test.jsonl"), "test")][:4]
    greedy = complete(model, tokenizer, prompts, 4, 20)
    for key, value in wish.items():
        setattr(model.generation_config, key, value)
    theirs = model.generation_config.to_dict()
    assert complete(model, tokenizer, prompts, 4, 20) == greedy
    assert model.generation_config.to_dict() == theirs


def test_rows_that_have_ended_leave_the_batch(tiny):
    """Rows of many lengths must say what transformers' generate says of each alone, and the batch must become narrower on the way."""
    model, tokenizer = load(tiny)
    prompts = [format_prompt(q) for q, _ in read_rows(str(tiny / "test.jsonl"), "test")][:8]
    torch.manual_seed(0)
    for p in model.parameters():                # larger weights: it does not repeat one word
        p.detach().normal_(std=0.5)
    ids = [torch.tensor([encode_prompt(tokenizer, p)]) for p in prompts]
    plain = lambda row: model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=50)[0, row.shape[1]:]
    endless = [plain(row).tolist() for row in ids]
    late = [token for token in range(len(tokenizer)) if 5 < min([said.index(token) for said in endless if token in said], default=0)]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *late[::3]]
    alone, widths = [plain(row) for row in ids], []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = complete(model, tokenizer, prompts, 8, 50)
    hook.remove()
    assert found == [(tokenizer.decode(new, skip_special_tokens=True), len(new) == 50 and int(new[-1]) not in model.generation_config.eos_token_id)
                     for new in alone]
    assert len({len(new) for new in alone}) > 3 and widths == sorted(widths, reverse=True) and widths[-1] < widths[0] == 8, widths


@pytest.mark.parametrize("config", [OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4), MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2)])
def test_models_without_a_cache_or_with_a_state_beside_it_answer_in_whole_batches(tiny, config):
    """No cache to take rows out of, or a state that would stay: every row must say what transformers' generate says of it alone."""
    _, tokenizer = load(tiny)
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), tokenizer.eos_token_id, 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.detach().normal_(std=0.3)
    same = [format_prompt(q) for q, _ in read_rows(str(tiny / "test.jsonl"), "test")]
    length = len(encode_prompt(tokenizer, same[0]))
    same = [p for p in same if len(encode_prompt(tokenizer, p)) == length][:3]      # GPT-1 counts padding as positions
    assert len(same) > 1
    plain = lambda row: model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=40)[0, length:]
    alone = [plain(torch.tensor([encode_prompt(tokenizer, p)])) for p in same]
    assert [text for text, _ in complete(model, tokenizer, same, 3, 40)] == [tokenizer.decode(new, skip_special_tokens=True) for new in alone]


def test_rows_beyond_the_model_s_positions_are_refused(tiny, workdir):
    """Learned positions would end in an index error, rotary ones in silent nonsense: the line names the flag to lower."""
    model, tokenizer = load(tiny)
    model.config.max_position_embeddings = 40
    with pytest.raises(ValueError, match="rows of up to .* tokens, but the model has 40 positions: lower --max-new-tokens"):
        complete(model, tokenizer, [format_prompt("1 + 1")], 1, 40)
    model.config.max_position_embeddings = 10
    model.save_pretrained("short")
    tokenizer.save_pretrained("short")
    with pytest.raises(ValueError, match="the model has 10 positions: lower --max-length"):
        run(tiny, "--model", "short")


def test_evaluation_writes_scores_for_base_and_every_checkpoint(tiny, workdir):
    """A run folder must stand for its checkpoints; JSON, completions and chart must be there; merged must answer the same."""
    for step in (2, 4):
        model, config = saved(f"checkpoints/run/step_{step:06d}", lambda: load(tiny)[0])
    argv = ["--model", str(tiny / "base"), "--data", str(tiny / "test.jsonl"), "--max-new-tokens", "8", "--dtype", "float32", "--device", "cpu"]
    scores = eval_gsm8k.main(eval_gsm8k.parse_args([*argv, "--adapter", "checkpoints/run"]))
    assert [name for name, _ in scores] == ["base", "run-step_000002", "run-step_000004"]
    result = json.loads(Path("eval_results/run-step_000004-test.json").read_text())
    assert {"model", "adapter", "data", "n", "correct", "accuracy", "ci95", "correct_flexible", "accuracy_flexible", "no_answer", "truncated",
            "seconds", "p_value"} <= set(result) and result["n"] == 16
    assert json.loads(Path("eval_results/base-test.json").read_text())["adapter"] is None
    assert len(Path("eval_results/base-test.jsonl").read_text().splitlines()) == 16
    pytest.importorskip("matplotlib") and Path("eval_results/run-test.png").stat()
    eval_gsm8k.main(eval_gsm8k.parse_args([*argv, "--adapter", "checkpoints/run/step_000004", "--save-merged", "merged"]))
    completions = [[json.loads(line)["completion"] for line in Path(f"eval_results/run-step_000004{x}-test.jsonl").read_text().splitlines()] for x in ("", "-merged")]
    assert completions[0] == completions[1]
    whole = Path("eval_results/base-test.json").read_text()
    eval_gsm8k.main(eval_gsm8k.parse_args([*argv, "--nb-samples", "3"]))       # another evaluation: the first one's scores stay
    assert Path("eval_results/base-test-1.json").read_text() == whole and json.loads(Path("eval_results/base-test.json").read_text())["n"] == 3
    assert len(Path("eval_results/base-test-1.jsonl").read_text().splitlines()) == 16
    eval_gsm8k.main(eval_gsm8k.parse_args([*argv, "--nb-samples", "3"]))       # the same again takes its place
    assert len(list(Path("eval_results").glob("base-test*.json"))) == 2
    reloaded, tokenizer = eval_gsm8k.load_model("merged", torch.float32, torch.device("cpu"))
    load_adapter(model, "checkpoints/run/step_000004")
    torch.testing.assert_close(reloaded(IDS).logits, model.eval()(IDS).logits, atol=1e-5, rtol=1e-5)
    for bad, message in ((["--save-merged", "merged"], "exactly one adapter"), (["--adapter", "nowhere"], "no such adapter folder"),
                         (["--shots", "16"], "no problem is left")):
        with pytest.raises(ValueError, match=message):
            eval_gsm8k.main(eval_gsm8k.parse_args([*argv, *bad]))


# --- train_math.py: data ---

def test_training_masks_exactly_what_generation_is_given(tiny):
    """An example must be the prompt's ids, then the answer's and EOS; targets are all behind the prompt, also in the longest row."""
    _, tokenizer = load(tiny)
    tokenizer.pad_token = tokenizer.eos_token                   # pad == eos must not lose the final EOS
    rows = read_rows(str(tiny / "train.jsonl"), "train", 5)
    examples = encode(rows, tokenizer, 512)
    ids, targets_row, targets_column = collate(examples, "cpu")
    for row, ((question, answer), (tokens, prompt)) in enumerate(zip(rows, examples)):
        assert tokens[:prompt] == encode_prompt(tokenizer, format_prompt(question))
        assert tokenizer.decode(tokens[prompt:-1]) == answer and tokens[-1] == tokenizer.eos_token_id
        assert targets_column[targets_row == row].tolist() == list(range(prompt, len(tokens)))
        assert ids[row, :len(tokens)].tolist() == tokens


def test_long_rows_are_dropped_not_cut(tiny):
    """A row over --max-length must be missing, never shortened; no row left must be an error that tells the lengths."""
    _, tokenizer = load(tiny)
    rows = read_rows(str(tiny / "train.jsonl"), "train")
    whole = encode(rows, tokenizer, 512)
    limit = max(len(ids) for ids, _ in whole) - 1
    assert encode(rows, tokenizer, limit) == [e for e in whole if len(e[0]) <= limit] != whole
    with pytest.raises(ValueError, match="--max-length 5 leaves no row"):
        encode(rows, tokenizer, 5)


def test_batches_follow_from_seed_and_epoch_and_start_with_the_largest():
    """Each epoch must hold every row once, be reproducible, differ from the next, waste little padding, begin with the largest."""
    lengths = torch.randint(10, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = epoch_batches(lengths, 8, seed=0, epoch=0)
    assert sorted(sum(batches, [])) == list(range(1003)) and batches == epoch_batches(lengths, 8, 0, 0)
    assert batches != epoch_batches(lengths, 8, 0, 1) and batches != epoch_batches(lengths, 8, 1, 0)
    padded = lambda batch: len(batch) * max(lengths[row] for row in batch)
    assert padded(batches[0]) == max(map(padded, batches)) and sum(map(padded, batches)) < 1.1 * sum(lengths)
    assert batches[1:] != sorted(batches[1:], key=padded)       # grouped, but the order of batches is random


# --- train_math.py: loss, accumulation, checkpointing ---

def adapted(tiny, dtype=torch.float32):
    model, tokenizer = eval_gsm8k.load_model(str(tiny / "base"), dtype, torch.device("cpu"))
    inject_lora(model, LoRAConfig(r=4))
    shake(model)
    return model.train(), encode(read_rows(str(tiny / "train.jsonl"), "train"), tokenizer, 512)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("chunk", [2**22, 300])
def test_loss_and_gradients_equal_the_full_computation(tiny, chunk, monkeypatch):
    """Logits in chunks, only at targets, without a mask, must equal all logits with a padding mask and labels of -100."""
    monkeypatch.setattr(train_math, "CHUNK", chunk)
    model, examples = adapted(tiny)
    batch = sorted(examples[:6])
    total = backward_loss(model, collate(batch, "cpu"), 0.5)
    ours = gradients(model)
    model.zero_grad()
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[-100] * prompt + ids[prompt:] + [-100] * (longest - len(ids)) for ids, prompt in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    (0.5 * loss).backward()
    torch.testing.assert_close(total, loss.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)


def test_heads_that_change_their_logits_are_refused(tiny):
    """Where the model scales or caps logits after its head, our loss would be silently wrong: refused."""
    model, tokenizer = load(tiny)
    train_math.check_head(model, [3, 4, 5])
    forward = model.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30) * 0.5
        return out
    model.forward = capped
    with pytest.raises(ValueError, match="scales or caps its logits"):
        train_math.check_head(model, [3, 4, 5])


def test_checkpointing_gives_the_same_gradients_and_reaches_every_adapter(tiny):
    """With a frozen embedding each lora_B must have a finite non-zero gradient after the first backward, equal to that without."""
    found = []
    for checkpointed in (False, True):
        model, tokenizer = load(tiny)
        torch.manual_seed(0)
        inject_lora(model, LoRAConfig(r=4, dropout=0.1))        # B = 0, as at the first step
        model.train()
        if checkpointed:
            checkpoint_blocks(model)
        torch.manual_seed(0)
        backward_loss(model, collate(encode(read_rows(str(tiny / "train.jsonl"), "train", 4), tokenizer, 512), "cpu"))
        found.append(gradients(model))
    assert same_bits(*found)
    assert all(g.isfinite().all() and g.any() for name, g in found[1].items() if name.endswith("lora_B"))


def test_checkpointing_keeps_only_block_inputs(tiny):
    """What a checkpointed model keeps for backward must be a small part of what it keeps otherwise."""
    kept = []
    for checkpointed in (False, True):
        model, examples = adapted(tiny)
        if checkpointed:
            checkpoint_blocks(model)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model.base_model(input_ids=collate(examples[:8], "cpu")[0], use_cache=False)
        kept.append(sum(sizes))
    assert kept[1] < 0.2 * kept[0]


def test_recomputing_stops_before_a_blocks_last_product(tiny):
    """The base product of the last layer, which backward does not need, must be computed no more often than without checkpointing."""
    counts = []
    for checkpointed in (False, True):
        model, tokenizer = load(tiny)
        inject_lora(model, LoRAConfig(r=4, targets="all-linear"))
        model.train()
        if checkpointed:
            checkpoint_blocks(model)
        with Products() as products:
            backward_loss(model, collate(encode(read_rows(str(tiny / "train.jsonl"), "train", 4), tokenizer, 512), "cpu"))
        hidden, wide = model.config.hidden_size, model.config.intermediate_size
        counts.append([products.inner.count(shape) for shape in ((hidden, wide), (wide, hidden))])
    (up, down), (up_again, down_again) = counts         # down_proj is a block's last layer
    assert up_again > up and down_again == down


@pytest.mark.parametrize("nf4", (False, True))
@pytest.mark.parametrize("targets", (("q_proj", "v_proj"), "all-linear"))
def test_recomputing_between_products_keeps_only_what_they_give(tiny, targets, nf4):
    """The same bits with dropout, no more large products, and per block nothing kept but what a count by hand allows."""
    found = []
    for light in (False, True):
        model, tokenizer = load(tiny)
        train_math.attention_on_cpu(model, recompute=False)
        if nf4:
            quantize_nf4(model)
        torch.manual_seed(0)
        inject_lora(model, LoRAConfig(r=4, targets=targets, dropout=0.1))
        model.train()
        if light:
            train_math.checkpoint_between_products(model)
        torch.manual_seed(0)
        with Products() as products:
            backward_loss(model, collate(encode(read_rows(str(tiny / "train.jsonl"), "train", 4), tokenizer, 512), "cpu"))
        hidden, wide = model.config.hidden_size, model.config.intermediate_size
        found.append((gradients(model), [products.inner.count(shape) for shape in ((hidden, wide), (wide, hidden))]))
    assert same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_what_lies_between_products_is_not_kept(tiny):
    """No scores (batch, heads, longest, longest), no norm's fp32 copies, and of a gated MLP g and u alone."""
    kept = []
    for light in (False, True):
        model, examples = adapted(tiny)
        train_math.attention_on_cpu(model, recompute=False)
        if light:
            train_math.checkpoint_between_products(model)
        batch, tensors = collate(examples[:8], "cpu"), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault((t.data_ptr(), t.shape), t), lambda t: t):
            model.base_model(input_ids=batch[0], use_cache=False)
        rows, longest = batch[0].shape
        scores = rows * model.config.num_attention_heads * longest**2       # the causal mask is smaller
        wide = rows * longest * model.config.intermediate_size
        kept.append([sum(shape.numel() == size for _, shape in tensors) / model.config.num_hidden_layers for size in (scores, wide)])
    assert kept[0][0] >= 1 and kept[0][1] > 2
    assert kept[1] == [0, 2]


@pytest.mark.parametrize("own", (lambda mlp, x: mlp.down_proj(mlp.act_fn(0.5 * mlp.gate_proj(x)) * mlp.up_proj(x)),
                                 lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x).clamp(max=7)) * mlp.up_proj(x)),
                                 lambda mlp, x: F.dropout(mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)), 0.1, mlp.training)))
def test_an_mlp_that_does_more_under_the_same_names_is_left_alone(tiny, own):
    """Recomputing must not replace a forward that differs from down(act(gate(x)) * up(x)), nor draw random numbers."""
    model, _ = adapted(tiny)
    for layer in model.base_model.layers:
        layer.mlp.forward = functools.partial(own, layer.mlp)
    forwards = [layer.mlp.forward for layer in model.base_model.layers]
    before = torch.get_rng_state()
    train_math.checkpoint_between_products(model)
    assert [layer.mlp.forward for layer in model.base_model.layers] == forwards
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", HALF)
def test_attention_on_a_cpu_is_transformers_own(tiny, dtype):
    """Its logits, in fp32 bit for bit and in half precision to its rounding; no fp32 copy of half-precision scores is kept."""
    AttentionInterface._global_mapping.pop("eager", None)       # ours, of an earlier test
    model, examples = adapted(tiny)
    model.to(dtype).eval().set_attn_implementation("eager")
    batch = collate(examples[:8], "cpu")[0]
    scores, found = len(batch) * model.config.num_attention_heads * batch.shape[1]**2, []
    for ours in (False, True):
        if ours:
            train_math.attention_on_cpu(model, recompute=False)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.numel(), t.dtype)) or t, lambda t: t):
            found.append((model(batch).logits, kept.count((scores, torch.float32))))
    (theirs, wide), (logits, wide_ours) = found
    torch.testing.assert_close(logits, theirs, rtol=0, atol=0 if dtype == torch.float32 else torch.finfo(dtype).eps * theirs.abs().max().item())
    assert wide > 0 and (dtype == torch.float32 or wide_ours == 0)


def test_plain_attention_leaves_an_architectures_own(tiny):
    """GPT-2's upcast attention, which it runs only under the name eager, must stay in place: the same bits."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, reorder_and_upcast_attn=True)).bfloat16().eval()
    model.set_attn_implementation("eager")
    before = model(IDS).logits
    train_math.attention_on_cpu(model, recompute=True)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("flag, names", ((None, {"plain", "forward", "<lambda>"}), ("--checkpoint-activations", {"forward"}),
                                         ("--no-checkpoint-activations", set())))
def test_what_a_cpu_computes_again(tiny, workdir, monkeypatch, flag, names):
    """By default what lies between products; with the flag blocks alone, nothing of them twice; without, nothing."""
    calls = []
    monkeypatch.setattr(train_math, "checkpoint", lambda function, *args, **kwargs: calls.append(function.__name__) or checkpoint(function, *args, **kwargs))
    run(tiny, *([flag] if flag else []), "--max-steps", "4", "--batch-size", "4", "--grad-accum", "1")
    assert set(calls) == names


def test_memory_plan_counts_what_a_block_keeps(tiny):
    """The plan's activations must grow with batch and length, shrink with checkpointing, and its weights be exact."""
    model, _ = adapted(tiny)
    whole = train_math.kept_by_block(model, 40)
    plan = train_math.memory_plan(model, 4, whole, whole)
    assert plan["trained weights"] == 4 * count_parameters(model)[0] and plan["AdamW moments"] == 2 * plan["trained weights"]
    assert plan["activations"] == pytest.approx(2 * train_math.memory_plan(model, 2, whole, whole)["activations"])
    checkpoint_blocks(model)
    kept = train_math.kept_by_block(model, 40)
    assert kept == 4 * 40 * model.config.hidden_size            # a block's input
    assert train_math.kept_by_block(model, 40) == kept          # measuring left the checkpointing in place
    assert model(IDS).logits.requires_grad                      # measuring left the model as it was


@pytest.mark.parametrize("level, nf4", [("checkpoint_blocks", False), ("checkpoint_blocks", True), ("checkpoint_between_products", False), (None, False)])
def test_the_memory_plan_holds_what_a_step_holds(level, nf4, monkeypatch):
    """All tensors alive at once in a step, as torch's profiler counts them, must stay within the plan; here, where
    the base is small, the plan is up to half as much again."""
    monkeypatch.setattr(train_math, "CHUNK", 2**18)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
                                         num_key_value_heads=4, pad_token_id=0))
    if nf4:
        quantize_nf4(model)
    inject_lora(model, LoRAConfig(targets="all-linear"))
    train_math.attention_on_cpu(model.train(), recompute=False)
    whole = train_math.kept_by_block(model, 128)
    if level:
        getattr(train_math, level)(model)
    plan = train_math.memory_plan(model, 4, train_math.kept_by_block(model, 128), whole)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step():
        rows = torch.arange(4).repeat_interleave(127)
        backward_loss(model, (torch.randint(2048, (4, 128)), rows, torch.arange(1, 128).repeat(4)), 1 / len(rows))
        optimizer.step()
        optimizer.zero_grad()
    step()                                      # AdamW's moments are there after the first
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = sorted((e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) + plan["AdamW moments"]
    peak = held + max(itertools.accumulate(e.nbytes() for e in events))
    assert 0.65 < peak / sum(plan.values()) < 1, (peak, plan)


class Products(TorchDispatchMode):
    """Notes the dtypes in which matrix products of more than one row are really computed, and the shapes of their second factors."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.inner = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm") and args[-2].shape[-2] > 1:
            self.dtypes.append(args[-1].dtype)
            self.inner.append(tuple(args[-1].shape[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALF[1:])
def test_float32_products_round_once(dtype):
    """Forward and both gradients must be the fp32 product of the half-precision numbers, rounded once, with nothing wider kept."""
    torch.manual_seed(0)
    x, g, layer = torch.randn(3, 5, 70, dtype=dtype, requires_grad=True), torch.randn(3, 5, 40, dtype=dtype), nn.Linear(70, 40, dtype=dtype)
    kept = []
    with eval_gsm8k.Float32Products(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        y = layer(x)
        y.backward(g)
    wide = lambda tensor: tensor.detach().float().flatten(0, -2)
    assert torch.equal(y.flatten(0, 1), torch.addmm(layer.bias.float(), wide(x), wide(layer.weight).T).to(dtype))
    assert torch.equal(x.grad.flatten(0, 1), (wide(g) @ wide(layer.weight)).to(dtype))
    torch.testing.assert_close(layer.weight.grad, (wide(g).T @ wide(x)).to(dtype))
    assert y.dtype == dtype and set(kept) == {dtype}


@pytest.mark.parametrize("dtype", HALF[1:])
def test_a_cpu_without_half_precision_multiplies_in_float32(tiny, workdir, monkeypatch, dtype):
    """Where torch says that it has no half-precision products, layers may compute none: not forward, backward, recomputed nor generating."""
    monkeypatch.setattr(eval_gsm8k.platform, "machine", lambda: "x86_64")
    for supported in (True, False):
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported, raising=False)
        with Products() as products:
            last = run(tiny, "--dtype", str(dtype)[6:], "--max-steps", "2", "--batch-size", "4", "--grad-accum", "1", "--targets", "all-linear", name=f"{supported}")
        assert ({dtype} if supported else {torch.float32}) == set(products.dtypes[len(products.dtypes) // 2:])      # after the checks at start
    losses = [[line["loss"] for line in metrics(name)] for name in ("True", "False")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    model, tokenizer = eval_gsm8k.load_model(str(tiny / "base"), dtype, torch.device("cpu"))
    model.set_attn_implementation("eager")
    load_adapter(model, last)
    with Products() as products:
        complete(model, tokenizer, [format_prompt("1 + 1"), format_prompt("2 + 2")], 2, 1)
    assert set(products.dtypes) == {torch.float32}
    assert "float32" in eval_gsm8k.pick_dtype(str(dtype)[6:], torch.device("cpu"))[1]


def run(tiny, *flags, name="run", **_):
    """Runs main() in this process and returns the last checkpoint's folder."""
    return train_math.main(train_math.parse_args(["--model", str(tiny / "base"), "--data", str(tiny / "train.jsonl"), "--run-name", name, "--device", "cpu",
                                                  "--dtype", "float32", "--lr", "1e-2", "--r", "4", *flags]))


def metrics(name="run"):
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def test_accumulation_equals_one_big_batch(tiny, workdir):
    """Windows of 8 x 1, 4 x 2 and 2 x 4 rows of unequal length must step to the same weights: divided by the window's targets."""
    results = []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        # one row per epoch position: the same eight rows make up the only window whatever the batching
        last = run(tiny, "--nb-samples", "8", "--epochs", "1", "--batch-size", str(batch), "--grad-accum", str(accumulate), "--dropout", "0", name=f"b{batch}")
        results.append((load_file(last / "adapter_model.safetensors"), metrics(f"b{batch}")[0]))
    for tensors, line in results[1:]:
        assert line["loss"] == pytest.approx(results[0][1]["loss"], rel=1e-6) and line["grad_norm"] == pytest.approx(results[0][1]["grad_norm"], rel=1e-4)
        assert line["tokens"] == results[0][1]["tokens"]
    lengths = {len(ids) for ids, _ in adapted(tiny)[1][:8]}
    assert len(lengths) > 1


def test_windows_cross_epochs_and_the_last_is_stepped(tiny, workdir):
    """10 rows, 3 epochs, windows of 4: 30 micro-batches must be 8 steps, the last of 2, and every token counted."""
    run(tiny, "--nb-samples", "10", "--epochs", "3", "--grad-accum", "4")
    lines = metrics()
    _, examples = adapted(tiny)
    assert len(lines) == 8 and sum(line["tokens"] for line in lines) == 3 * sum(len(ids) for ids, _ in examples[:10])
    assert lines[-1]["tokens"] < min(line["tokens"] for line in lines[:-1])


# --- train_math.py: loss scaling, schedule, numbers that go wrong ---

def test_loss_scaler_agrees_with_torch_s_grad_scaler():
    """On a recorded sequence of good and overflowing steps scale and skips must be GradScaler's."""
    ours = LossScaler(True, scale=2.0**16, interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight, mine = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizers = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([mine], lr=0.1)
    scales = []
    for gradient in [1, 2, math.inf, 3, 1, 2, 3, math.nan, math.inf, 1, 1, 1, 1, 1, 1, 1]:
        theirs.scale((weight * gradient).sum()).backward()
        theirs.unscale_(optimizers[0])
        theirs.step(optimizers[0])
        theirs.update()
        ((mine * gradient).sum() * ours.scale).backward()
        ours.unscale([mine])
        finite = bool(mine.grad.isfinite().all())
        if finite:
            optimizers[1].step()
        ours.update(finite)
        [optimizer.zero_grad() for optimizer in optimizers]
        assert ours.scale == theirs.get_scale() and torch.equal(mine, weight)
        scales.append(ours.scale)
    assert set(scales) == {2.0**14, 2.0**15, 2.0**16}


def test_schedule_warms_up_then_falls_to_zero():
    """At most a tenth of the steps rise to the peak, then half a cosine."""
    rates = [learning_rate_at(step, 100, 1000, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[-1] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate_at(0, 1, 100, 1.0) == 1.0 and learning_rate_at(0, 5, 0, 1.0) == 1.0


def test_a_skipped_step_leaves_weights_moments_and_schedule_untouched(tiny, workdir, monkeypatch):
    """In fp16 an overflow must halve the scale and change nothing else; training then goes on."""
    real, seen = train_math.backward_loss, []

    def overflow(model, batch, weight=1.0):
        loss = real(model, batch, weight)
        seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        if len(seen) == 2:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(math.inf)
        return loss
    monkeypatch.setattr(train_math, "backward_loss", overflow)
    last = run(tiny, "--dtype", "float16", "--max-steps", "3", "--grad-accum", "1", "--warmup-steps", "0")
    lines, state = metrics(), torch.load(last / "trainer_state.pt", weights_only=True)
    assert [line["skipped"] for line in lines] == [False, True, False] and [line["loss_scale"] for line in lines] == [2**16, 2**15, 2**15]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2])) and any(not torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    assert lines[1]["lr"] == lines[2]["lr"] != lines[0]["lr"] and {float(s["step"]) for s in state["optimizer"]["state"].values()} == {2.0}
    assert lines[1]["grad_norm"] is None and state["loss_scale"] == 2**15


def test_a_loss_that_is_not_finite_stops_and_names_the_module(tiny, workdir, monkeypatch):
    """In fp32 the run must end at once, naming the first module whose output went wrong; in fp16 after 20 skips in a row."""
    real = train_math.inject_lora

    def spoiled(model, config):
        names = real(model, config)
        model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * math.nan)
        return names
    monkeypatch.setattr(train_math, "inject_lora", spoiled)
    with pytest.raises(ValueError, match=r"step 1: loss nan.*first output that is not finite is that of model.layers.1.mlp.*--lr"):
        run(tiny, name="a")
    with pytest.raises(ValueError, match="step 20: .*20 skipped in a row"):
        run(tiny, "--dtype", "float16", "--grad-accum", "1", name="b")


def test_out_of_memory_names_the_flags_that_help(tiny, workdir, monkeypatch):
    """One line, the flags in the order of their effect."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
    monkeypatch.setattr(train_math, "backward_loss", full)
    for flags in ([], ["--no-checkpoint-activations"]):     # by default a CPU keeps more than the flag does
        with pytest.raises(ValueError, match="out of memory.*--checkpoint-activations.*--batch-size.*--nf4.*--dtype.*--max-length.*--r"):
            run(tiny, *flags, "--batch-size", "2")
    with pytest.raises(ValueError, match="out of memory") as refused:
        run(tiny, "--nf4", "--checkpoint-activations", name="b")
    assert not any(flag in str(refused.value) for flag in ("--checkpoint", "--batch-size", "--nf4"))     # in use already
    monkeypatch.setattr(train_math, "backward_loss", lambda *_: torch.empty(2**60))        # more than any CPU has
    with pytest.raises(ValueError, match="out of memory.*a smaller --max-length"):
        run(tiny, name="c")
    monkeypatch.setattr(train_math, "backward_loss", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):             # any other error is not one
        run(tiny, name="d")


# --- train_math.py: the run, its files, resuming ---

def test_training_learns_and_writes_what_it_says(tiny, workdir, capsys):
    """The loss must fall, every step leave a line, the checkpoint load, and facts and plan stand before step 0."""
    last = run(tiny, "--epochs", "4", "--save-every", "10")
    lines, out = metrics(), capsys.readouterr().out
    assert len(lines) == 32 and [line["step"] for line in lines] == list(range(1, 33))
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "loss_scale", "tokens", "tokens_per_s", "peak_memory_gb", "skipped"}
    assert sum(line["loss"] for line in lines[-8:]) < sum(line["loss"] for line in lines[:8]) - 0.4
    assert "4 layers adapted" in out and "memory plan" in out and "parameters train" in out
    folders = sorted(p.name for p in Path("checkpoints/run").iterdir())
    assert folders == ["step_000010", "step_000020", "step_000030", "step_000032"] and last.name == folders[-1]
    assert [(Path("checkpoints/run") / f / "trainer_state.pt").exists() for f in folders] == [False, False, True, True]
    model, _ = load(tiny)
    assert load_adapter(model, last).targets == ("q_proj", "v_proj")
    described = json.loads((last / "adapter_config.json").read_text())
    assert described["task_type"] == "CAUSAL_LM" and described["base_model_name_or_path"] == str(tiny / "base")


def test_resume_continues_bitwise(tiny, workdir, capsys):
    """With dropout on and windows across epochs, 5 steps + 5 resumed must be the bits of 10, and the metrics the same lines."""
    flags = ["--epochs", "3", "--nb-samples", "13", "--grad-accum", "4", "--dropout", "0.1", "--save-every", "5", "--max-steps", "10"]
    whole = run(tiny, *flags, name="whole")
    run(tiny, *flags, name="cut")
    shutil.rmtree("checkpoints/cut/step_000010")                # as if killed after step 7: lines that the checkpoint does not cover
    resumed = run(tiny, *flags, "--resume", name="cut")
    assert same_bits(load_file(whole / "adapter_model.safetensors"), load_file(resumed / "adapter_model.safetensors"))
    a, b = (torch.load(folder / "trainer_state.pt", weights_only=True)["optimizer"]["state"] for folder in (whole, resumed))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    steady = lambda lines: [{k: v for k, v in line.items() if k not in ("tokens_per_s", "peak_memory_gb")} for line in lines]
    assert steady(metrics("whole")) == steady(metrics("cut")) and len(metrics("cut")) == 10
    run(tiny, *flags, "--resume", name="cut")
    assert "finished already" in capsys.readouterr().out


def test_sigkill_at_random_moments(tiny, workdir):
    """Killed again and again, every second time while a checkpoint is being written, a run must end in the bits of one left alone.

    KILLS=20 python -m pytest -q -s -k sigkill is the stress run; two kills by default.
    """
    import random
    rng, kills, in_writing = random.Random(0), int(os.environ.get("KILLS", 2)), 0
    command = [sys.executable, str(HERE / "train_math.py"), "--model", str(tiny / "base"), "--data", str(tiny / "train.jsonl"), "--device", "cpu",
               "--dtype", "float32", "--r", "4", "--dropout", "0.1", "--epochs", str(3 + kills), "--batch-size", "5", "--grad-accum", "2", "--save-every", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--run-name", "alone"], check=True, capture_output=True, env=env)
    steps = metrics("alone")[-1]["step"]
    command += ["--run-name", "killed"]
    done = lambda: len(list(Path("checkpoints/killed").glob("step_*[0-9]")))

    def writing(since):
        try:
            return any(path.stat().st_mtime > since for path in Path("checkpoints/killed").glob("*.part"))
        except FileNotFoundError:           # renamed just now
            return False
    for kill in range(kills):
        before, goal = done(), min(steps - 2, done() + rng.randint(1, max(1, (steps - 4) // kills)))
        since = time.time()                 # the last kill's half-written folder may still lie there
        process = subprocess.Popen([*command, *(["--resume"] if before else [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        while process.poll() is None and (done() < goal or (kill % 2 and not writing(since))):
            time.sleep(0.0005)
        time.sleep(0 if kill % 2 else rng.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL                # it did not end by itself
        in_writing += writing(since)
    subprocess.run([*command, "--resume"], check=True, capture_output=True, env=env)
    alone, killed = (load_file(f"checkpoints/{name}/step_{steps:06d}/adapter_model.safetensors") for name in ("alone", "killed"))
    assert same_bits(alone, killed) and [line["loss"] for line in metrics("alone")] == [line["loss"] for line in metrics("killed")]
    print(f"{kills} kills, {in_writing} of them while a checkpoint was being written")


def test_resume_refuses_what_it_cannot_continue(tiny, workdir, capsys):
    """A run that never was, other flags, a name that is taken: refused by name; a damaged newest checkpoint is passed over."""
    flags = ["--max-steps", "4", "--save-every", "2"]
    with pytest.raises(ValueError, match="no whole checkpoint to continue from"):
        run(tiny, "--resume")
    run(tiny, *flags)
    with pytest.raises(ValueError, match="has checkpoints up to step_000004: add --resume"):
        run(tiny, *flags)
    with pytest.raises(ValueError, match="--r was 4, is 8; --lr was 0.01, is 0.02"):
        run(tiny, *flags, "--resume", "--r", "8", "--lr", "0.02")
    os.truncate("checkpoints/run/step_000004/trainer_state.pt", 1000)
    run(tiny, *flags, "--resume")
    assert "step_000004 is damaged" in capsys.readouterr().err and len(metrics()) == 4


def test_a_full_disk_names_the_last_whole_checkpoint(tiny, workdir, monkeypatch):
    """Whoever reports it, safetensors, torch or the log: one line, the last whole checkpoint in it, no half one left behind."""
    real = train_math.save_adapter

    def no_space(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full(model, config, folder):
        if "000003" in str(folder):
            monkeypatch.setattr(safetensors.torch, "save_file", no_space)
        real(model, config, folder)
    monkeypatch.setattr(train_math, "save_adapter", full)
    with pytest.raises(ValueError, match="step_000003 .*No space left.*last whole checkpoint: checkpoints/run/step_000002"):
        run(tiny, "--save-every", "1")
    assert sorted(p.name for p in Path("checkpoints/run").iterdir()) == ["step_000001", "step_000002"]

    def no_log(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_math, "open_log", no_log)
    with pytest.raises(ValueError, match="No space left on device; the last whole checkpoint: checkpoints/run/step_000002"):
        run(tiny, "--save-every", "1", "--resume")


def test_nf4_trains_resumes_scores_and_merges_from_the_command_line(tiny, workdir):
    """--nf4 must quantise in both scripts, resume to the same bits, and write a merged model of plain weights that scores the same."""
    flags = ["--nf4", "--targets", "all-linear", "--max-steps", "6", "--save-every", "3", "--grad-accum", "2"]
    whole = run(tiny, *flags, name="whole")
    run(tiny, *flags, name="cut")
    shutil.rmtree("checkpoints/cut/step_000006")
    resumed = run(tiny, *flags, "--resume", name="cut")
    assert same_bits(*(load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed)))
    with pytest.raises(ValueError, match="--nf4 was True, is False"):
        run(tiny, *[flag for flag in flags if flag != "--nf4"], "--resume", name="cut")
    scores = eval_gsm8k.main(eval_gsm8k.parse_args(["--model", str(tiny / "base"), "--nf4", "--adapter", str(whole), "--data", str(tiny / "test.jsonl"),
                                                    "--max-new-tokens", "8", "--dtype", "float32", "--device", "cpu", "--save-merged", "merged"]))
    assert [name for name, _ in scores] == ["base", "whole-step_000006", "whole-step_000006-merged"] and scores[0][1]["nf4"] is True
    rows = [[json.loads(line)["completion"] for line in open(f"eval_results/whole-step_000006{end}-test.jsonl")] for end in ("", "-merged")]
    assert rows[0] == rows[1]
    model, _ = eval_gsm8k.load_model("merged", torch.float32, torch.device("cpu"))
    assert set(model.state_dict()) == set(load(tiny)[0].state_dict())


def test_interrupting_saves_and_says_how_to_resume(tiny, workdir, capsys):
    """SIGTERM must finish the step, save, print the command that continues, and exit with 143."""
    pid = os.getpid()
    real = train_math.learning_rate_at

    def later(step, *rest):
        if step == 3:
            os.kill(pid, signal.SIGTERM)
        return real(step, *rest)
    train_math.learning_rate_at = later
    try:
        with pytest.raises(SystemExit) as stopped:
            run(tiny)
    finally:
        train_math.learning_rate_at = real
    assert stopped.value.code == 143 and len(metrics()) == 4 and (Path("checkpoints/run/step_000004") / "trainer_state.pt").exists()
    assert "--resume" in capsys.readouterr().out


# --- more than one process ---

def torchrun(script, *flags, timeout=120):
    """Two processes on gloo; each rank's stderr is in the result."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", str(HERE / script), *map(str, flags)],
                          capture_output=True, text=True, timeout=timeout, env=env)


def test_two_processes_train_like_one(tiny, workdir):
    """Windows of 3 micro-batches over 2 processes, a last window of 1, dropout on, and a resume: the single run's weights within 1e-6."""
    flags = ["--model", str(tiny / "base"), "--data", str(tiny / "train.jsonl"), "--nb-samples", "8", "--epochs", "2", "--grad-accum", "3", "--dropout", "0.1",
             "--device", "cpu", "--dtype", "float32", "--r", "4", "--lr", "1e-2", "--save-every", "3"]
    alone = train_math.main(train_math.parse_args([*flags, "--run-name", "alone"]))
    done = torchrun("train_math.py", *flags, "--run-name", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layers adapted") == 1                              # rank 0 alone speaks and writes
    assert sorted(p.name for p in Path("checkpoints/two").iterdir()) == ["step_000003", "step_000006"]
    for a, b in zip(metrics("alone"), metrics("two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["tokens"] == b["tokens"]
    shutil.rmtree("checkpoints/two/step_000006")
    again = torchrun("train_math.py", *flags, "--run-name", "two", "--resume")
    assert again.returncode == 0, again.stderr
    one = load_file(alone / "adapter_model.safetensors")
    two = load_file("checkpoints/two/step_000006/adapter_model.safetensors")
    assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() < 1e-6 for key in one)


def test_two_processes_score_like_one(tiny, workdir):
    """The JSON and every completion must be those of one process, but for the seconds."""
    inject_lora(model := load(tiny)[0], config := LoRAConfig(r=4))
    shake(model, 0.5)
    save_adapter(model, config, "adapter")
    flags = ["--model", str(tiny / "base"), "--adapter", "adapter", "--data", str(tiny / "test.jsonl"), "--batch-size", "3", "--max-new-tokens", "12",
             "--device", "cpu", "--dtype", "float32"]
    eval_gsm8k.main(eval_gsm8k.parse_args([*flags, "--out", "one"]))
    done = torchrun("eval_gsm8k.py", *flags, "--out", "two")
    assert done.returncode == 0, done.stderr
    for path in Path("one").glob("*.json*"):
        one, two = path.read_text(), Path("two", path.name).read_text()
        if path.suffix == ".json":
            one, two = ({k: v for k, v in json.loads(text).items() if k != "seconds"} for text in (one, two))
        assert one == two
    assert len(list(Path("two").glob("*.json*"))) == 4


def test_a_process_that_dies_ends_the_run_with_its_reason(tiny, workdir):
    """Rank 1 meets an error that rank 0 does not: both must be gone soon, and rank 1's line must be there."""
    script = Path(workdir) / "dies.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(HERE)!r})
import train_math
real = train_math.backward_loss
def dies(*args):
    dies.calls += 1
    if train_math.RANK == 1 and dies.calls == 3:
        raise train_math.torch.OutOfMemoryError("rank 1's card is full")
    return real(*args)
dies.calls, train_math.backward_loss = 0, dies
train_math.run_script("train_math.py", train_math.main, train_math.parse_args)
""")
    begin = time.monotonic()
    done = torchrun(script, "--model", tiny / "base", "--data", tiny / "train.jsonl", "--device", "cpu", "--dtype", "float32", "--run-name", "dies",
                    "--grad-accum", "2", "--save-every", "1")
    assert done.returncode != 0 and time.monotonic() - begin < 60
    assert "train_math.py (rank 1): out of memory (rank 1's card is full)" in done.stderr
    assert train_math.newest_checkpoint(Path("checkpoints/dies"))[1]["step"] >= 1


def test_nohup_is_respected():
    """A signal that the parent had ignored stays ignored: a run under nohup goes on when the terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train_math.catch_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_that_differ_are_refused(monkeypatch, tiny, workdir):
    """Another rank with other rows or flags would train something else in silence: the difference is named."""
    def gather(value):
        return [{**value, "lr": 5.0}, value]
    monkeypatch.setattr(train_math, "gather", gather)
    monkeypatch.setattr(train_math, "RANK", 1)
    with pytest.raises(ValueError, match="lr differ from rank 0's: 0.01, there 5.0"):
        run(tiny)


# --- train_sst2.py ---

@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """(folder of a tiny random BERT with its tokenizer, folder of train and validation sentences)."""
    import random
    folder, rng = tmp_path_factory.mktemp("sst2"), random.Random(0)
    model, tokenizer = train_sst2.demo_encoder()
    model.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    (folder / "data").mkdir()
    for split, count in (("train", 96), ("validation", 40)):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train_sst2.demo_sentences(rng, count, "story")))
    return folder


def sst2(encoder, *flags):
    return train_sst2.parse_args(["--model", str(encoder / "bert"), "--data", str(encoder / "data"), "--device", "cpu", "--dtype", "float32",
                                  "--epochs", "1", "--batch-size", "16", "--lr", "5e-3", *flags])


def test_an_ablation_writes_a_line_per_run_and_skips_finished_ones(encoder, workdir, monkeypatch, capsys):
    """Ranks, seeds and full fine-tuning must each stand in sst2.jsonl, adapter and head counted apart; a second start trains nothing."""
    lines = train_sst2.main(sst2(encoder, "--ranks", "1", "2", "--seeds", "0", "1", "--full-finetune"))
    assert [(line["r"], line["seed"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1), (None, 0), (None, 1)]
    assert [line["adapter_parameters"] for line in lines] == [512, 512, 1024, 1024, 0, 0] and lines[0]["head_parameters"] == 64 * 2 + 2
    assert lines[-1]["trainable"] == lines[-1]["total"] and len(lines[0]["history"]) >= 4 and "spread" in capsys.readouterr().out
    path = Path("results/sst2.jsonl")
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)[:-1]))     # as if killed in the last run
    trained, real = [], train_sst2.train
    monkeypatch.setattr(train_sst2, "train", lambda args, data, r, seed, *rest: trained.append((r, seed)) or real(args, data, r, seed, *rest))
    again = train_sst2.main(sst2(encoder, "--ranks", "1", "2", "--seeds", "0", "1", "--full-finetune"))
    assert trained == [(None, 1)] and again[:-1] == lines[:-1] and again[-1]["loss"] == lines[-1]["loss"]
    assert train_sst2.main(sst2(encoder, "--ranks", "--seeds", "0", "1", "--full-finetune")) == again[-2:]      # no rank: full alone
    path.write_text(path.read_text()[:-30])                     # killed while the line was being written
    with pytest.raises(ValueError, match="sst2.jsonl, line 6 is no whole JSON object"):
        train_sst2.main(sst2(encoder, "--ranks", "1", "2", "--seeds", "0", "1", "--full-finetune"))


def test_an_adapter_with_its_head_predicts_the_same_elsewhere(encoder, workdir, capsys):
    """Loaded under another seed, whose fresh head differs, every prediction must be the same; merged too."""
    args = sst2(encoder, "--ranks", "2")
    data = {split: train_sst2.read_sentences(args.data, split) for split in ("train", "validation")}
    _, model = train_sst2.train(args, data, 2, 0, torch.device("cpu"), torch.float32)
    tokens = train_sst2.encode(data["validation"], train_sst2.load_encoder(args.model, None, 0, "cpu")[1], 128)
    wanted, loss = train_sst2.evaluate(model, tokens, 0, 64, torch.float32)
    other = train_sst2.load_encoder(args.model, None, 5, "cpu")[0]
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    load_adapter(other, "checkpoints/sst2-bert-r2-s0")
    assert train_sst2.evaluate(other, tokens, 0, 64, torch.float32) == (wanted, loss)
    args = train_sst2.parse_args(["--adapter", "checkpoints/sst2-bert-r2-s0", "--data", str(encoder / "data"), "--dtype", "float32", "--device", "cpu", "--seeds", "7"])
    train_sst2.main(args)                                       # the model's name comes from the adapter
    out = capsys.readouterr().out
    assert "0 labels change when merged" in out and "merged" in out
    assert train_sst2.score_adapter(args, torch.device("cpu"), torch.float32) == wanted


def test_padding_does_not_change_an_encoder_s_loss(encoder):
    """Evaluated one by one or in padded batches, in any order, labels must be the same and the loss equal."""
    model, tokenizer, _, _ = train_sst2.load_encoder(str(encoder / "bert"), None, 0, "cpu")
    examples = train_sst2.encode(train_sst2.read_sentences(str(encoder / "data"), "validation"), tokenizer, 128)
    alone, padded = train_sst2.evaluate(model, examples, 0, 1, torch.float32), train_sst2.evaluate(model, examples, 0, 16, torch.float32)
    assert len({len(ids) for ids, _ in examples}) > 1 and alone[0] == padded[0] and alone[1] == pytest.approx(padded[1], abs=1e-5)
    import random
    batches = train_sst2.batches(examples, 16, random.Random(0))
    assert sorted(map(str, sum(batches, []))) == sorted(map(str, examples)) and [len(b) for b in batches].count(16) == 2


def test_labels_may_be_true_and_false(workdir):
    """JSON's booleans and 1.0 equal 0 and 1, and must reach cross-entropy as whole numbers."""
    for labels in ((True, False), (1.0, 0.0)):
        Path("train.jsonl").write_text("".join(json.dumps({"sentence": "a", "label": label}) + "\n" for label in labels))
        found = [label for _, label in train_sst2.read_sentences(".", "train")]
        assert found == [1, 0] and {type(label) for label in found} == {int}


@pytest.mark.parametrize("flags, message", [
    (["--data", "nowhere/at/all"], "no such folder"), (["--data", "empty"], "no train file"), (["--data", "columns"], "has the columns text, label"),
    (["--data", "unlabelled"], "label is -1"), (["--targets", "q_porj"], "'q_porj' matches no linear layer"), (["--head", "top"], "also_train 'top'"),
    (["--model", "./none"], "no such folder"), (["--adapter", "nowhere"], "names no base model")])
def test_bad_input_to_sst2_is_a_clear_error(flags, message, encoder, workdir):
    """Folders, columns, labels, targets: each must be a ValueError that names it."""
    for name, row in (("columns", {"text": "a", "label": 1}), ("unlabelled", {"sentence": "a", "label": -1})):
        Path(name).mkdir()
        for split in ("train", "validation"):
            (Path(name) / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    Path("empty").mkdir()
    args = sst2(encoder, *flags)
    args.model = None if "--adapter" in flags else args.model
    with pytest.raises(ValueError, match=message):
        train_sst2.main(args)


def test_runs_with_other_flags_keep_their_own_adapters(encoder, workdir):
    """Two runs that differ in a flag alone must not share a folder; the same run done again writes where it wrote."""
    args = ["--ranks", "2", "--nb-samples", "32"]
    first, = train_sst2.main(sst2(encoder, *args))
    whole = Path(first["adapter"], "adapter_model.safetensors").read_bytes()
    other, = train_sst2.main(sst2(encoder, *args, "--targets", "all-linear"))
    assert other["adapter"] == first["adapter"] + "-2" and Path(first["adapter"], "adapter_model.safetensors").read_bytes() == whole
    Path("results/sst2.jsonl").unlink()
    again, = train_sst2.main(sst2(encoder, *args))
    assert again["adapter"] == first["adapter"] and Path(first["adapter"], "adapter_model.safetensors").read_bytes() == whole


def test_a_model_that_is_no_known_encoder_lists_its_layers(tiny, encoder, workdir):
    """A decoder without --targets and --head must be refused with the linear layers that it has; ranks below 1 by the parser."""
    with pytest.raises(ValueError, match="is of type llama.*give --targets and --head.*q_proj"):
        train_sst2.main(sst2(encoder, "--model", str(tiny / "base")))
    with pytest.raises(SystemExit):
        train_sst2.parse_args(["--ranks", "4", "0"])
    with pytest.raises(SystemExit):
        train_sst2.parse_args(["--ranks"])


# --- the command lines, the README ---

@pytest.mark.parametrize("flags, culprit", [
    (["--r", "0"], "--r"), (["--r", "two"], "--r"), (["--batch-size", "0"], "--batch-size"), (["--grad-accum", "-1"], "--grad-accum"),
    (["--dropout", "1"], "--dropout"), (["--dropout", "nan"], "--dropout"), (["--lr", "nan"], "--lr"), (["--lr", "-1"], "--lr"), (["--lr", "inf"], "--lr"),
    (["--alpha", "inf"], "--alpha"), (["--dtype", "float8"], "--dtype"), (["--run-name", "../up"], "--run-name"), (["--run-name", "a/b"], "--run-name"),
    (["--run-name", ""], "--run-name"), (["--max-length", "1"], "--max-length"), (["--targets"], "--targets"), (["--rank", "4"], "--rank"), (["--vram", "0"], "--vram")])
def test_flags_out_of_range_are_one_line_and_exit_code_2(flags, culprit, capsys):
    """argparse must answer with one line that names the flag, and no usage block."""
    with pytest.raises(SystemExit) as stopped:
        train_math.parse_args(flags)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and culprit in err


@pytest.mark.parametrize("flags, message", [(["--targets", "q_porj"], "'q_porj' matches no linear layer"), (["--device", "cuda:9"], "--device cuda:9"),
                                            (["--max-length", "4"], "leaves no row"), (["--vram", "4"], "--vram 4 caps the CUDA allocator"),
                                            (["--data", "none.jsonl"], "no such file"), (["--model", "./none"], "no such folder")])
def test_bad_input_to_training_is_a_clear_error(flags, message, tiny, workdir):
    """What a flag or a file can cause must be a ValueError that names it, before anything is written."""
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tiny, *flags)
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("script, flags", [("train_math.py", ["--data", "none.jsonl"]), ("eval_gsm8k.py", ["--data", "none.jsonl"])])
def test_scripts_end_in_one_line_without_traceback(script, flags, workdir):
    """From the shell: exit code 2, one line on stderr."""
    done = subprocess.run([sys.executable, str(HERE / script), *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.jsonl" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_vram_caps_the_allocator_of_the_device_that_was_picked(device, monkeypatch, capsys):
    """torch's call takes no device without a number, and "cuda" is what --device auto picks; no GPU here, so what it hands on is looked at."""
    capped = {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: argparse.Namespace(total_memory=16 * 2**30))
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda fraction, index: capped.update({index: fraction}), raising=False)
    train_math.limit_vram(4.0, torch.device(device))
    assert capped == {0: 3.5 / 16} and "3.5 GiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--vram 24 is above this card's own 16.0 GiB"):
        train_math.limit_vram(24.0, torch.device(device))


def test_a_tied_head_as_target_is_refused_by_the_script(tiny, workdir):
    """--targets lm_head on a model with tied embeddings must be refused with the reason."""
    model, tokenizer = load(tiny)
    LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})).save_pretrained("tied")
    tokenizer.save_pretrained("tied")
    with pytest.raises(ValueError, match="shares its weight"):
        run(tiny, "--model", "tied", "--targets", "lm_head")


README = (HERE / "README.md").read_text(encoding="utf8")
PARSERS = {"train_math.py": train_math.parse_args, "eval_gsm8k.py": eval_gsm8k.parse_args, "train_sst2.py": train_sst2.parse_args}


def test_every_command_in_the_readme_parses():
    """Each `python x.py ...` in the README must go through that script's parser."""
    commands = re.findall(r"(?:python|torchrun [^\n]* --) (\w+\.py)([^\n`#&|]*)", README.replace("\\\n", " "))
    assert len(commands) >= 6
    for script, flags in commands:
        if script in PARSERS:
            PARSERS[script](shlex.split(flags))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.q_proj, self.k_proj, self.v_proj, self.out = nn.LayerNorm(d), *(nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(F.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), is_causal=True))


class SmallGPT(nn.Module):
    """A GPT of one's own: no transformers, no config."""
    def __init__(self, vocabulary=20, d=16):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.blocks, self.head = nn.Embedding(vocabulary, d), nn.ModuleList(Block(d) for _ in range(2)), nn.Linear(d, vocabulary)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_the_readme_s_lines_adapt_a_gpt_of_one_s_own(workdir):
    """The README's snippet, run as it stands there on a model that is no transformers model, must train and come back merged."""
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "inject_lora" in block)
    ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []

    def loss_of(model, batch):
        losses.append(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))
        return losses[-1]
    scope = {"MyModel": SmallGPT, "batches": [ids] * 60, "loss_of": loss_of}
    exec(snippet, scope)
    assert losses[-1] < 0.9 * losses[0] and not list(lora_layers(scope["model"]))
    torch.testing.assert_close(loss_of(scope["model"], ids), losses[-1], atol=0.1, rtol=0)
