"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685), in one file.

    h = W0 x + (alpha / r) B A x                                                              Eq. 3

    paper    here            shape      trained
    W0       base.weight     (d, k)     never
    A        lora_A          (r, k)     yes, random start
    B        lora_B          (d, r)     yes, zero start: step 0 is the base model, bit for bit
    alpha/r  scaling         scalar     no
    r        r               scalar     the rank, far below min(d, k)

Use, in any PyTorch model that calls its linear layers:

    config = LoRAConfig(r=8, alpha=16, targets=("q_proj", "v_proj"))
    inject_lora(model, config)                                     # freezes the model, wraps its layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    ...                                                            # train as ever
    save_adapter(model, config, "my-adapter")                      # a few MB, in PEFT's format
    load_adapter(model, "my-adapter")                              # later; build optimizers after this, it makes new A and B
    merge_lora(model); strip_lora(model)                           # back to plain dense layers
    quantize_nf4(model)                                            # before all this: the base in 4 bits (QLoRA)

Differences from the paper
- A starts as nn.Linear does (Kaiming uniform, a = sqrt(5)), as the authors' released code has it; the paper says Gaussian.
- Dropout on the adapter's input is the released code's; the paper's equations have none.
- Merging happens when it is called. The released code merges inside eval(), where a checkpoint saved at the wrong moment
  holds W0 + BA under W0's name; here state_dict() and save_adapter refuse while merged.
- A fused projection (GPT-2's c_attn) is adapted whole; the released code can adapt its q and v thirds alone.
- rslora divides by sqrt(r) instead of r (Kalajdzievski 2023, arXiv:2312.03732).
"""
import json
import math
import os
import sys
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# --- configuration ---

@dataclass(frozen=True)
class LoRAConfig:
    """What is adapted, and how.

    r           rank of the update (Sec. 4.1)
    alpha       scale of the update: scaling = alpha / r, or alpha / sqrt(r) with rslora
    dropout     probability, on the adapter's input only
    targets     dotted name endings of the linear layers to adapt, or "all-linear" for all but the output head
    also_train  dotted name endings of modules trained in full and saved along, such as a fresh classifier
    Raises ValueError for a value out of range.
    """
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    also_train: tuple[str, ...] = ()
    rslora: bool = False

    def __post_init__(self):
        if not (type(self.r) is int and self.r >= 1):               # type, not isinstance: True is an int
            raise ValueError(f"r is {self.r!r}: expected a whole number of at least 1")
        if not (type(self.alpha) in (int, float) and 0 < self.alpha <= sys.float_info.max):
            raise ValueError(f"alpha is {self.alpha!r}: expected a positive finite number")
        if not (type(self.dropout) in (int, float) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout is {self.dropout!r}: expected a probability from 0 up to, not including, 1")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora is {self.rslora!r}: expected True or False")
        for field in ("targets", "also_train"):         # lists and single names become tuples; "all-linear" stays
            value = getattr(self, field)
            value = (value,) if isinstance(value, str) else tuple(value or ())
            if not all(isinstance(name, str) and name for name in value) or (field == "targets" and not value):
                raise ValueError(f"{field} is {value!r}: expected names of modules")
            if "all-linear" in value and (len(value) > 1 or field != "targets"):
                raise ValueError(f"{field} is {value!r}: all-linear stands alone, in targets")
            object.__setattr__(self, field, "all-linear" if field == "targets" and value == ("all-linear",) else value)

    @property
    def scaling(self) -> float:
        # Sec. 4.1: dividing by r keeps one learning rate usable when r changes
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


# --- the layer ---

def is_linear(module: nn.Module) -> bool:
    """nn.Linear, anything that states in_features and out_features (4-bit layers), or GPT-2's Conv1D."""
    if isinstance(module, (LoRALinear, NF4Linear)):     # whose weight is computed when it is asked for
        return True
    weight = getattr(module, "weight", None)
    return (isinstance(weight, torch.Tensor) and not nn.parameter.is_lazy(weight)
            and (is_conv1d(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))))


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and module.weight.dim() == 2       # transformers' class; its weight is (k, d)


class LoRALinear(nn.Module):
    """y = base(x) + B(A(dropout(x)) * scaling), Eq. 3, around a frozen linear layer of any kind.

    base        (..., k) -> (..., d); its parameters are frozen here
    lora_A      (r, k) and lora_B (d, r), always fp32, cast to x's dtype in forward: late in a schedule an update of 3e-5 on a
                weight of 0.02 is below half a bf16 step and would be rounded away. Change a model's dtype before wrapping it.
    scaling     alpha / r, or alpha / sqrt(r) with rslora
    Raises ValueError for values out of range, RuntimeError in forward when trained while merged.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.scaling = LoRAConfig(r=r, alpha=alpha, dropout=dropout, rslora=rslora).scaling
        self.base = base.requires_grad_(False)
        self.transposed = base.transposed if isinstance(base, NF4Linear) else is_conv1d(base)
        self.out_features, self.in_features = d, k = _features(base)
        device = (base.codes if isinstance(base, NF4Linear) else base.weight).device
        self.lora_A = nn.Parameter(torch.empty(r, k, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(d, r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))       # uniform within 1 / sqrt(k)
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        self.unmerged = None                                        # while merged: the untouched W0, on the CPU, or the 4-bit base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("this LoRA layer is merged and would not train: call unmerge_lora(model) to train, "
                               "or model.eval() to infer")
        if self.merged or not self.enabled:
            return self.base(x)                                     # (..., k) -> (..., d)
        z = F.linear(self.dropout(x), self.lora_A.to(x.dtype))      # (..., k) -> (..., r)
        # the scale is applied r wide, not d wide. B = 0 makes dL/dA zero at step 1: A gets its first gradient at step 2
        update = F.linear(z * self.scaling, self.lora_B.to(x.dtype))        # (..., r) -> (..., d)
        # The large product last: backward does not need its result, so a recomputed block that ends in this layer stops before it.
        return self.base(x) + update

    @property
    def merged(self) -> bool:
        return self.unmerged is not None

    def delta(self) -> torch.Tensor:
        """The update scaling * B A in fp32, shaped like base.weight: (d, k), or (k, d) over Conv1D."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            delta = self.scaling * (self.lora_B.detach() @ self.lora_A.detach())
        return delta.T if self.transposed else delta

    def merge(self) -> None:
        """W = W0 + scaling B A, summed in fp32 and rounded once to W0's dtype. Forward is then the base's own (Sec. 4.1);
        the untouched W0 stays on the CPU until unmerge, or strip_lora. An NF4 base becomes a dense one: W0 is what was trained on."""
        if self.merged:
            return
        if not self.enabled:
            raise RuntimeError("the adapter is switched off: merge outside of disable_lora")
        base = self.base.dense() if isinstance(self.base, NF4Linear) else self.base
        if "weight" not in base._parameters or not base.weight.is_floating_point():
            raise ValueError(f"cannot merge into {type(base).__name__}: its weight is {base.weight.dtype} or is computed "
                             "(weight_norm, quantisation); load the base with plain weights to merge")
        weight = base.weight.detach()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta()
        # the 4-bit base stands in a list, so that it is no submodule
        self.unmerged = weight.to("cpu", copy=True) if base is self.base else [self.base]
        weight.copy_(merged)
        self.base = base

    def unmerge(self) -> None:
        """W0 comes back bit for bit. W - scaling B A would not do that: (a + b) - b is not a in floating point."""
        if isinstance(self.unmerged, list):
            self.base = self.unmerged[0].to(self.base.weight.device)
        elif self.merged:
            self.base.weight.detach().copy_(self.unmerged)
        self.unmerged = None

    # for code that looks at the layer it thinks it has
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def _save_to_state_dict(self, *args):
        if self.merged:
            raise RuntimeError("a state_dict with merged weights and their adapter would apply it twice when loaded: call "
                               "unmerge_lora(model) or strip_lora(model) first")
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args):
        if self.merged:
            raise RuntimeError("a state_dict cannot be loaded into merged weights: call unmerge_lora(model) or strip_lora(model) first")
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, merged={self.merged}"


# --- injection ---

def inject_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freezes every parameter, wraps the target layers, makes the modules of also_train trainable (Sec. 4.2).

    Returns the names of the wrapped layers. Raises ValueError, with the model untouched, when a target matches nothing,
    when a weight is shared with another module, or when the model carries an adapter already.
    """
    if next(lora_layers(model), None):
        raise ValueError("the model carries an adapter already: call strip_lora(model) first, or load_adapter to replace it")
    names, full = match_targets(model, config), match_modules(model, config.also_train)
    if not names:
        raise ValueError("there is no linear layer to adapt in this model")
    _refuse_unsafe(model, names, full)
    _wrap(model, names, full, config)
    if half := [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)]:
        warnings.warn(f"{half[0]} trains in {model.get_parameter(half[0]).dtype}, where most small updates round away: load the model in float32")
    return names


def lora_layers(model: nn.Module):
    """Yields (name, LoRALinear) for every wrapped layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def linear_layers(model: nn.Module, outside=()) -> dict[str, nn.Module]:
    """{name: layer} of the linear layers, a wrapped one under the name its base had; none inside the modules `outside`."""
    bases = {id(layer.base) for _, layer in lora_layers(model)}
    return {name: module for name, module in model.named_modules() if name and is_linear(module) and id(module) not in bases
            and not any(f"{name}.".startswith(f"{other}.") for other in outside)}


def _matching(names, endings) -> list[str]:
    """Names that end in one of the endings, by whole dotted parts: q_proj is not the end of eq_proj."""
    return [name for name in names if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def match_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the layers that config.targets means in this model. ValueError names a target that matches none."""
    linears = linear_layers(model, outside=match_modules(model, config.also_train))
    if config.targets == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [name for name, layer in linears.items()
                if not (layer is head or (head is None and _matching([name], ["lm_head"])))]
    for target in config.targets:
        if not _matching(linears, [target]):
            raise ValueError(f"target {target!r} matches no linear layer; this model has: {', '.join(short_names(linears))}")
    return _matching(linears, config.targets)


def match_modules(model: nn.Module, endings) -> list[str]:
    """The names of the modules that also_train means; ValueError names one that matches no module with weights."""
    modules = {name: module for name, module in model.named_modules() if name and any(True for _ in chain(module.parameters(), module.buffers()))}
    for ending in endings:
        if not _matching(modules, [ending]):
            raise ValueError(f"also_train {ending!r} matches no module with weights; at the top this model has: "
                             f"{', '.join(name for name in modules if '.' not in name)}")
    return _matching(modules, endings)


def short_names(names) -> list[str]:
    """The distinct last parts of dotted names, for messages and adapter_config.json; a bare index keeps its parent."""
    return sorted({".".join(name.split(".")[-2:]) if name.split(".")[-1].isdigit() else name.split(".")[-1] for name in names})


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """{id of a parameter: names of the modules that hold it}. By identity: data_ptr() is 0 for every tensor on the meta device."""
    owners = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(name)
    return owners


def _refuse_unsafe(model: nn.Module, names, full) -> None:
    """ValueError for layers in which an adapter would change more than it says, or nothing at all."""
    owners, modules = _owners(model), dict(model.named_modules())
    for name in [*names, *full]:
        for parameter in modules[name].parameters():
            if len(owners[id(parameter)]) > 1:
                raise ValueError(f"{name} shares its weight with {', '.join(sorted(owners[id(parameter)] - {name}))} (tied): adapting one "
                                 "would change the other; choose other layers, or untie them first by giving one its own copy")
        if name in full and any(isinstance(module, NF4Linear) for module in modules[name].modules()):
            raise ValueError(f"{name} is in 4 bits and cannot train: name it in the skip of quantize_nf4")
        if name in full and any(True for _ in modules[name].buffers()):
            raise ValueError(f"{name} has buffers (running statistics), which an adapter file does not hold: it cannot be in also_train")
    for name in names:                      # these read .weight instead of calling the layer: the adapter would be skipped
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(f"{name} is inside nn.MultiheadAttention, which never calls it: the adapter would do nothing; "
                             "choose other targets, or attention with separate projections")
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise ValueError(f"{name} is inside nn.TransformerEncoderLayer, whose fast path in eval() would skip the adapter; "
                             "call torch.backends.mha.set_fastpath_enabled(False) first")


def _replace(model: nn.Module, pairs) -> None:
    """Puts each (old, new) module's new one in all the places of the old: one module may stand under two names."""
    new = {id(old): module for old, module in pairs}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = new.get(id(child), child)


def _wrap(model: nn.Module, names, full, config: LoRAConfig) -> None:
    modules = dict(model.named_modules())
    layers = [LoRALinear(modules[name], config.r, config.alpha, config.dropout, config.rslora).train(modules[name].training) for name in names]
    model.requires_grad_(False)
    _replace(model, [(layer.base, layer) for layer in layers])
    for name in full:                       # the untouched copy comes back when load_adapter replaces this adapter
        modules[name].lora_untouched = {key: p.detach().to("meta" if p.is_meta else "cpu", copy=True)
                                        for key, p in modules[name].named_parameters()}
        modules[name].requires_grad_(True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) numbers of weights; a shared tensor counts once, a 4-bit weight like any other."""
    parameters = list(model.parameters())
    packed = sum(module.out_features * module.in_features for module in model.modules() if isinstance(module, NF4Linear))
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + packed


# --- merge, switch off, take off ---

@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds every update to its base weight, or on an error none. A second call changes nothing."""
    try:
        for _, layer in lora_layers(model):
            layer.merge()
    except Exception:
        unmerge_lora(model)
        raise


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Restores every base weight bit for bit, in any dtype."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def strip_lora(model: nn.Module) -> nn.Module:
    """Takes the wrappers off, merged or not: plain layers, the original state_dict keys. Modules trained in full stay so.

    Returns the model, which is also changed in place. It stays frozen.
    """
    _replace(model, [(layer, layer.base) for _, layer in lora_layers(model)])
    for module in model.modules():
        module.__dict__.pop("lora_untouched", None)
    return model.base if isinstance(model, LoRALinear) else model


@contextmanager
def disable_lora(model: nn.Module):
    """Inside `with disable_lora(model):` the model is its base again. Modules trained in full stay as trained."""
    layers = [layer for _, layer in lora_layers(model)]
    if any(layer.merged for layer in layers):
        raise RuntimeError("the adapter is merged into the base weights: call unmerge_lora(model) before disable_lora(model)")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


# --- a 4-bit base: NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) ---

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (their Appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
BLOCK, GROUP = 64, 256      # weights that share an absmax; absmaxes that share a range (their Sec. 3, "double quantization")
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


class NF4Linear(nn.Module):
    """A frozen linear layer in 4.13 bits a weight: W flattened in blocks of 64, each value the nearest of NF4 times its block's absmax.

    codes   (bytes,) uint8, two codes a byte
    absmax  (groups, 256) uint8: log2 of a block's absmax, in 255 even steps over its group. The paper has 8-bit floats around
            the mean; even steps of the logarithm serve the common blocks as well where one outlier stretches the group
    range   (groups, 2) fp32: the least log2 and the step
    bias    as it was
    Computes in x's dtype. `weight` is W, dequantised at each look. Raises ValueError for a weight that is not finite.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.out_features, self.in_features = _features(layer)
        self.transposed, self.kind, self.dtype = is_conv1d(layer), type(layer), layer.weight.dtype
        self.bias = layer.bias if layer.bias is None else layer.bias.requires_grad_(False)
        w, tiny = layer.weight.detach().flatten().float(), torch.finfo(torch.float32).tiny
        blocks = F.pad(w, (0, -len(w) % BLOCK)).view(-1, BLOCK)         # the last block may be short: zeros fill it up
        absmax = blocks.abs().amax(1)
        if not absmax.isfinite().all():
            raise ValueError("the weight holds NaN or infinity, which have no 4-bit code")
        groups = torch.cat([absmax, absmax[-1:].expand(-len(absmax) % GROUP)]).view(-1, GROUP)
        groups = groups.maximum(groups.amax(1, keepdim=True) / 4096).clamp(min=tiny)    # far below its group's largest a block becomes 0
        blocks = blocks / groups.flatten()[:len(blocks), None]
        codes = sum((blocks > (low + high) / 2).byte() for low, high in zip(NF4, NF4[1:])).view(-1, 2)     # the nearest value's place
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1])
        logs = groups.log2()
        least, most = logs.amin(1, keepdim=True), logs.amax(1, keepdim=True)
        self.register_buffer("absmax", ((logs - least) / (most - least).clamp(min=tiny) * 255).round().byte())
        self.register_buffer("range", torch.cat([least, (most - least) / 255], dim=1))
        self.train(layer.training)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """W, shaped as it was: (d, k), or (k, d) over Conv1D."""
        if dtype not in HALF_AND_SINGLE:
            return self.dequantize(torch.float32).to(dtype)
        # A byte's two values are fetched at once, as one number of twice the width: the index costs 2 bytes a weight, not 8.
        w = _nf4_pairs(dtype, self.codes.device).index_select(0, self.codes.int()).view(dtype).view(-1, BLOCK)
        absmax = torch.exp2(self.range[:, :1] + self.range[:, 1:] * self.absmax).flatten()[:len(w), None]
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return w.mul_(absmax.to(dtype)).flatten()[:shape[0] * shape[1]].view(shape)

    weight = property(lambda self: self.dequantize(self.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _NF4Product.apply(x, self)

    def dense(self) -> nn.Module:
        """A plain layer of the kind that was quantised, with the rounded values."""
        with torch.device("meta"):
            layer = self.kind(*((self.out_features, self.in_features) if self.transposed else (self.in_features, self.out_features)))
        layer.weight, layer.bias = nn.Parameter(self.weight, requires_grad=False), self.bias
        return layer.train(self.training)

    def _apply(self, fn, recurse=True):     # .half() and the like change what it computes in, and never round the range
        kept, self.dtype = self.range, fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        self.range = kept.to(self.range.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _NF4Product(torch.autograd.Function):
    """x W^T + b, which keeps nothing for backward: W is frozen, so x is not needed, and W is dequantised again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        w = layer.dequantize(x.dtype)
        return F.linear(x, w.T if layer.transposed else w, layer.bias if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        w = ctx.layer.dequantize(gradient.dtype)
        return gradient @ (w.T if ctx.layer.transposed else w), None


@cache
def _nf4_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256,): for every byte its two values side by side, viewed as one number."""
    pairs = torch.tensor([(first, second) for first in NF4 for second in NF4], dtype=dtype, device=device)
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32).flatten()


@torch.no_grad()
def quantize_nf4(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> list[str]:
    """Puts an NF4Linear in place of every linear layer but the output head and those whose names end in one of `skip`.

    Call it while the half-precision model is on the CPU, then move the model: the device never holds a dense layer. Adapters come
    after it. Embeddings stay dense; so do, with a warning that says why, tied layers and those that are read and never called.
    Returns the names. Raises ValueError, with the model untouched, when there is nothing to quantise or a layer cannot be.
    """
    if next(lora_layers(model), None):
        raise ValueError("the model carries an adapter: quantise the base first, then inject or load the adapter")
    owners, modules, head, names = _owners(model), dict(model.named_modules()), getattr(model, "get_output_embeddings", lambda: None)(), []
    linears = {name: layer for name, layer in linear_layers(model).items() if not (isinstance(layer, NF4Linear) or _matching([name], skip))}
    for name, layer in linears.items():
        parent, reason = modules[name.rpartition(".")[0]], None
        if len(shared := owners[id(layer.weight)]) > 1:
            reason = f"it shares its weight with {', '.join(sorted(shared - {name}))} (tied)"
        elif (type(layer) is not nn.Linear and not is_conv1d(layer)) or layer.weight.is_meta or layer.weight.dtype not in HALF_AND_SINGLE:
            reason = f"it is a {type(layer).__name__} of {layer.weight.dtype} on {layer.weight.device}"
        elif isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            reason = f"{type(parent).__name__} reads its weight without calling it"
        elif not layer.weight.isfinite().all():
            raise ValueError(f"the weight of {name} holds NaN or infinity, which have no 4-bit code: is the model damaged?")
        if layer is not head and reason:
            warnings.warn(f"{name} is not quantised: {reason}")
        elif layer is not head:
            names.append(name)
    if not names:
        raise ValueError("there is no linear layer to quantise in this model")
    for name in names:                      # one at a time: the dense weight is freed before the next is quantised
        modules.pop(name)
        _replace(model, [(linears[name], NF4Linear(linears.pop(name)))])
    return names


def dequantize_nf4(model: nn.Module) -> None:
    """The way back to plain layers, which hold the rounded values."""
    _replace(model, [(module, module.dense()) for module in model.modules() if isinstance(module, NF4Linear)])


# --- adapter files, in PEFT's format ---

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

# Options of PEFT's file that this code understands, or that do not change what the weights mean. Any other must be inactive.
KNOWN = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "fan_in_fan_out", "use_rslora",
         "bias", "init_lora_weights", "task_type", "base_model_name_or_path", "inference_mode", "revision", "peft_version",
         "auto_mapping", "megatron_core", "qalora_group_size", "layers_to_transform", "layers_pattern", "exclude_modules"}


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """{parameter name: tensor} of exactly what trains: every lora_A and lora_B, and the modules of also_train."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: nn.Module, config: LoRAConfig, folder) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT and load_adapter read.

    Each file is written beside its place, flushed, and renamed: a crash leaves no half adapter that would load.
    Raises RuntimeError while merged, ValueError when config is not the one that was injected.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    model = _unwrap(model)
    layers, tensors = dict(lora_layers(model)), {}
    if not layers:
        raise ValueError("the model carries no adapter to save: call inject_lora(model, config) first")
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError("the adapter is merged: call unmerge_lora(model) before save_adapter")
        if (layer.lora_A.shape[0], layer.scaling) != (config.r, config.scaling):
            raise ValueError(f"{name} has r={layer.lora_A.shape[0]}, scaling={layer.scaling:g}, the config says r={config.r}, "
                             f"scaling={config.scaling:g}: pass the config that was injected")
        tensors |= {f"{PREFIX}{name}.lora_{x}.weight": getattr(layer, f"lora_{x}").detach() for x in "AB"}
    full = match_modules(model, config.also_train)
    for name in full:                       # all of it, also if it was frozen again after training
        if not hasattr(model.get_submodule(name), "lora_untouched"):
            raise ValueError(f"{name} is in also_train but was not when the adapter was injected: pass the config that was injected")
        tensors |= {f"{PREFIX}{name}.{key}": parameter.detach() for key, parameter in model.get_submodule(name).named_parameters()}
    for name in adapter_state_dict(model):
        if PREFIX + name not in tensors and name.rpartition(".")[0] not in layers:
            raise ValueError(f"{name} trains but is not in also_train, so it would not be loaded again: name its module there")
    # all-linear is saved as the names it matched: PEFT and vLLM read those words each in its own way
    targets = _exact_targets(model, config.targets, layers, full)
    described = {
        "peft_type": "LORA", "task_type": _task_type(model), "base_model_name_or_path": _base_name(model), "inference_mode": True,
        "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_rslora": config.rslora,
        "target_modules": list(targets), "modules_to_save": list(config.also_train) or None, "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in layers.values())}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = {name: folder / f"{name}.part" for name in (WEIGHTS, CONFIG)}
    try:
        save_file({key: tensor.to("cpu").contiguous() for key, tensor in tensors.items()}, part[WEIGHTS], metadata={"format": "pt"})
    except SafetensorError as error:        # a full disk, say
        raise OSError(f"{part[WEIGHTS]}: {error}") from None
    part[CONFIG].write_text(json.dumps(described, indent=2) + "\n", encoding="utf8")
    for path in part.values():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    (folder / CONFIG).unlink(missing_ok=True)       # never old config beside new weights: no adapter for a moment instead
    for name in (WEIGHTS, CONFIG):
        os.replace(part[name], folder / name)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's or DataParallel's wrapper, whose prefixes no other reader of a file would know."""
    while type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else "SEQ_CLS" if name.endswith("ForSequenceClassification") else None


def load_adapter(model: nn.Module, folder) -> LoRAConfig:
    """Puts the adapter of a folder onto the model, in place of any that it carries. Returns its config.

    Reads safetensors and JSON only: nothing in a stranger's file is run. The keys in the file decide what is wrapped. A and B
    are fp32 whatever the file holds, and require grad; the base is frozen. On any ValueError the model is as it was.
    """
    model, folder = _unwrap(model), Path(folder)
    old = [(layer, layer.base) for _, layer in lora_layers(model)]
    if not all(layer.enabled for layer, _ in old):
        raise RuntimeError("the adapter is switched off: load another outside of disable_lora")
    _replace(model, old)                                            # the file is compared with the plain model
    try:
        config, described = _read_config(model, folder)
        full = match_modules(model, config.also_train)
        tensors = _read_weights(model, folder, config, full)
        linears, listed = linear_layers(model, outside=full), described.get("target_modules")
        names = [name for name in linears if f"{PREFIX}{name}.lora_A.weight" in tensors]
        narrowed = any(described.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
        exact = not isinstance(listed, list) or narrowed or set(listed) == set(names)
        if not exact and (odd := set(_matching(linears, listed)) ^ set(names)):
            raise ValueError(f"{folder}: {CONFIG} targets {', '.join(listed)}, {WEIGHTS} disagrees on {_some(sorted(odd))}: copy both again")
        _refuse_unsafe(model, names, full)
    except BaseException:
        _replace(model, [(base, layer) for layer, base in old])
        raise

    # All is checked. From here on the model changes.
    for layer, base in old:
        layer.unmerge()
    _replace(model, [(base, layer.base) for layer, base in old])    # over NF4 a merged base was a dense one
    for module in model.modules():          # a head that the last adapter trained goes back to what it was
        for key, original in module.__dict__.pop("lora_untouched", {}).items():
            module.get_parameter(key).detach().copy_(original)
    config = replace(config, targets=_exact_targets(model, listed, names, full))
    _wrap(model, names, full, config)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        model.get_parameter(name.removesuffix(".weight") if name.endswith((".lora_A.weight", ".lora_B.weight")) else name).detach().copy_(tensor)
    if not any(layer.lora_B.any() for _, layer in lora_layers(model)):
        warnings.warn(f"{folder}: every lora_B is zero, so this adapter changes nothing: was it saved before training?")
    here, there = _base_name(model), described.get("base_model_name_or_path")
    if here and there and Path(here).name != Path(there).name:
        warnings.warn(f"{folder} was trained on {there}, this model is {here}: its answers may be worthless here")
    return config


def _read_config(model: nn.Module, folder: Path) -> tuple[LoRAConfig, dict]:
    """adapter_config.json as (config, all that it says), once every option in it is known to be one that this code honours."""
    path = folder / CONFIG
    if not path.is_file():
        steps = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}") if p.parent.suffix != ".part")
        raise ValueError(f"{folder}: no such adapter folder" if not folder.is_dir() else f"{folder} has no {CONFIG}" +
                         (f"; did you mean one of its checkpoints: {_some(steps)}?" if steps else ": it is no adapter, or an incomplete one"))
    try:
        if path.stat().st_size > 2**20:
            raise ValueError("larger than 1 MiB")
        described = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(described, dict):
            raise ValueError(f"a {type(described).__name__}, expected an object")
        if described.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {described.get('peft_type')!r}, expected 'LORA'")
        if described.get("bias") not in ("none", None):
            raise ValueError(f"bias is {described['bias']!r}: trained biases are not supported; train with bias='none'")
        if described.get("init_lora_weights") not in (True, False, None, "gaussian", "orthogonal", "eva"):
            raise ValueError(f"init_lora_weights is {described['init_lora_weights']!r}, which changed the base weights: "
                             "let PEFT convert it to a plain LoRA (path_initial_model_for_weight_conversion)")
        for key, value in described.items():
            if key not in KNOWN and not (value is None or value is False or value in ("", [], {})):
                raise ValueError(f"the option {key} = {value!r} is not supported here: load this adapter with PEFT")
        listed, saved = described.get("target_modules"), described.get("modules_to_save") or []
        for key, value in (("target_modules", [] if listed is None or isinstance(listed, str) else listed), ("modules_to_save", saved)):
            if not (isinstance(value, list) and all(isinstance(name, str) and name for name in value)):
                raise ValueError(f"{key} is {value!r}, expected a list of names")
        for key, kind in (("r", int), ("lora_alpha", (int, float)), ("base_model_name_or_path", (str, type(None)))):
            if not isinstance(described.get(key), kind):
                raise ValueError(f"{key} is {described.get(key)!r}: expected what PEFT or save_adapter writes")
        # PEFT lists names in modules_to_save that the model may not have (score beside classifier): those are left out
        present = [name for name in dict.fromkeys(saved) if _matching((n for n, _ in model.named_modules()), [name])]
        return LoRAConfig(r=described["r"], alpha=described["lora_alpha"], dropout=described.get("lora_dropout", 0.0),
                          also_train=tuple(present), rslora=described.get("use_rslora", False)), described
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_weights(model: nn.Module, folder: Path, config: LoRAConfig, full) -> dict[str, torch.Tensor]:
    """{key in the file: tensor}; every key, shape and dtype is compared with the model before any tensor is read."""
    from safetensors import SafetensorError, safe_open
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise ValueError(f"{folder} has no {WEIGHTS}" + (": adapter_model.bin is a pickle, which could run code; save it again "
                                                         "with PEFT's save_pretrained(safe_serialization=True)" if pickled else ""))
    layers, parameters, expected = linear_layers(model, outside=full), dict(model.named_parameters()), {}
    for name in parameters:
        if any(name.startswith(module + ".") for module in full):
            expected[PREFIX + name] = list(parameters[name].shape)
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}
            names = {key.removeprefix(PREFIX)[:-len(".lora_A.weight")] for key in found if key.endswith((".lora_A.weight", ".lora_B.weight"))}
            for name in sorted(names):
                if name not in layers:
                    raise ValueError(f"{path} adapts {name}, which is no linear layer of this model (it has "
                                     f"{', '.join(short_names(layers)) or 'none'}): is it for another base model?")
                d, k = _features(layers[name])
                expected |= {f"{PREFIX}{name}.lora_A.weight": [config.r, k], f"{PREFIX}{name}.lora_B.weight": [d, config.r]}
            if missing := sorted(set(expected) - set(found)):
                raise ValueError(f"{path} lacks {_some(missing)}: it is incomplete; copy it again")
            if extra := sorted(set(found) - set(expected)):
                raise ValueError(f"{path} holds {_some(extra)}, for which this model or {CONFIG} has no place")
            if not names:
                raise ValueError(f"{path} holds no lora_A and lora_B: expected keys like {PREFIX}layers.0.q_proj.lora_A.weight")
            for key, entry in found.items():
                if entry.get_shape() != expected[key]:
                    raise ValueError(f"{path}: {key} has shape {entry.get_shape()}, expected {expected[key]} for this model and "
                                     f"r={config.r}: is it for another base model?")
                if entry.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{path}: {key} is {entry.get_dtype()}, expected F32, F16 or BF16")
            tensors = {key: file.get_tensor(key) for key in found}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({str(error).splitlines()[0]}): copy it again") from None
    for key, tensor in tensors.items():     # A and B become fp32, a module trained in full keeps the model's dtype
        name = key.removeprefix(PREFIX)
        tensors[key] = tensor.to(parameters[name].dtype if name in parameters else torch.float32)
        if not tensors[key].isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinity: the run that wrote it diverged; use an earlier checkpoint")
    return tensors


def _exact_targets(model: nn.Module, preferred, names, full) -> tuple[str, ...]:
    """The first that means exactly these layers: the preferred list, their short names, their whole names."""
    for targets in ([] if isinstance(preferred, str) else preferred or [], short_names(names)):
        if set(_matching(linear_layers(model, outside=full), targets)) == set(names):
            return tuple(targets)
    return tuple(sorted(names))


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _features(layer: nn.Module) -> tuple[int, int]:
    """(d, k) = (out_features, in_features), which Conv1D tells by its (k, d) weight alone."""
    return tuple(layer.weight.shape[::-1]) if is_conv1d(layer) else (layer.out_features, layer.in_features)


def _some(names, most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
