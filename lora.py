"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685).

    h = W0 x + (alpha / r) B A x                           Eq. 3, scaled as in Sec. 4.1

    paper      here           shape     trained
    W0         base.weight    (d, k)    never
    A          lora_A         (r, k)    yes, random start
    B          lora_B         (d, r)    yes, zero start: step 0 is the base model, bit for bit
    r          r              number    no, the rank: far below min(d, k)
    alpha / r  scaling        number    no

Use, in any PyTorch model that calls its linear layers:

    config = LoRAConfig(r=8, alpha=16, targets=("q_proj", "v_proj"))
    inject_lora(model, config)                   # freeze the model, wrap these layers
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    ...                                          # your training loop
    save_adapter(model, config, "my-adapter")    # a few MB, in PEFT's format

    load_adapter(model, "my-adapter")            # later, onto the same base
    merge_lora(model)                            # W0 + scaling B A: no latency is added
    strip_lora(model)                            # plain layers again

On a first reading, stop after merging. The appendix (a 4-bit base) can be deleted.

Differences from the paper
- A starts like the weight of nn.Linear, and its input has dropout, as in the authors' code. The
  paper has a Gaussian A, and no dropout.
- Merging is a call. The authors' code merges inside eval(), so that a checkpoint saved then holds
  W0 + B A under W0's name. Here state_dict() raises while merged.
"""
import copy
import json
import math
import warnings
from collections import Counter
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
    alpha       the update is scaled by alpha / r
    dropout     probability, on the adapter's input
    targets     dotted name endings of layers, or "all-linear": all but output head and routers
    also_train  dotted name endings of modules to train in full and save along: a fresh classifier
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
            names = (names,) if isinstance(names, str) else tuple(names)
            object.__setattr__(self, field, names)

        def check(field, valid, expected):
            if not valid:
                raise ValueError(f"{field} is {getattr(self, field)!r}, expected {expected}")

        check("r", isinstance(self.r, Integral) and self.r >= 1, "a whole number, 1 or more")
        check("alpha", isinstance(self.alpha, Real) and 0 < self.alpha < 1e30, "a number above 0")
        check("dropout", isinstance(self.dropout, Real) and 0 <= self.dropout < 1, "0 to below 1")
        check("targets", self.targets, "names of linear layers")
        check("rslora", isinstance(self.rslora, bool), "True or False")

    @property
    def scaling(self):
        # Sec. 4.1: dividing by r keeps the learning rate usable when r changes
        return float(self.alpha / (math.sqrt(self.r) if self.rslora else self.r))


# --- the layer ---

class LoRALinear(nn.Module):
    """h = W0 x + scaling * B A x (Eq. 3): a low-rank update beside a frozen linear layer.

    Maps (..., k) to (..., d). While B is zero, so is dL/dA: the first gradient moves B alone.
    A and B are fp32 whatever the base's dtype: in bf16, 0.02 + 3e-5 rounds back to 0.02.
    """

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
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
        self.unmerged_base = ()  # while merged: (base,), in a tuple so as not to be registered
        self.train(base.training)

    def forward(self, x):
        if self.merged or not self.enabled:
            return self.base(x)
        z = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., k) -> (..., r)
        update = F.linear(z * self.scaling, self.lora_B.to(x.dtype))  # (..., r) -> (..., d)
        h = self.base(x)  # last: recomputation may stop before it
        if not isinstance(h, torch.Tensor):
            raise ValueError(f"{type(self.base).__name__} returns no tensor: do not target it")
        return h + update

    def delta(self):
        """Return the update scaling * B A, (d, k) in fp32."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scaling * (self.lora_B.detach() @ self.lora_A.detach())

    @property
    def merged(self):
        return bool(self.unmerged_base)

    @torch.no_grad()
    def merge(self):
        """Put a dense layer with W0 + scaling * B A in the base's place: no latency (Sec. 4.1).

        Summed in fp32, rounded once. The base waits on the CPU for unmerge().
        """
        if self.merged:
            return
        if not self.enabled:
            raise RuntimeError("cannot merge inside disable_lora")
        dense = dense_copy(self.base)
        delta = self.delta().T if is_transposed(dense) else self.delta()
        dense.weight.copy_(dense.weight + delta)
        self.unmerged_base = (copied(self.base, "cpu"),)
        self.base = dense

    def unmerge(self):
        """Put the base back. (W0 + scaling B A) - scaling B A would not give every bit of W0."""
        if self.merged:
            self.base = copied(self.unmerged_base[0], self.base.weight.device)
            self.unmerged_base = ()

    def refuse_while_merged(self, action):
        if self.merged:
            raise RuntimeError(f"cannot {action} while merged: call unmerge_lora(model) first")

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def _apply(self, fn, recurse=True):
        """Follow model.to(device), but keep A and B in fp32 under model.half()."""
        def keep_dtype(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.base._apply(fn)
        for base in self.unmerged_base:  # the dtype reaches it; it stays on the CPU
            base._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype))
        return super()._apply(keep_dtype, recurse=False)

    def _save_to_state_dict(self, *args):
        self.refuse_while_merged("take a state_dict")  # loaded, it would add the update twice
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Accept a plain checkpoint too: its weight is the base's, and A and B stay."""
        self.refuse_while_merged("load a state_dict")
        for name in self.base.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}base.{name}"] = state_dict.pop(prefix + name)
                state_dict.setdefault(prefix + "lora_A", self.lora_A.detach())
                state_dict.setdefault(prefix + "lora_B", self.lora_B.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)


def features(layer):
    """Return (d, k), the sizes of output and input."""
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    return tuple(reversed(layer.weight.shape))


def is_transposed(layer):
    """True for GPT-2's Conv1D in transformers, packed or not: its weight is (k, d)."""
    return type(layer).__name__ == "Conv1D" or getattr(layer, "transposed", False)


def dense_copy(base):
    """Return a plain layer with the base's values, in tensors of its own."""
    if hasattr(base, "to_dense"):
        return base.to_dense()
    weight = base._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS or weight.is_meta:
        # computed (weight_norm), packed by another library, or on the meta device
        raise ValueError(f"cannot merge into this {type(base).__name__}, which has no dense weight")
    return copied(base, weight.device)


def copied(layer, device):
    """Return a copy of a layer on a device; deepcopy alone would copy a view's whole storage."""
    memo = {id(p): nn.Parameter(p.to(device, copy=True), False) for p in layer.parameters()}
    memo |= {id(buffer): buffer.to(device, copy=True) for buffer in layer.buffers()}
    return copy.deepcopy(layer, memo)  # deepcopy takes from the memo what is there


# --- injection ---

def inject_lora(model, config):
    """Freeze the model, wrap the targets, train also_train (Sec. 4.2); return the wrapped names.

    Create the optimizer afterwards. Raises ValueError, with the model untouched.
    """
    if dict(lora_layers(model)):
        raise ValueError("the model carries an adapter: call strip_lora(model) first")
    layers, heads = select(model, config)
    wrappers = {base: LoRALinear(base, config.r, config.alpha, config.dropout, config.rslora)
                for base in layers.values()}
    model.requires_grad_(False)
    model.zero_grad()  # gradients of pretraining would move the base at the next step
    replace_modules(model, wrappers)
    for head in heads.values():
        head.requires_grad_(True)
        head.before_training = copy.deepcopy(head.state_dict())
    return list(layers)


def replace_modules(model, replacements):
    """Replace each module under every name it has."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replacements.get(child, child)


def lora_layers(model):
    """Yield (name, LoRALinear) for every wrapped layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


def count_parameters(model):
    """Return (trainable, total) weights; a packed layer counts as d x k."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = sum(math.prod(features(m)) for m in model.modules() if hasattr(m, "to_dense"))
    return trainable, packed + sum(p.numel() for p in model.parameters())


# --- merge, switch off, take off ---

def require_lora(model):
    """Return {name: LoRALinear}; raise ValueError if there is none."""
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model carries no adapter: call inject_lora or load_adapter first")
    return layers


def merge_lora(model):
    """Add every update to its base weight; return the model. Merging twice is merging once.

    Raises, with no layer merged, ValueError for a base that has no dense weight, and RuntimeError
    inside disable_lora.
    """
    layers = require_lora(model).values()
    try:
        for layer in layers:
            layer.merge()
    except Exception:
        unmerge_lora(model)
        raise
    return model


def unmerge_lora(model):
    """Put every base weight back, bit for bit; return the model."""
    for layer in require_lora(model).values():
        layer.unmerge()
    return model


def strip_lora(model):
    """Replace every wrapper by its base, merged or not; return the model.

    Modules of also_train stay as trained.
    """
    replace_modules(model, {layer: layer.base for _, layer in lora_layers(model)})
    for module in model.modules():
        module.__dict__.pop("before_training", None)
    return model


@contextmanager
def disable_lora(model):
    """Switch the adapter off inside a with block. Modules of also_train stay as trained."""
    layers = [layer for layer in require_lora(model).values() if layer.enabled]
    try:
        for layer in layers:
            layer.refuse_while_merged("switch off")
            layer.enabled = False
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


# --- which layers can be adapted ---

PARALLEL = nn.DataParallel, nn.parallel.DistributedDataParallel


def select(model, config):
    """Return {name: layer} of what to wrap, and {name: module} of what to train in full."""
    if any(isinstance(module, PARALLEL) for module in model.modules()):
        raise ValueError("DDP would not synchronise a later adapter: inject first, then wrap")
    heads = match(dict(model.named_modules()), config.also_train)
    for name, head in heads.items():
        if list(head.buffers()):  # running statistics, or 4-bit weights
            raise ValueError(f"also_train: {name} has buffers, which are not saved")
    in_heads = set(chain.from_iterable(head.modules() for head in heads.values()))
    layers = {name: layer for name, layer in linear_layers(model).items() if layer not in in_heads}
    if config.targets == ("all-linear",):
        output = getattr(model, "get_output_embeddings", lambda: None)()
        layers = {name: layer for name, layer in layers.items()
                  if layer is not output and not ends_in(name, ["lm_head"])
                  and "Router" not in type(layer).__name__}  # PhiMoE's, Llama 4's: return tuples
    else:
        layers = match(layers, config.targets)
    if not layers:
        raise ValueError("there is no linear layer to adapt")
    refuse_tied(model, layers | heads)
    return layers, heads


def match(modules, endings):
    """Return the modules whose names end in one of the endings. Every ending must match."""
    for ending in endings:
        if not any(ends_in(name, [ending]) for name in modules):
            existing = ", ".join(sorted({name.split(".")[-1] for name in modules} - {""}))
            raise ValueError(f"{ending!r} matches no layer among: {existing}")
    return {name: module for name, module in modules.items() if ends_in(name, endings)}


def ends_in(name, endings):
    """Compare whole dotted parts: q_proj does not end eq_proj."""
    return name != "" and f".{name}".endswith(tuple(f".{ending}" for ending in endings))


# These read their children's weights without calling them: an adapter there is bypassed.
BYPASSING = nn.MultiheadAttention, nn.TransformerEncoderLayer


def linear_layers(model):
    """Return {name: layer} of what can be adapted."""
    layers = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if name and is_linear(module) and not isinstance(parent, BYPASSING):
            layers[name] = module
    return layers


def is_linear(module):
    """True for nn.Linear and its like, Conv1D and packed layers."""
    if hasattr(module, "to_dense"):
        return True  # packed: reading .weight would dequantise it
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    if is_transposed(module):
        return weight.dim() == 2
    packed = not weight.is_floating_point()  # by another library, in another shape
    return hasattr(module, "in_features") and (packed or weight.shape == features(module))


def refuse_tied(model, modules):
    """Raise ValueError if one of these shares a weight with another module."""
    uses = Counter(chain.from_iterable(module._parameters.values() for module in model.modules()))
    for name, module in modules.items():
        if any(uses[parameter] > 1 for parameter in module.parameters()):
            raise ValueError(f"{name} shares a weight (tied embeddings?): both would change")


# --- adapter files, in PEFT's format ---

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

# PEFT 0.21's options: honoured or harmless, and refused if set.
ACCEPTED = set("""
    peft_type r lora_alpha lora_dropout use_rslora init_lora_weights target_modules modules_to_save
    exclude_modules layers_to_transform layers_pattern fan_in_fan_out base_model_name_or_path
    task_type auto_mapping peft_version revision inference_mode megatron_core qalora_group_size
    runtime_config eva_config loftq_config corda_config lora_ga_config""".split())
REFUSED = set("""
    bias lora_bias use_dora use_qalora use_bdlora alora_invocation_tokens arrow_config kasa_config
    monteclora_config velora_config rank_pattern alpha_pattern layer_replication megatron_config
    trainable_token_indices target_parameters ensure_weight_tying""".split())


def adapter_state_dict(model):
    """Return copies of what trains. load_state_dict(copies, strict=False) goes back to them."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model, config, folder):
    """Write adapter_model.safetensors and adapter_config.json, which PEFT and load_adapter read.

    Raises RuntimeError while merged, and ValueError for what load_adapter could not restore.
    """
    from safetensors.torch import save
    while isinstance(model, PARALLEL) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    layers = require_lora(model)
    by_ending = config.targets != ("all-linear",)
    same_layers = not by_ending or match(layers, config.targets) == layers
    for layer in layers.values():
        layer.refuse_while_merged("save")
        if not same_layers or (len(layer.lora_A), layer.scaling) != (config.r, config.scaling):
            raise ValueError(f"this is not the config that was injected: {config}")
    parameters = file_parameters(model, config.also_train)
    saved = set(parameters.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in saved:
            raise ValueError(f"{name} trains but is not saved: inject with it in also_train")
    for key, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{key} holds NaN or infinity")
    zero = [name for name, layer in layers.items() if not layer.lora_B.any()]
    if zero:
        warnings.warn(f"B is still zero in {zero[0]}: an old optimizer, or a layer never called?")

    options = {
        "peft_type": "LORA", "inference_mode": True, "bias": "none",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": int(config.r), "lora_alpha": float(config.alpha),  # numpy's numbers are not JSON's
        "lora_dropout": float(config.dropout), "use_rslora": config.rslora,
        "target_modules": list(config.targets if by_ending else layers),
        "modules_to_save": list(config.also_train) or None,
        "fan_in_fan_out": any(is_transposed(layer.base) for layer in layers.values())}
    tensors = {key: p.detach().to("cpu").contiguous() for key, p in parameters.items()}
    metadata = {"format": "pt", "base": json.dumps(base_sample(model))}
    files = {WEIGHTS: save(tensors, metadata), CONFIG: json.dumps(options, indent=2).encode()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.part").write_bytes(content)
    (folder / CONFIG).unlink(missing_ok=True)  # a crash here leaves no adapter, not a mixed one
    for name in files:
        (folder / f"{name}.part").replace(folder / name)


def file_parameters(model, also_train):
    """Return {key in the file: parameter}: A, B, and the modules of also_train."""
    parameters = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            parameters[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A
            parameters[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B
        elif ends_in(name, also_train):
            parameters.update(module.named_parameters(f"{PREFIX}{name}"))
    return parameters


def base_sample(model):
    """Return 64 weights of the last adapted layer, a spot check; [] if there are no floats."""
    weight = list(require_lora(model).values())[-1].weight
    return weight.flatten()[:64].tolist() if weight.dtype in FLOATS and not weight.is_meta else []


def load_adapter(model, folder):
    """Put a folder's adapter onto the model, replacing any other; return its config.

    Create the optimizer afterwards: loading replaces A and B. Raises RuntimeError while merged,
    and ValueError, with the model as it was, if the files are damaged or for another model.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper prefixes the names
    bases = {}
    for _, layer in lora_layers(model):
        layer.refuse_while_merged("load an adapter")
        bases[layer] = layer.base
    replace_modules(model, bases)  # the file is compared with the plain model
    try:
        config, tensors, sample = read_adapter(model, Path(folder))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is no adapter for this model: {reason}") from None
    finally:
        replace_modules(model, {base: layer for layer, base in bases.items()})

    reset_heads(model)
    inject_lora(strip_lora(model), config)
    for key, parameter in file_parameters(model, config.also_train).items():
        parameter.detach().copy_(tensors[key])
    here = torch.tensor(base_sample(model))
    # Rounding to 4 bits moves the sample by 10%, another seed by 140%.
    if here.shape == sample.shape and (here - sample).norm() > 0.3 * sample.norm():
        warnings.warn(f"{folder} was trained on another base")
    return config


def reset_heads(model):
    """Give the modules of also_train the values back that they had before injecting."""
    for module in model.modules():
        if hasattr(module, "before_training"):
            module.load_state_dict(module.before_training)


def read_adapter(model, folder):
    """Return (config, {key: tensor}, sample of the base). Nothing in the files is executed.

    The tensors have to be exactly those that injecting the config into this plain model makes.
    """
    from safetensors import safe_open
    options = json.loads((folder / CONFIG).read_bytes())
    check_options(options)
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        sample = torch.tensor(json.loads((file.metadata() or {}).get("base", "[]"))).float()

    modules = dict(model.named_modules())
    targets = options.get("target_modules")
    narrowed = options.get("exclude_modules") or options.get("layers_to_transform") is not None
    if narrowed or not isinstance(targets, list):
        # Neither is evaluated, nor a regular expression run: the keys tell the layers.
        targets = [name for name in modules if f"{PREFIX}{name}.lora_A.weight" in tensors]

    def present(endings):  # PEFT lists names that the model may lack: score beside classifier
        return [ending for ending in endings if any(ends_in(name, [ending]) for name in modules)]

    config = LoRAConfig(
        r=options.get("r"), alpha=options.get("lora_alpha"),
        dropout=options.get("lora_dropout", 0.0), targets=present(targets),
        also_train=present(options.get("modules_to_save") or ()),
        rslora=options.get("use_rslora", False))

    layers, _ = select(model, config)
    expected = {key: tuple(p.shape) for key, p in file_parameters(model, config.also_train).items()}
    for name, layer in layers.items():
        d, k = features(layer)
        expected[f"{PREFIX}{name}.lora_A.weight"] = (config.r, k)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (d, config.r)
        # PEFT saves the base of an adapted lm_head along. It must equal this model's.
        base = tensors.pop(f"{PREFIX}{name}.base_layer.weight", None)
        if base is not None and not torch.equal(base, layer.weight.to(base)):
            raise ValueError(f"{WEIGHTS} has another base weight for {name}")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(expected.keys() | shapes.keys()):
        found, wanted = shapes.get(key, "missing"), expected.get(key, "no such entry")
        if found != wanted:
            raise ValueError(f"{key} is {found} in {WEIGHTS}, expected {wanted}")
        if tensors[key].dtype not in FLOATS or not tensors[key].float().isfinite().all():
            raise ValueError(f"{key} is {tensors[key].dtype} or holds NaN")
    return config, tensors, sample


def check_options(options):
    """Raise ValueError for another kind of adapter; warn about unknown options."""
    if options.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG} does not say peft_type LORA")
    init = options.get("init_lora_weights")
    if init not in (True, False, None, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"init_lora_weights = {init!r} changes the base: not supported")
    for key, value in options.items():
        if key in ACCEPTED or value in (None, False, "", "none", [], {}):
            continue
        if key in REFUSED:
            raise ValueError(f"{key} = {value!r:.60} is not supported: use this adapter with PEFT")
        warnings.warn(f"{CONFIG}: the option {key} = {value!r:.60} is unknown here")


# --- appendix: a 4-bit base (NF4) ---
#
# QLoRA (Dettmers et al. 2023, arXiv:2305.14314). The code above runs without this.
from functools import cache

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (their Appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
BLOCK = 64  # weights that share an absmax


class NF4Linear(nn.Module):
    """A frozen linear layer in 4.25 bits a weight: the nearest code of NF4, times an absmax.

    codes   (bytes,) uint8: two codes a byte, of the flattened weight
    absmax  (blocks,) bfloat16, held as int16: .half() must not touch it. The paper packs it too,
            for 4.13 bits a weight
    Computes in x's dtype. `weight` is W, dequantised on every access.
    """

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()
        self.kind = type(layer)
        self.transposed = is_transposed(layer)
        self.out_features, self.in_features = features(layer)
        self.bias = layer.bias
        flat = weight.flatten().float()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        values = torch.tensor(NF4, device=weight.device, dtype=torch.float32)
        middles = (values[1:] + values[:-1]) / 2
        scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(scaled, middles, out_int32=True).byte().view(-1, 2)
        self.register_buffer("codes", codes[:, 0] << 4 | codes[:, 1])
        self.register_buffer("absmax", absmax.bfloat16().view(torch.int16))
        self.register_buffer("dtype_of", weight.new_empty(0), persistent=False)  # .half() casts it
        self.requires_grad_(False).train(layer.training)

    def dequantize(self, dtype):
        """Return W, shaped as it was: (d, k), or (k, d) over Conv1D."""
        # Both values of a byte at once: the index takes 2 bytes a weight, not 8.
        pairs = value_pairs(dtype, self.codes.device)  # (256, 2)
        blocks = pairs.index_select(0, self.codes.int()).view(-1, BLOCK)
        blocks *= self.absmax.view(torch.bfloat16).to(dtype)[:, None]
        d, k = self.out_features, self.in_features
        shape = (k, d) if self.transposed else (d, k)
        return blocks.flatten()[:d * k].view(shape)

    weight = property(lambda self: self.dequantize(self.dtype_of.dtype))

    def forward(self, x):
        return NF4Product.apply(x, self)

    def to_dense(self):
        """Return a plain layer of the kind that was quantised, with its rounded values."""
        sizes = self.in_features, self.out_features
        with torch.device("meta"):
            layer = self.kind(*(reversed(sizes) if self.transposed else sizes))
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.bias = copy.deepcopy(self.bias)
        return layer.train(self.training)


@cache
def value_pairs(dtype, device):
    values = torch.tensor(NF4, dtype=dtype, device=device)
    return torch.cartesian_prod(values, values)


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
def quantize_nf4(model, skip=("lm_head",)):
    """Put an NF4Linear in place of the linear layers; return their names.

    Call it on the CPU before injecting, then move the model: the device never holds a dense layer.
    The output head and names that end in one of skip stay dense, and, with a warning, layers that
    cannot be packed.
    """
    if dict(lora_layers(model)):
        raise ValueError("the model carries an adapter: quantise first, then inject")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    skip = (skip,) if isinstance(skip, str) else skip
    names = []
    for name in list(linear_layers(model)):
        layer = model.get_submodule(name)  # by name: each dense weight is freed before the next
        if layer is head or ends_in(name, skip) or isinstance(layer, NF4Linear):
            continue
        try:
            refuse_tied(model, {name: layer})
            refuse_odd(layer)
            replace_modules(model, {layer: NF4Linear(layer)})
            names.append(name)
        except ValueError as error:
            warnings.warn(f"{name} stays dense: {error}")
    if not names:
        raise ValueError("this model has no linear layer to quantise")
    return names


def refuse_odd(layer):
    """Raise ValueError unless this is nn.Linear or Conv1D with finite floats."""
    weight = layer.weight
    plain = type(layer) is nn.Linear or is_transposed(layer)
    if not plain or weight.is_meta or weight.dtype not in FLOATS or not weight.isfinite().all():
        raise ValueError(f"{type(layer).__name__} in {weight.dtype} on {weight.device} is no plain "
                         "layer of finite floats")


def dequantize_nf4(model):
    """Put a plain layer with the rounded values in place of every NF4Linear."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    replace_modules(model, {module: module.to_dense() for module in packed})
