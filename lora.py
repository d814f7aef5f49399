"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

    h = W0 x + (alpha / r) B A x                           Eq. 3, scaled as in Sec. 4.1

    paper      here           shape     trained
    W0         base.weight    (d, k)    never
    A          lora_A         (r, k)    yes, random start
    B          lora_B         (d, r)    yes, zero start: step 0 is the base model, bit for bit
    alpha / r  scaling        scalar    no
    r          r              scalar    the rank, far below min(d, k)

Use, in any PyTorch model that calls its linear layers:

    config = LoRAConfig(r=8, alpha=16, targets=("q_proj", "v_proj"))
    inject_lora(model, config)                   # freeze the model, wrap these layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    ...                                          # your training loop
    save_adapter(model, config, "my-adapter")    # a few MB, in PEFT's format

    load_adapter(model, "my-adapter")            # later, onto the same base
    merge_lora(model)                            # W0 + scaling B A: no latency is added
    strip_lora(model)                            # plain layers again

A first reading may stop after merging. Then come the choice of layers, adapter files in PEFT's
format, and an appendix, a base in 4 bits, which a copy of this file can do without.

Differences from the paper
- A is initialised like the weight of nn.Linear, as in the authors' code. The paper says Gaussian.
- Dropout on the adapter's input comes from the authors' code. The paper's equations have none.
- Merging is a call. The authors' code merges inside eval(), so that a checkpoint saved then holds
  W0 + B A under W0's name. Here state_dict() raises while merged.
- A fused projection (GPT-2's c_attn) is adapted whole. The authors' code can adapt its thirds.
- rslora divides by sqrt(r) instead of r (Kalajdzievski 2023, arXiv:2312.03732).
"""
import copy
import json
import math
import os
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- configuration ---

@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how. Raises ValueError for a value out of range.

    r           rank of the update (Sec. 4.1)
    alpha       the update is scaled by alpha / r, or by alpha / sqrt(r) with rslora
    dropout     probability, on the adapter's input
    targets     dotted name endings of layers, or "all-linear": all but output head and routers
    also_train  dotted name endings of modules to train in full and save along: a fresh classifier
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
            names = (names,) if isinstance(names, str) else tuple(names)
            object.__setattr__(self, field, names)
        if not isinstance(self.r, Integral) or self.r < 1:
            raise ValueError(f"r is {self.r!r}, expected a whole number, 1 or more")
        if not isinstance(self.alpha, Real) or not 0 < self.alpha < 1e30:
            raise ValueError(f"alpha is {self.alpha!r}, expected a number above 0")
        if not isinstance(self.dropout, Real) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, expected a probability below 1")
        if not self.targets:
            raise ValueError("targets is empty, expected names of linear layers")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora is {self.rslora!r}, expected True or False")

    @property
    def scaling(self) -> float:
        # Sec. 4.1: dividing by r keeps one learning rate usable when r changes
        return float(self.alpha / (math.sqrt(self.r) if self.rslora else self.r))


# --- the layer ---

class LoRALinear(nn.Module):
    """h = W0 x + scaling * B A x (Eq. 3): a low-rank update beside a frozen linear layer.

    base    (..., k) -> (..., d), frozen
    lora_A  (r, k), random
    lora_B  (d, r), zero: training starts at the base model, and A first moves at step 2,
            because dL/dA is zero as long as B is
    A and B are fp32 whatever the base's dtype. In bf16 a late update of 3e-5 on a weight of 0.02
    is below half a rounding step and would be lost.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0,
                 rslora: bool = False):
        super().__init__()
        self.scaling = LoRAConfig(r=r, alpha=alpha, dropout=dropout, rslora=rslora).scaling
        self.base = base.requires_grad_(False)
        self.out_features, self.in_features = d, k = features(base)
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.empty(r, k, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(d, r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within 1 / sqrt(k)
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        self.unmerged_base = None  # while merged (base,): in a tuple it is no submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("the adapter is merged: call model.eval() to use the model, "
                               "unmerge_lora(model) to train it")
        if self.merged or not self.enabled:
            return self.base(x)
        z = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., k) -> (..., r)
        update = F.linear(z * self.scaling, self.lora_B.to(x.dtype))  # (..., r) -> (..., d)
        h = self.base(x)  # last: backward does not need h, so recomputation can stop before it
        if not isinstance(h, torch.Tensor):
            raise ValueError(f"{type(self.base).__name__} returns a {type(h).__name__}, expected "
                             "a tensor: leave this layer out of targets")
        return h + update

    def delta(self) -> torch.Tensor:
        """Return the update scaling * B A, (d, k) in fp32."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scaling * (self.lora_B.detach() @ self.lora_A.detach())

    @property
    def merged(self) -> bool:
        return self.unmerged_base is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Put a dense layer of W0 + scaling * B A in the base's place: no latency (Sec. 4.1).

        The sum is taken in fp32 and rounded once. The base is kept on the CPU for unmerge().
        """
        if self.merged:
            return
        if not self.enabled:
            raise RuntimeError("the adapter is switched off: merge outside of disable_lora")
        dense = dense_copy(self.base)
        delta = self.delta().T if is_transposed(dense) else self.delta()
        dense.weight.copy_(dense.weight + delta)
        self.unmerged_base = (with_tensors(self.base, lambda tensor: tensor.to("cpu")),)
        self.base = dense

    def unmerge(self) -> None:
        """Put the base back. (W0 + scaling B A) - scaling B A would not give every bit of W0."""
        if self.merged:
            device = self.base.weight.device
            self.base = with_tensors(self.unmerged_base[0], lambda tensor: tensor.to(device))
            self.unmerged_base = None

    def refuse_while_merged(self, action: str) -> None:
        if self.merged:
            raise RuntimeError(f"cannot {action} while the adapter is merged: call "
                               "unmerge_lora(model) or strip_lora(model) first")

    # For model code that reads layer.weight instead of calling the layer.
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def _apply(self, fn, recurse=True):
        """Follow model.to(device), but keep A and B in fp32 under model.half() and the like."""
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.base._apply(fn)
        return super()._apply(keep_dtype, recurse=False)

    def _save_to_state_dict(self, *args):
        self.refuse_while_merged("take a state_dict")  # it would hold the update twice
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Accept a plain checkpoint too: its weight goes to the base, A and B keep their values."""
        self.refuse_while_merged("load a state_dict")
        for name in self.base.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(prefix + name)
                state_dict.setdefault(prefix + "lora_A", self.lora_A.detach())
                state_dict.setdefault(prefix + "lora_B", self.lora_B.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, merged={self.merged}"


def features(layer: nn.Module) -> tuple[int, int]:
    """Return (d, k), the sizes of output and input. Conv1D has no attributes for them."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    return tuple(reversed(layer.weight.shape))


def is_transposed(layer: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2), whose weight is (k, d), and for its packed form."""
    return type(layer).__name__ == "Conv1D" or getattr(layer, "transposed", False)


def dense_copy(base: nn.Module) -> nn.Module:
    """Return a plain layer with the base's values and tensors of its own, by to_dense() if packed.

    ValueError for a weight that is computed, quantised by another library, or on the meta device.
    """
    if hasattr(base, "to_dense"):
        return base.to_dense()
    weight = base._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS or weight.is_meta:
        raise ValueError(f"cannot merge into this {type(base).__name__}: it has no plain weight "
                         "in memory; load the base unquantised")
    return with_tensors(base, torch.clone)


def with_tensors(layer: nn.Module, change) -> nn.Module:
    """Return a copy of a layer with change(tensor) in place of each of its tensors."""
    layer = copy.copy(layer)
    layer._parameters = {name: p if p is None else nn.Parameter(change(p.detach()), False)
                         for name, p in layer._parameters.items()}
    layer._buffers = {name: b if b is None else change(b) for name, b in layer._buffers.items()}
    return layer


# --- injection ---

def inject_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Freeze the model, wrap the targets, train also_train (Sec. 4.2); return the wrapped names.

    Create the optimizer afterwards. Raises ValueError, with the model untouched, when a target
    matches nothing, a weight is shared with another module, or the model carries an adapter.
    """
    model = unwrap(model)
    if dict(lora_layers(model)):
        raise ValueError("the model carries an adapter already: call strip_lora(model) first, or "
                         "load_adapter to replace it")
    also_train = match_modules(model, config.also_train)
    names = match_targets(model, config.targets, also_train)
    check_trainable(model, names, also_train)
    wrap_layers(model, names, also_train, config)
    return names


def wrap_layers(model: nn.Module, names, also_train, config: LoRAConfig) -> None:
    wrappers = {}
    for name in names:
        base = model.get_submodule(name)
        layer = LoRALinear(base, config.r, config.alpha, config.dropout, config.rslora)
        wrappers[base] = layer.train(base.training)
    for parameter in model.parameters():
        parameter.requires_grad = False
        parameter.grad = None  # left from pretraining, it would move the base at the next step
    replace_modules(model, wrappers)
    for name in also_train:
        module = model.get_submodule(name).requires_grad_(True)
        module.before_training = copy.deepcopy(module.state_dict())  # for load_adapter to put back


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Replace each module under every name it has: one module may stand in two places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replacements.get(child, child)


def lora_layers(model: nn.Module):
    """Yield (name, LoRALinear) for every wrapped layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) numbers of weights; a packed layer counts as d x k."""
    parameters = list(model.parameters())
    packed = [features(module) for module in model.modules() if hasattr(module, "to_dense")]
    total = sum(p.numel() for p in parameters) + sum(d * k for d, k in packed)
    return sum(p.numel() for p in parameters if p.requires_grad), total


# --- merge, switch off, take off ---

def merge_lora(model: nn.Module) -> nn.Module:
    """Add every update to its base weight; return the model. A second call changes nothing.

    Raises ValueError if a layer cannot be merged, and then merges none, or if there is no adapter.
    """
    layers = adapted(model).values()
    try:
        for layer in layers:
            layer.merge()
    except Exception:
        unmerge_lora(model)
        raise
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put every base weight back, bit for bit; return the model."""
    for layer in adapted(model).values():
        layer.unmerge()
    return model


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model carries no adapter: call inject_lora or load_adapter first, "
                         "and strip_lora last")
    return layers


def strip_lora(model: nn.Module) -> nn.Module:
    """Replace every wrapper by its base, merged or not; return the model, which stays frozen.

    The state_dict has its original keys again. Modules of also_train stay as trained.
    """
    replace_modules(model, {layer: layer.base for _, layer in lora_layers(model)})
    for module in model.modules():
        module.__dict__.pop("before_training", None)
    return model.base if isinstance(model, LoRALinear) else model


@contextmanager
def disable_lora(model: nn.Module):
    """Switch the adapter off inside the with block. Modules of also_train stay as trained."""
    layers = [layer for layer in adapted(model).values() if layer.enabled]
    for layer in layers:
        layer.refuse_while_merged("switch off")
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


# --- which layers can be adapted ---

def match_targets(model: nn.Module, targets, also_train=()) -> list[str]:
    """Return the names of the linear layers that targets select, outside of also_train."""
    layers = linear_layers(model, also_train)
    if "all-linear" not in targets:
        return match_names(layers, targets, "target {!r} matches no layer that can be adapted")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name, layer in layers.items()
             if layer is not head and not is_router(layer)]
    if head is None:
        names = [name for name in names if not ends_in(name, ["lm_head"])]
    if not names:
        raise ValueError("this model has no linear layer to adapt")
    return names


def match_modules(model: nn.Module, also_train) -> list[str]:
    """Return the names of the modules with weights that also_train selects."""
    names = [name for name, module in model.named_modules()
             if name and next(module.parameters(), None) is not None]
    return match_names(names, also_train, "also_train {!r} matches no module with weights")


def match_names(names, endings, error: str) -> list[str]:
    """Return the names with one of the endings; ValueError for an ending that matches nothing."""
    for ending in endings:
        if not any(ends_in(name, [ending]) for name in names):
            raise ValueError(f"{error.format(ending)}; this model has: "
                             f"{', '.join(short_names(names)) or 'none'}")
    return [name for name in names if ends_in(name, endings)]


def ends_in(name: str, endings) -> bool:
    """Compare whole dotted parts: q_proj is not the end of eq_proj."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def short_names(names) -> list[str]:
    """Return the distinct last parts of dotted names; a bare index keeps its parent."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(part[-2:] if part[-1].isdigit() else part[-1:]) for part in parts})


def linear_layers(model: nn.Module, outside=()) -> dict[str, nn.Module]:
    """Return {name: layer} of what can be adapted; a wrapped layer has the name of its base."""
    bases = {layer.base for _, layer in lora_layers(model)}
    outside = tuple(f"{name}." for name in outside)
    return {name: module for name, module in model.named_modules()
            if name and module not in bases and is_linear(module)
            and not f"{name}.".startswith(outside) and not is_bypassed(model, name)}


def is_linear(module: nn.Module) -> bool:
    """True if an adapter fits: the module maps (..., k) to (..., d) by a (d, k) weight."""
    if hasattr(module, "to_dense") or isinstance(module, LoRALinear):
        return True  # packed: reading .weight would dequantise it
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or nn.parameter.is_lazy(weight):
        return False
    if is_transposed(module):
        return weight.dim() == 2
    d, k = getattr(module, "out_features", None), getattr(module, "in_features", None)
    # A library that packs weights into integers has a shape of its own.
    return None not in (d, k) and (weight.shape == (d, k) or not weight.is_floating_point())


def is_router(layer: nn.Module) -> bool:
    """True for routers (PhiMoE, Llama 4): they override nn.Linear's forward, to return tuples.

    Layers quantised by other libraries override it too, but hold integers or 8-bit floats.
    """
    overrides = isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward
    return overrides and layer.weight.dtype in FLOATS


def is_bypassed(model: nn.Module, name: str) -> bool:
    """True where torch reads the weight without calling the layer: an adapter would do nothing.

    For nn.TransformerEncoderLayer, torch.backends.mha.set_fastpath_enabled(False) changes that.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    fast_path = torch.backends.mha.get_fastpath_enabled()
    return (isinstance(parent, nn.MultiheadAttention)
            or isinstance(parent, nn.TransformerEncoderLayer) and fast_path)


def check_trainable(model: nn.Module, names, also_train) -> None:
    """Raise ValueError for a tied weight, and for running statistics, which no file would hold."""
    owners = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners[parameter].add(name)
    for name in [*names, *also_train]:
        for parameter in model.get_submodule(name).parameters():
            if len(owners[parameter]) > 1:
                others = ", ".join(sorted(owners[parameter] - {name}))
                raise ValueError(f"{name} shares its weight with {others} (tied), which would "
                                 "change too: choose other layers")
    for name in also_train:
        if list(model.get_submodule(name).buffers()):
            raise ValueError(f"{name} has buffers, which an adapter file does not hold: leave it "
                             "out of also_train")


PARALLEL = nn.DataParallel, nn.parallel.DistributedDataParallel


def unwrap(model: nn.Module, to_train: bool = True) -> nn.Module:
    """Return the model inside torch.compile's or a parallel wrapper: names without a prefix."""
    if to_train and any(isinstance(module, PARALLEL) for module in model.modules()):
        raise ValueError("DistributedDataParallel or DataParallel would not synchronise the "
                         "adapter: inject or load first, then wrap")
    while isinstance(model, PARALLEL) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


# --- adapter files, in PEFT's format ---

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

# The options of PEFT 0.21. An unknown one that is set gives a warning.
UNSET = (None, "", "none", [], {})  # no False: 0 == False, and 0 is the index of a layer
NARROWING = {"layers_to_transform", "layers_pattern", "exclude_modules"}
SUPPORTED = NARROWING | set("""
    peft_type r lora_alpha lora_dropout use_rslora init_lora_weights target_modules modules_to_save
    base_model_name_or_path task_type auto_mapping peft_version revision inference_mode
    fan_in_fan_out megatron_core qalora_group_size runtime_config eva_config loftq_config
    corda_config lora_ga_config""".split())
UNSUPPORTED = set("""
    bias lora_bias use_dora use_qalora use_bdlora alora_invocation_tokens arrow_config kasa_config
    monteclora_config velora_config rank_pattern alpha_pattern layer_replication megatron_config
    trainable_token_indices target_parameters ensure_weight_tying""".split())


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {parameter name: copy} of what trains: every A and B, and the modules of also_train.

    model.load_state_dict(copies, strict=False) puts them back. Not for the optimizer, which needs
    the parameters themselves.
    """
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model: nn.Module, config: LoRAConfig, folder) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which PEFT and load_adapter read.

    A crash leaves no mixed adapter. Raises RuntimeError while merged, ValueError for NaN, for a
    config other than the injected one, and for a parameter that trains outside of both.
    """
    from safetensors.torch import save
    model = unwrap(model, to_train=False)
    layers = adapted(model)
    for layer in layers.values():
        layer.refuse_while_merged("save")
        if (layer.lora_A.shape[0], layer.scaling) != (config.r, config.scaling):
            raise ValueError(f"this is not the config that was injected: {config}")
    also_train = match_modules(model, config.also_train)
    parameters = file_parameters(model, also_train)
    written = set(parameters.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in written:
            raise ValueError(f"{name} trains but would not be saved: name its module in also_train "
                             "before injecting")
    for key, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{key} holds NaN or infinity: training diverged")
    idle = [name for name, layer in layers.items() if not layer.lora_B.any()]
    if idle:
        warnings.warn(f"{len(idle)} adapted layers never trained, such as {idle[0]}: is the "
                      "optimizer older than the adapter, or the layer never called?")
    # The configured endings, if on loading they select the same layers; else whole names.
    selected = [n for n in linear_layers(model, also_train) if ends_in(n, config.targets)]
    options = {
        "peft_type": "LORA", "inference_mode": True, "bias": "none",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": int(config.r), "lora_alpha": float(config.alpha),  # numpy's numbers are not JSON's
        "lora_dropout": float(config.dropout), "use_rslora": config.rslora,
        "target_modules": list(config.targets if selected == list(layers) else layers),
        "modules_to_save": list(config.also_train) or None,
        "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values())}
    tensors = {key: p.detach().to("cpu").contiguous() for key, p in parameters.items()}
    metadata = {"format": "pt", "base": json.dumps(base_sample(model))}  # PEFT ignores the sample
    contents = {WEIGHTS: save(tensors, metadata), CONFIG: json.dumps(options, indent=2).encode()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with open(folder / f"{name}.part", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    (folder / CONFIG).unlink(missing_ok=True)  # a crash here leaves no adapter, not a mixed one
    for name in contents:
        os.replace(folder / f"{name}.part", folder / name)


def file_parameters(model: nn.Module, also_train) -> dict[str, nn.Parameter]:
    """Return {key in the file: parameter}: every A and B, and the modules of also_train."""
    parameters = {}
    for name, layer in lora_layers(model):
        parameters[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        parameters[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    for name in also_train:
        for key, parameter in model.get_submodule(name).named_parameters():
            parameters[f"{PREFIX}{name}.{key}"] = parameter
    # torch.compile of a submodule puts a prefix into its names
    return {key.replace("_orig_mod.", ""): parameter for key, parameter in parameters.items()}


def base_sample(model: nn.Module) -> list[float]:
    """Return 64 weights each of the first and last adapted layer: a fingerprint of the base."""
    layers, sample = list(adapted(model).values()), []
    for weight in (layers[0].weight, layers[-1].weight):
        if weight.dtype in FLOATS and not weight.is_meta:
            sample += weight.flatten()[:64].tolist()
    return sample


def load_adapter(model: nn.Module, folder) -> LoRAConfig:
    """Put the adapter of a folder onto the model, in place of any other; return its config.

    Create the optimizer afterwards: loading replaces A and B. Nothing in the files is executed.
    Raises ValueError, with the model as it was, unless the file holds exactly what injecting its
    config into this model would make.
    """
    from safetensors import SafetensorError
    model = unwrap(model)
    old = [layer for _, layer in lora_layers(model)]
    if not all(layer.enabled for layer in old):
        raise RuntimeError("the adapter is switched off: load another outside of disable_lora")
    bases = {layer: layer.unmerged_base[0] if layer.merged else layer.base for layer in old}
    replace_modules(model, bases)  # the file is compared with the plain model
    try:
        config, names, also_train, tensors, sample = read_adapter(model, Path(folder))
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is no adapter for this model: {reason}") from None
    finally:
        replace_modules(model, {base: layer for layer, base in bases.items()})

    for layer in old:
        layer.unmerge()
    for module in model.modules():
        if "before_training" in module.__dict__:  # a head that the old adapter trained
            module.load_state_dict(module.before_training)
    strip_lora(model)
    wrap_layers(model, names, also_train, config)
    for key, parameter in file_parameters(model, also_train).items():
        parameter.detach().copy_(tensors[key])
    here = torch.tensor(base_sample(model))
    # Rounding to 4 bits moves the sample by about 10%, another seed by about 140%.
    if here.shape == sample.shape and (here - sample).norm() > 0.3 * sample.norm():
        warnings.warn(f"{folder} was trained on another base")
    return config


def read_adapter(model: nn.Module, folder: Path):
    """Return (config, layer names, also_train's names, tensors, sample), checked on the model."""
    from safetensors import safe_open
    options = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    check_options(options)
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        sample = torch.tensor(json.loads((file.metadata() or {}).get("base", "[]"))).float()
    # PEFT also lists modules that the model lacks: score beside classifier.
    saved = [ending for ending in options.get("modules_to_save") or ()
             if any(ends_in(name, [ending]) for name, _ in model.named_modules())]
    also_train = match_modules(model, saved)
    layers = linear_layers(model, also_train)
    targets = options.get("target_modules")
    if not isinstance(targets, list) or any(options.get(key) not in UNSET for key in NARROWING):
        # A regular expression, say, which is not run: the keys tell the layers.
        targets = [name for name in layers if f"{PREFIX}{name}.lora_A.weight" in tensors]
    config = LoRAConfig(
        r=options.get("r"), alpha=options.get("lora_alpha"), targets=targets, also_train=saved,
        dropout=options.get("lora_dropout", 0.0), rslora=options.get("use_rslora", False))
    names = [name for name in layers if ends_in(name, targets)]
    check_trainable(model, names, also_train)

    expected = {key: tuple(p.shape) for key, p in file_parameters(model, also_train).items()}
    for name in names:
        d, k = features(layers[name])
        expected[f"{PREFIX}{name}.lora_A.weight"] = (config.r, k)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (d, config.r)
        # PEFT saves the base of an adapted lm_head along. It has to be this model's own.
        base = tensors.pop(f"{PREFIX}{name}.base_layer.weight", None)
        if base is not None and not torch.equal(base.to(layers[name].weight), layers[name].weight):
            raise ValueError(f"{WEIGHTS} has another base weight for {name} than this model")
    for key in sorted(expected.keys() | tensors.keys()):
        shape = tuple(tensors[key].shape) if key in tensors else "missing"
        if shape != expected.get(key):
            raise ValueError(f"{key} is {shape} in {WEIGHTS}, expected "
                             f"{expected.get(key, 'no such entry')}")
        if tensors[key].dtype not in FLOATS or not tensors[key].float().isfinite().all():
            raise ValueError(f"{key} is {tensors[key].dtype} or holds NaN, expected finite numbers")
    return config, names, also_train, tensors, sample


def check_options(options) -> None:
    """Raise ValueError for an option that makes another kind of adapter; warn of unknown ones."""
    if not isinstance(options, dict) or options.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG} does not say peft_type LORA")
    init = options.get("init_lora_weights")
    if init not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"init_lora_weights is {init!r}, which changed the base weights: let "
                         "PEFT convert it (path_initial_model_for_weight_conversion)")
    for key, value in options.items():
        if key in SUPPORTED or value is False or value in UNSET:
            continue
        if key in UNSUPPORTED:
            raise ValueError(f"{key} = {value!r:.60} is not supported: use this adapter with PEFT")
        warnings.warn(f"{CONFIG} has the option {key} = {value!r:.60}, which is unknown here")


# --- appendix: a 4-bit base (NF4) ---
#
# QLoRA (Dettmers et al. 2023, arXiv:2305.14314). The code above runs without it.
from functools import cache

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (their Appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
BLOCK = 64  # weights that share an absmax


class NF4Linear(nn.Module):
    """A frozen linear layer in 4.25 bits a weight: the nearest of NF4 times its block's absmax.

    codes   (bytes,) uint8: two codes a byte, of the flattened weight
    absmax  (blocks,) bfloat16, held as int16 so that .half() does not touch it. The paper quantises
            it once more, to 4.13 bits a weight in all; that saves 15 MB on TinyLlama
    bias    as it was
    Computes in x's dtype. `weight` is W, dequantised on every access.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.kind = type(layer)
        self.transposed = is_transposed(layer)
        self.out_features, self.in_features = features(layer)
        self.bias = layer.bias
        weight = layer.weight.detach()
        flat = weight.flatten().float()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        values = torch.tensor(NF4, device=weight.device)
        middles = (values[1:] + values[:-1]) / 2
        scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(scaled, middles, out_int32=True).byte().view(-1, 2)
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1])
        self.register_buffer("absmax", absmax.bfloat16().view(torch.int16))
        self.register_buffer("dtype_of", weight.new_empty(0), persistent=False)  # .half() casts it
        self.requires_grad_(False).train(layer.training)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W, shaped as it was: (d, k), or (k, d) over Conv1D."""
        # Both values of a byte at once: the temporary index takes 2 bytes a weight, not 8.
        pairs = value_pairs(dtype, self.codes.device)  # (256, 2)
        blocks = pairs.index_select(0, self.codes.int()).view(-1, BLOCK)
        blocks *= self.absmax.view(torch.bfloat16).to(dtype)[:, None]
        d, k = self.out_features, self.in_features
        shape = (k, d) if self.transposed else (d, k)
        return blocks.flatten()[:d * k].view(shape)

    weight = property(lambda self: self.dequantize(self.dtype_of.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NF4Product.apply(x, self)

    def to_dense(self) -> nn.Module:
        """Return a plain layer of the kind that was quantised, with the rounded values."""
        sizes = self.in_features, self.out_features
        with torch.device("meta"):
            layer = self.kind(*(reversed(sizes) if self.transposed else sizes))
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.bias = copy.deepcopy(self.bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@cache
def value_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return (256, 2): for every byte its two values."""
    pairs = [(first, second) for first in NF4 for second in NF4]
    return torch.tensor(pairs, dtype=dtype, device=device)


class NF4Product(torch.autograd.Function):
    """x W^T + b. Keeps nothing for backward: W is frozen, and is dequantised again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        weight = layer.dequantize(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, weight.T if layer.transposed else weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.layer.dequantize(gradient.dtype)
        return gradient @ (weight.T if ctx.layer.transposed else weight), None


@torch.no_grad()
def quantize_nf4(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> list[str]:
    """Put an NF4Linear in place of the linear layers; return their names.

    Call it on the CPU before injecting, then move the model: the device never holds a dense layer.
    The output head, embeddings and names that end in one of skip stay dense; so do, with a warning,
    layers that cannot be packed. Raises ValueError, with the model untouched, when none can.
    """
    if dict(lora_layers(model)):
        raise ValueError("the model carries an adapter: quantise the base first, then inject")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {}
    for name, layer in linear_layers(model).items():
        if layer is head or ends_in(name, skip) or isinstance(layer, NF4Linear):
            continue
        try:
            check_packable(name, layer)
            check_trainable(model, [name], [])  # not tied
        except ValueError as error:
            warnings.warn(f"{error}; it stays dense")
        else:
            layers[name] = layer
    if not layers:
        raise ValueError("there is no linear layer to quantise in this model")
    names = list(layers)
    for name in names:  # one at a time: each dense weight is freed before the next is quantised
        layer = layers.pop(name)
        replace_modules(model, {layer: NF4Linear(layer)})
        del layer
    return names


def check_packable(name: str, layer: nn.Module) -> None:
    weight = layer.weight
    plain = type(layer) is nn.Linear or is_transposed(layer)
    if not plain or weight.is_meta or weight.dtype not in FLOATS or not weight.isfinite().all():
        raise ValueError(f"{name} is no plain linear layer of finite floats, but a "
                         f"{type(layer).__name__} of {weight.dtype} on {weight.device}")


def dequantize_nf4(model: nn.Module) -> None:
    """Put plain layers with the rounded values back in place of every NF4Linear."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    replace_modules(model, {module: module.to_dense() for module in packed})
