"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

    h = W0 x + (alpha / r) B A x                           Eq. 3, scaled as in Sec. 4.1

    paper      here           shape     trained
    W0         base.weight    (d, k)    never
    A          lora_A         (r, k)    yes, random start
    B          lora_B         (d, r)    yes, zero start: step 0 is the base model, bit for bit
    r          r              number    no, the rank: far below min(d, k)
    alpha / r  scaling        number    no

Use, with any PyTorch model:

    inject_lora(model, LoRAConfig(r=8, alpha=16, targets=("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ...                                 # your training loop
    save_adapter(model, "my-adapter")   # a few MB, in PEFT's format

    load_adapter(model, "my-adapter")   # later, onto the same base
    merge_lora(model)                   # plain layers with W0 + scaling B A: no extra latency
    strip_lora(model)                   # forget the adapter, keep the merged weights

On a first reading, stop at "which layers can be adapted, and merged". The appendix, a 4-bit base,
can be deleted: nothing before it needs it.

Differences from the paper and the authors' code
- As in the authors' code, A starts like nn.Linear's weight, and its input passes dropout. In the
  paper A is Gaussian, and Eq. 3 has no dropout.
- The paper subtracts B A to get W0 back, which rounding makes inexact. Here W0 is kept.
- Merging is a call. The authors' code merges inside eval(), so that the mode decides whether a
  checkpoint holds W0 or W0 + B A.
"""
import json
import math
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- configuration ---

@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how. Raises ValueError for a value out of range.

    r           rank of the update (Sec. 4.1)
    alpha       the update is scaled by alpha / r
    dropout     probability, on the adapter's input
    targets     endings of module names, in whole parts: "q_proj", "self_attn.q_proj". Or
                "all-linear": all linear layers but tied layers, routers and the output head (that
                of a model of transformers, or one called lm_head)
    also_train  endings of names of modules to train in full and save along: a new classifier
    rslora      scale by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732)
    """
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    also_train: tuple[str, ...] = ()
    rslora: bool = False

    def __post_init__(self):
        for field in ("targets", "also_train"):
            names = getattr(self, field) or ()
            object.__setattr__(self, field, (names,) if isinstance(names, str) else tuple(names))
        in_range = {
            "r": isinstance(self.r, Integral) and self.r >= 1 and self.r is not True,
            "alpha": isinstance(self.alpha, Real) and 0 < self.alpha < 1e30,  # no NaN or infinity
            "dropout": isinstance(self.dropout, Real) and 0 <= self.dropout < 1,
            "targets": bool(self.targets),
            "rslora": isinstance(self.rslora, bool)}
        for field, valid in in_range.items():
            if not valid:
                raise ValueError(f"{field} = {getattr(self, field)!r} is out of range")
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise ValueError(f"targets = {self.targets}: all-linear has to stand alone")

    @property
    def scaling(self):
        # Sec. 4.1: dividing by r keeps the learning rate usable when r changes
        return float(self.alpha / (math.sqrt(self.r) if self.rslora else self.r))


# --- the layer ---

class LoRALinear(nn.Module):
    """h = W0 x + scaling * B A x (Eq. 3): a low-rank update beside a frozen linear layer.

    Maps (..., k) to (..., d), in x's dtype, or autocast's. A and B are kept in fp32 whatever the
    base's dtype, because small updates round away in 16 bits: in bf16, 0.02 + 3e-5 is 0.02 again.

    A variant is a subclass. It overrides forward(), and merged_weight(), the weight of a plain
    layer that computes the same. It adds its tensors to adapter_parameters(), and names in
    `options` what it adds to adapter_config.json. load_adapter builds one over an nn.Linear on the
    meta device, to learn the tensors' shapes.
    """
    options = {}

    def __init__(self, base, config):
        super().__init__()
        self.config = config
        self.base = base.requires_grad_(False)
        self.out_features, self.in_features = d, k = features(base)
        device = device_of(base)
        self.lora_A = nn.Parameter(torch.empty(config.r, k, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(d, config.r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within 1 / sqrt(k)
        self.dropout = nn.Dropout(config.dropout)
        self.train(base.training)

    def forward(self, x):
        z = F.linear(self.dropout(x), self.lora_A.to(x.dtype))        # (..., k) -> (..., r)
        update = F.linear(self.scaling * z, self.lora_B.to(x.dtype))  # (..., r) -> (..., d)
        # The base comes last: when a checkpointed block that ends here is recomputed, torch stops
        # once it has what backward needs, and so before base(x).
        return self.base(x) + update

    def delta(self):
        """Return the update scaling * B A, (d, k) in fp32."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self, W0):
        """Return W0 + scaling * B A. W0 and the result are (d, k), in fp32 or fp64."""
        return W0 + self.delta()

    def adapter_parameters(self):
        """Return {name in the adapter file: parameter}."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    scaling = property(lambda self: self.config.scaling)
    # Some model code asks for layer.weight.dtype. Computing with this weight would bypass A and B.
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def extra_repr(self):
        return f"r={self.config.r}, scaling={self.scaling:g}"

    def _apply(self, fn, recurse=True):
        """Follow model.to(device), but keep A and B in fp32 under model.half()."""
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.base._apply(fn)  # the base may be cast; below, A and B just move
        return super()._apply(keep_dtype)


def features(layer):
    """Return (d, k), the sizes of output and input."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    return tuple(reversed(layer.weight.shape))  # Conv1D


def is_packed(layer):
    """True for a layer in fewer bits (appendix): its to_dense() returns a plain layer."""
    return hasattr(layer, "to_dense")


def is_transposed(layer):
    """True for GPT-2's Conv1D in transformers, also if it is packed: its weight is (k, d)."""
    conv1d = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    return conv1d or (is_packed(layer) and layer.transposed)


def d_by_k(weight, layer):
    """Turn a weight from the layer's layout to (d, k), or back."""
    return weight.T if is_transposed(layer) else weight


def device_of(module):
    return [*module.parameters(), *module.buffers()][0].device


# --- injection ---
#
# An adapter is a set of swapped modules. Its state is the module in the target's place, and what
# that module's `lora_waiting` holds:
#
#     the adapter is   in the target's place          in its `lora_waiting`
#     on               the wrapper                    nothing
#     off              the plain layer                (wrapper, None)
#     merged           the plain layer, W0 + s B A    (wrapper, W0)
#
# Over a packed base (appendix), merging makes a new dense layer; what waits is (wrapper, base).
# It is in a tuple, which nn.Module does not register: state_dict() and .to() pass it over.

def inject_lora(model, config, layer=LoRALinear):
    """Freeze the model, wrap the targets, train also_train (Sec. 4.2); return the wrapped names.

    Create the optimizer afterwards. Raises ValueError for what cannot be adapted, and RuntimeError
    while an adapter is merged or off; the model is then unchanged.
    """
    require_active(model, "inject")
    if dict(lora_layers(model)):
        raise ValueError("the model carries an adapter: call strip_lora(model) first")
    layers, heads = select(model, config)
    install(model, {base: layer(base, config) for base in layers.values()}, heads)
    return list(layers)


def install(model, wrappers, heads):
    """Freeze the model, place {base: wrapper}, and let {name: head} train."""
    for name, head in heads.items():
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in head.parameters()):
            warnings.warn(f"{name} trains in 16 bits, where small updates round away")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        warnings.warn("BatchNorm updates its statistics while training, and no adapter saves them: "
                      "call eval() on these modules")
    model.requires_grad_(False)
    model.zero_grad()  # an optimizer made earlier would still apply these gradients to the base
    replace_modules(model, wrappers)
    for module in {m for head in heads.values() for m in head.modules()}:
        make_trainable(module)


def replace_modules(model, replacements):
    """Replace modules wherever the model holds them; a torch.compile around one is dropped."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            new = replacements.get(getattr(child, "_orig_mod", child))
            if new is not None and new is not parent:  # a wrapper still holds its base
                parent._modules[name] = new


def modules_by_name(model):
    """Return {name: module}, without the parts that torch.compile adds to the names."""
    return {".".join(part for part in name.split(".") if part != "_orig_mod"): module
            for name, module in model.named_modules()}


def lora_layers(model):
    """Yield (name, LoRALinear) for every wrapper in the model."""
    for name, module in modules_by_name(model).items():
        if name and isinstance(module, LoRALinear):
            yield name, module


def require_active(model, action):
    """Raise RuntimeError if the adapter is off or merged."""
    if is_merged(model):
        raise RuntimeError(f"cannot {action} while merged: call unmerge_lora(model), or "
                           "strip_lora(model) to keep the merged weights")
    if modules_with(model, "lora_waiting"):
        raise RuntimeError(f"cannot {action} inside disable_lora, or after a merge that was "
                           "interrupted: leave the block, or call unmerge_lora(model)")


def modules_with(model, attribute):
    """Return {module: value} of the modules with this attribute, which nn.Module does not know."""
    return {m: vars(m)[attribute] for m in model.modules() if attribute in vars(m)}


def count_parameters(model):
    """Return (trainable, total) numbers of weights; a packed layer counts as d x k."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = sum(math.prod(features(m)) for m in model.modules() if is_packed(m))
    return trainable, packed + sum(p.numel() for p in model.parameters())


# --- heads: modules that train in full (also_train) ---
#
# A head is not swapped, its weights are: it keeps those of the base beside those that train.
# Unlike A and B, these follow model.half().

def make_trainable(module):
    """Let copies of a module's weights train, and keep the base's beside them."""
    base = dict(module.named_parameters(recurse=False))
    trained = {name: nn.Parameter(p.detach().clone()) for name, p in base.items()}
    module.lora_head_weights = {"base": base, "trained": trained}
    use_weights(module, "trained")


def use_weights(module, which):
    """Put a head's "base" or "trained" weights into it, on the device and in the dtype it has."""
    for name, weight in module.lora_head_weights[which].items():
        weight.data = weight.data.to(module._parameters[name])
        module._parameters[name] = weight


# --- merge, switch off, take off ---

@torch.no_grad()
def merge_lora(model):
    """Put plain layers with W0 + scaling * B A in the wrappers' places; return the model.

    No latency is added (Sec. 4.1). The sum is made in fp32, in fp64 over an fp64 base, and rounded
    once. Trained heads stay, and go on training. A second call does nothing. Raises ValueError
    without an adapter, for a base that does not compute x W^T + b or a wrapper with a forward hook,
    and RuntimeError while the adapter is off; no layer is then merged.
    """
    if is_merged(model):
        return model
    require_active(model, "merge")
    layers = dict(lora_layers(model)).values()
    if not layers:
        raise ValueError("the model carries no adapter: call inject_lora or load_adapter first")
    for layer in layers:
        check_product(layer.base)
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise ValueError("an adapted layer has a forward hook, which would not run while "
                             "merged: remove it, or register it before injecting")
    try:
        for layer in layers:
            merge_layer(model, layer)
    except BaseException:  # out of memory, or Ctrl-C
        unmerge_lora(model)
        raise
    return model


def merge_layer(model, layer):
    """Put a plain layer with the merged weight in a wrapper's place; wrapper and W0 wait in it."""
    packed = is_packed(layer.base)
    plain = layer.base.to_dense() if packed else layer.base
    W0 = d_by_k(plain.weight, plain)
    W = layer.merged_weight(W0.to(torch.promote_types(W0.dtype, torch.float32)))
    W = d_by_k(W, plain).to(W0.dtype).contiguous()
    # W0 waits on the CPU, so that a GPU never holds the model twice.
    plain.lora_waiting = (layer, layer.base if packed else plain.weight.to("cpu"))
    plain.weight = nn.Parameter(W, requires_grad=False)
    replace_modules(model, {layer: plain})
    if packed:
        layer.to("cpu")


def unmerge_lora(model):
    """Put the wrappers and every bit of W0 back, on the model's device; return the model.

    It also repairs a merge or a disable_lora block that was interrupted halfway.
    """
    for plain, (layer, W0) in modules_with(model, "lora_waiting").items():
        if device_of(layer) != device_of(plain):  # the model was moved, or a packed base waited
            layer.to(device_of(plain))
        layer.train(plain.training)
        if isinstance(W0, torch.Tensor):
            plain.weight = nn.Parameter(W0.to(plain.weight), requires_grad=False)
        elif W0 is not None:
            layer.base.to(plain.weight.dtype)  # packed: follow a cast of the dense layer
        replace_modules(model, {plain: layer})
        del plain.lora_waiting
    for module in modules_with(model, "lora_head_weights"):
        use_weights(module, "trained")
    return model


def is_merged(model):
    """True if the adapter is merged. A merge that was interrupted halfway does not count."""
    waits = any(W0 is not None for _, W0 in modules_with(model, "lora_waiting").values())
    return waits and not dict(lora_layers(model))


@contextmanager
def disable_lora(model):
    """Within the block the model computes as the base does, heads included. Blocks do not nest."""
    require_active(model, "switch off")
    layers = dict(lora_layers(model)).values()
    try:
        for layer in layers:
            layer.base.lora_waiting = (layer, None)
        replace_modules(model, {layer: layer.base for layer in layers})
        for module in modules_with(model, "lora_head_weights"):
            use_weights(module, "base")
        yield model
    finally:
        unmerge_lora(model)


def strip_lora(model):
    """Take the adapter off for good; return the model, with the base's layers and heads, frozen.

    After merge_lora these are the merged layers, and the heads as trained.
    """
    merged = is_merged(model)
    if not merged:
        require_active(model, "strip")
    replace_modules(model, {layer: layer.base for _, layer in lora_layers(model)})
    for module in modules_with(model, "lora_waiting"):
        del module.lora_waiting
    for module in modules_with(model, "lora_head_weights"):
        if not merged:
            use_weights(module, "base")
        del module.lora_head_weights
        module.requires_grad_(False)
    return model


# --- which layers can be adapted, and merged ---

def select(model, config, names=None):
    """Return {name: layer} of what to wrap, and {name: module} of what to train in full.

    If names is given, exactly these are wrapped, and config.targets is ignored.
    """
    modules = modules_by_name(model)
    if any(map(is_parallel, modules.values())):
        raise ValueError("inject first, then wrap with DDP or FSDP: they do not synchronise "
                         "parameters that are added later")
    tied, heads = tied_modules(model), match(modules, config.also_train)
    in_heads = {m for head in heads.values() for m in head.modules()}
    layers = {name: layer for name, layer in linear_layers(model).items() if layer not in in_heads}
    if names is not None:
        layers = {name: layers[name] for name in names if name in layers}
    elif config.targets == ("all-linear",):
        left_out = tied | routers(model) | {output_head(model)}
        layers = {name: layer for name, layer in layers.items()
                  if layer not in left_out and not ends_in(name, ["lm_head"])}
    else:
        layers = match(layers, config.targets)
    if not layers:
        raise ValueError("no linear layer is left to adapt")

    for name in modules:  # PEFT matches letters, not whole parts
        if name.endswith(config.also_train) and name not in heads:
            raise ValueError(f"also_train={config.also_train}: PEFT would train {name} too, whose "
                             "name ends in the same letters: add it, or give longer endings")
    loaded = not all(p.is_meta for p in model.parameters())
    for name, module in {**layers, **heads}.items():
        if not tied.isdisjoint(module.modules()):
            raise ValueError(f"{name} shares a weight with another module (tied embeddings?), "
                             "which would change too: leave it out")
        if loaded and any(p.is_meta for p in module.parameters()):
            raise ValueError(f"{name} is offloaded: load the model without device_map")
    for name, head in heads.items():  # running statistics and 4-bit weights would not be saved
        if list(head.buffers()) or any(p.dtype not in FLOATS for p in head.parameters()):
            raise ValueError(f"also_train: {name} has buffers, or weights that are not floats")
    return layers, heads


def is_parallel(module):
    """True for DataParallel, DDP and FSDP."""
    kind = type(module).__name__
    return kind in ("DataParallel", "DistributedDataParallel") or is_sharded(module)


def is_sharded(module):
    """True for FSDP, and for fully_shard, which puts "FSDP" before the name of a class."""
    return type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel"))


def output_head(model):
    return getattr(model, "get_output_embeddings", lambda: None)()


def linear_layers(model):
    """Return {name: layer}: nn.Linear, transformers' Conv1D, and packed layers."""
    layers, modules = {}, modules_by_name(model)
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]]
        # Some parents read a child's weight without calling it: a wrapper would have no effect. The
        # attribute ssm_state_size marks transformers' Mamba blocks, whose CUDA kernels do so.
        bypassed = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) or (
            hasattr(parent, "ssm_state_size") and ends_in(name, ["dt_proj", "x_proj", "out_proj"]))
        linear = isinstance(module, nn.Linear) or is_packed(module)
        if name and not bypassed and (linear or is_transposed(module)):
            layers[name] = module
    return layers


def match(modules, endings):
    """Return the modules whose names end in one of the endings. Every ending must match."""
    for ending in endings:
        if not any(ends_in(name, [ending]) for name in modules):
            existing = ", ".join(sorted({name.split(".")[-1] for name in modules} - {""}))
            raise ValueError(f"{ending!r} matches none of these: {existing or 'no layers'}")
    return {name: module for name, module in modules.items() if ends_in(name, endings)}


def ends_in(name, endings):
    """Compare whole parts of a name: q_proj does not end eq_proj."""
    return name != "" and f".{name}".endswith(tuple(f".{ending}" for ending in endings))


def tied_modules(model):
    """Return the modules that share a parameter with another one."""
    uses = Counter(p for m in model.modules() for p in m._parameters.values())
    return {m for m in model.modules() if any(uses[p] > 1 for p in m.parameters(recurse=False))}


def routers(model):
    """Return the modules that choose a mixture's experts, and all inside them."""
    found = [m for name, m in modules_by_name(model).items() if "router" in type(m).__name__.lower()
             or "router" in name.rpartition(".")[2].lower()]
    found += [m.gate for m in model.modules()
              if hasattr(m, "experts") and isinstance(getattr(m, "gate", None), nn.Module)]
    return {m for module in found for m in module.modules()}


def check_product(base):
    """Raise ValueError unless the base's output is x W^T + b within 1%, tried on a random row.

    It calls the base once, and its hooks. A dense layer is tried with a random W in place of its
    own: one that masks W, or computes with a copy of it, gives itself away.
    """
    kind = f"cannot merge into this {type(base).__name__}"
    packed = is_packed(base)
    dense = base.to_dense() if packed else base
    W = dense._parameters.get("weight")  # none if W is computed, as by weight_norm
    if W is None or W.dim() != 2 or W.dtype not in FLOATS or W.is_meta:
        raise ValueError(f"{kind}: it has no dense W of floats")
    d, k = d_by_k(W, dense).shape
    x = random_row(k).expand(1, 1, -1).to(W)
    if not packed:
        W = d_by_k(torch.outer(random_row(d), random_row(k)) / math.sqrt(k), base).to(W)
    try:
        y = base(x) if packed else functional_call(base, {"weight": W}, x)
    except Exception as error:
        raise ValueError(f"{kind}: it fails on a random row ({error})") from error
    b = None if dense.bias is None else dense.bias.float()
    product = F.linear(x.float(), d_by_k(W.float(), dense), b)
    if (not isinstance(y, torch.Tensor) or y.shape != product.shape
            or not (y.float() - product).norm() <= 0.01 * product.norm()):
        raise ValueError(f"{kind}: its output is not x W^T + b")


def random_row(n):
    """Return n numbers from N(0, 1), on the CPU and always the same."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0), device="cpu")


# --- adapter files, in PEFT's format ---

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
SAMPLE = "lora_base_sample"  # a key in the header of WEIGHTS

# PEFT's options that are read here, or that mean nothing once an adapter is trained.
ACCEPTED = set("""
    r lora_alpha lora_dropout use_rslora target_modules modules_to_save exclude_modules
    layers_to_transform layers_pattern fan_in_fan_out base_model_name_or_path task_type
    auto_mapping peft_version revision inference_mode megatron_core qalora_group_size
    runtime_config eva_config""".split())


def adapter_state_dict(model):
    """Return copies of the adapter; model.load_state_dict(copies, strict=False) restores them.

    The adapter must be on. If it is off or merged, this raises RuntimeError, and
    load_state_dict(strict=False) would restore nothing.
    """
    require_active(model, "take an adapter_state_dict")
    saved = set(file_parameters(*adapter_modules(model)).values())
    return {name: p.detach().clone() for name, p in model.named_parameters() if p in saved}


def adapter_modules(model):
    """Return {name: wrapper} and {name: module that trains in full}."""
    in_full = modules_with(model, "lora_head_weights")
    heads = {name: module for name, module in modules_by_name(model).items() if module in in_full}
    return dict(lora_layers(model)), heads


def save_adapter(model, folder, metadata=None):
    """Write adapter_model.safetensors and adapter_config.json, which PEFT and load_adapter read.

    metadata, {string: string}, goes into the header of the safetensors file. Raises ValueError
    for what load_adapter could not restore, and RuntimeError while the adapter is merged or off.
    """
    from safetensors.torch import save
    if any(map(is_sharded, model.modules())):
        raise ValueError("of a sharded model (FSDP) each process holds a part: gather the weights "
                         "into a plain model, and save that")
    while is_parallel(model) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    require_active(model, "save")
    layers, heads = adapter_modules(model)
    if not layers:
        raise ValueError("the model carries no adapter: call inject_lora or load_adapter first")
    if len({(type(layer), layer.config) for layer in layers.values()}) > 1:
        raise ValueError("these adapted layers differ, but a file holds one config and one class "
                         "of layer")
    last = list(layers.values())[-1]
    config = last.config
    parameters = file_parameters(layers, heads)
    saved = set(parameters.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in saved:
            raise ValueError(f"{name} trains but is not saved: freeze it, or inject with it in "
                             "also_train")
    for key, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{key} holds NaN or infinity")
    zero = [name for name, layer in layers.items() if not layer.lora_B.any()]
    if zero:
        warnings.warn(f"B is still zero in {zero[0]}: it was not trained, the optimizer was made "
                      "before injecting, or the model never calls the layer")

    options = {
        "peft_type": "LORA", "task_type": task_type(model, heads),
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": int(config.r), "lora_alpha": float(config.alpha),  # json writes no numpy numbers
        "lora_dropout": float(config.dropout), "modules_to_save": list(config.also_train) or None,
        "target_modules": shortest_endings(layers, model),
        "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values()),
        **last.options}
    if config.rslora:  # PEFT 0.7 and older refuse the key
        options["use_rslora"] = True
    tensors = {key: p.detach().to("cpu").contiguous() for key, p in parameters.items()}
    header = {**(metadata or {}), "format": "pt", SAMPLE: json.dumps(base_sample(last))}
    files = {WEIGHTS: save(tensors, header), CONFIG: json.dumps(options, indent=2).encode()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.part").write_bytes(content)
    (folder / CONFIG).unlink(missing_ok=True)  # a crash here leaves no adapter, not a mixed one
    for name in files:
        (folder / f"{name}.part").replace(folder / name)


def shortest_endings(names, model):
    """Shorten names to their last parts, unless these would match other modules too."""
    endings = sorted({name.rpartition(".")[2] for name in names})
    matched = {name for name in modules_by_name(model) if ends_in(name, endings)}
    return list(names) if matched - set(names) else endings


def task_type(model, heads):
    """Return the name by which PEFT's Auto classes choose a model class, or None."""
    if not type(model).__module__.startswith("transformers."):
        return None
    if type(model).__name__.endswith("ForSequenceClassification"):
        # PEFT then wants the head in the file, by one of these names.
        head = {name.rpartition(".")[2] for name in heads} & {"classifier", "score"}
        return "SEQ_CLS" if head else None
    if not model.can_generate() or model.main_input_name != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def file_parameters(layers, heads):
    """Return {key in the file: parameter} of {name: wrapper} and {name: module of also_train}."""
    parameters = {f"{PREFIX}{name}.{part}": parameter for name, layer in layers.items()
                  for part, parameter in layer.adapter_parameters().items()}
    for name, module in heads.items():
        parameters.update(module.named_parameters(f"{PREFIX}{name}"))
    return parameters


def base_sample(layer):
    """Return the first 64 weights of a layer's base, by which load_adapter knows another base."""
    W0 = layer.weight
    return W0.flatten()[:64].tolist() if W0.dtype in FLOATS and not W0.is_meta else []


def load_adapter(model, folder, layer=LoRALinear):
    """Put a folder's adapter onto the model, replacing any other; return its config.

    Create the optimizer afterwards: A and B are new Parameters, except over an adapter of the same
    layers, class and config, which takes the values in place. Raises ValueError if the files are
    damaged or for another model, and RuntimeError while an adapter is merged or off; the model is
    then unchanged. If save_adapter wrote the files, warns of another base; a fine-tuned copy of
    the base passes.
    """
    require_active(model, "load an adapter")
    with disable_lora(model):  # names and shapes in the file are compared with the base's
        try:
            config, tensors, sample, layers, heads = read_adapter(model, Path(folder), layer)
        except (ImportError, MemoryError):  # the first: safetensors is not installed
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder} is no adapter for this model: {reason}") from error
        wrappers = {name: layer(base, config) for name, base in layers.items()}
    before = dict(lora_layers(model))
    if signature(before) != signature(wrappers):
        if before and model.training:
            warnings.warn("A and B are new Parameters now: create the optimizer again")
        install(strip_lora(model), {wrapper.base: wrapper for wrapper in wrappers.values()}, heads)
    for key, parameter in file_parameters(*adapter_modules(model)).items():
        parameter.detach().copy_(tensors[key])
    here = torch.tensor(base_sample(list(wrappers.values())[-1]))
    # The relative distance of the same base in 4 bits is 0.1, of another seed 1.4.
    if here.shape == sample.shape and (here - sample).norm() > 0.3 * sample.norm():
        warnings.warn(f"{folder} was trained on another base")
    return config


def signature(layers):
    """Return what must be equal for one adapter's Parameters to take the other's values."""
    # Targets are blanked: the names say what they mean, however they were spelt.
    return {name: (type(layer), layer.base, replace(layer.config, targets="q_proj"))
            for name, layer in layers.items()}


def read_adapter(model, folder, layer):
    """Return (config, {key: tensor}, sample of the base, {name: layer to wrap}, {name: head}).

    Nothing in the files is executed. The tensors have to be exactly those that injecting the config
    into this plain model makes.
    """
    from safetensors import safe_open
    options = json.loads((folder / CONFIG).read_bytes())
    check_options(options, layer.options)
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        sample = torch.tensor(json.loads((file.metadata() or {}).get(SAMPLE, "[]"))).float()

    # The tensors' names say which layers are adapted: patterns in the config are not evaluated.
    names = list(modules_by_name(model))
    adapted = [name for name in names if f"{PREFIX}{name}.lora_A.weight" in tensors]
    if not adapted:
        raise ValueError("none of this model's layers is in the file, whose first tensor is "
                         f"{next(iter(tensors), 'missing')}")
    # PEFT lists both "classifier" and "score" in modules_to_save: names that the model lacks are
    # skipped. It compares letters, so that "classifier" means "pre_classifier" too.
    endings = tuple(options.get("modules_to_save") or ())
    config = LoRAConfig(
        r=options.get("r"), alpha=options.get("lora_alpha"),
        dropout=options.get("lora_dropout", 0.0), rslora=options.get("use_rslora", False),
        targets=shortest_endings(adapted, model),
        also_train=[ending for ending in endings if any(ends_in(name, [ending]) for name in names)]
        + [name for name in names if name.endswith(endings) and not ends_in(name, endings)])
    layers, heads = select(model, config, adapted)
    wrappers = {}
    for name, base in layers.items():
        d, k = features(base)
        # On the meta device these have shapes and take no memory, also with a damaged r.
        wrappers[name] = layer(nn.Linear(k, d, device="meta"), config)
        # PEFT saves the base of an adapted lm_head along. It must be this model's.
        weight = tensors.pop(f"{PREFIX}{name}.base_layer.weight", None)
        if weight is not None and (weight - base.weight.to(weight)).norm() > 0.01 * weight.norm():
            raise ValueError(f"{WEIGHTS} has another base weight for {name}")
    expected = {key: tuple(p.shape) for key, p in file_parameters(wrappers, heads).items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if shapes.get(key) != expected.get(key):
            raise ValueError(f"{key} is {shapes.get(key, 'missing')} in {WEIGHTS}, "
                             f"{expected.get(key, 'missing')} in the model")
        if tensors[key].dtype not in FLOATS or not tensors[key].isfinite().all():
            raise ValueError(f"{key} ({tensors[key].dtype}) holds NaN, infinity or no floats")
    return config, tensors, sample, layers, heads


def check_options(options, required):
    """Raise ValueError for an adapter of another kind, which some option of PEFT's sets."""
    required = {"peft_type": "LORA", **required}
    for key in [*required, *options]:
        value = options.get(key)
        if key in required:
            supported = value == required[key]
        elif key == "init_lora_weights":  # most other initialisations change W0
            supported = value in (True, False, None, "gaussian", "orthogonal", "eva")
        else:
            supported = key in ACCEPTED or value in (None, False, "", "none", [], {})
        if not supported:
            raise ValueError(f"{key} = {value!r:.60} is not supported by this class of layer")


# --- appendix: a 4-bit base (NF4) ---
#
# QLoRA (Dettmers et al. 2023, arXiv:2305.14314). The code above runs without this.

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (their Appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
BLOCK = 64  # weights that share an absmax


class NF4Linear(nn.Module):
    """A frozen linear layer in 4.25 bits a weight: the nearest value of NF4, times an absmax.

    codes   (bytes,) uint8: two indices into NF4 a byte, of the flattened weight
    absmax  (blocks,) bfloat16. The paper quantises it too, for 4.13 bits a weight
    pairs   (256, 2) float32: the two values that each byte stands for
    absmax and pairs are stored as integers, which .half() leaves alone. The product is computed in
    x's dtype. `weight` is W, dequantised on every access. The bias is frozen too.
    """

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()
        self.kind, self.shape, self.transposed = type(layer), weight.shape, is_transposed(layer)
        self.out_features, self.in_features = features(layer)
        self.bias = layer.bias
        flat = weight.flatten().float()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        values = torch.tensor(NF4, device=weight.device, dtype=torch.float32)
        middles = (values[1:] + values[:-1]) / 2
        scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(scaled, middles, out_int32=True).byte().view(-1, 2)
        pairs = torch.cartesian_prod(values, values)
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1])
        self.register_buffer("absmax", absmax.bfloat16().view(torch.uint8))
        self.register_buffer("pairs", pairs.view(torch.int32), persistent=False)
        # An empty tensor: model.half() casts it, and `weight` has its dtype.
        self.register_buffer("dtype_holder", weight.new_empty(0), persistent=False)
        share_hooks(self, layer).requires_grad_(False).train(layer.training)

    def dequantize(self, dtype):
        """Return W, shaped as it was: (d, k), or (k, d) over Conv1D."""
        # Both values of a byte at once: the index takes 2 bytes a weight, not 8.
        pairs = self.pairs.view(torch.float32).to(dtype)
        blocks = pairs.index_select(0, self.codes.int()).view(-1, BLOCK)
        blocks *= self.absmax.view(torch.bfloat16).to(dtype)[:, None]
        return blocks.flatten()[:self.shape.numel()].view(self.shape)

    weight = property(lambda self: self.dequantize(self.dtype_holder.dtype))

    def forward(self, x):
        return NF4Product.apply(x, self)

    def to_dense(self):
        """Return a plain layer of the kind that was quantised, with its rounded values."""
        sizes = self.in_features, self.out_features
        with torch.device("meta"):
            layer = self.kind(*(reversed(sizes) if self.transposed else sizes))
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        bias = self.bias
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        return share_hooks(layer, self).train(self.training)


def share_hooks(layer, other):
    """Give a layer the hooks of the one whose place it takes; return it."""
    vars(layer).update({name: hooks for name, hooks in vars(other).items()
                        if name.startswith(("_forward_", "_backward_", "_is_full_backward"))})
    return layer


class NF4Product(torch.autograd.Function):
    """x W^T + b. Keeps nothing for backward: W is frozen, and is dequantised again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        weight = layer.dequantize(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, d_by_k(weight, layer), bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ d_by_k(ctx.layer.dequantize(gradient.dtype), ctx.layer), None


@torch.no_grad()
def quantize_nf4(model, skip=("lm_head",)):
    """Put an NF4Linear in place of the linear layers; return their names.

    Call it on the CPU before injecting, then move the model, so that a GPU never holds the dense
    weights. The output head, routers, layers that are not called, and names that end in one of
    skip stay dense; so do, with a warning, layers that cannot be packed.
    """
    require_active(model, "quantise")
    if dict(lora_layers(model)):
        raise ValueError("the model carries an adapter: quantise first, then inject")
    head = output_head(model)
    skip = (skip,) if isinstance(skip, str) else skip
    names, tied, left_out = [], tied_modules(model), {head} | routers(model)
    layers = linear_layers(model)
    for name in list(layers):
        layer = layers.pop(name)  # the last dense weight is freed before the next is packed
        if layer in left_out or ends_in(name, skip) or isinstance(layer, NF4Linear):
            continue
        weight = layer.weight
        plain = type(layer) is nn.Linear or is_transposed(layer)
        computed = "weight" not in layer._parameters  # as by pruning
        if layer in tied or not plain or computed or weight.is_meta or weight.dtype not in FLOATS \
                or not weight.isfinite().all():
            warnings.warn(f"{name} stays dense: a {type(layer).__name__} in {weight.dtype} that is "
                          "tied, computed, not finite, or of another kind")
            continue
        replace_modules(model, {layer: NF4Linear(layer)})
        names.append(name)
    if not names:
        raise ValueError("this model has no dense linear layer to quantise")
    return names


def dequantize_nf4(model):
    """Put a plain layer with the rounded values in place of every NF4Linear."""
    require_active(model, "dequantise")
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    replace_modules(model, {module: module.to_dense() for module in packed})
