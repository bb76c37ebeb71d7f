"""The base of an adapted model as a model of its own, without a copy of its weights.

PEFT changes a model that it loads a folder into. So it is given a hollow model of the same class (`hollow.like`), in
which the layers are those of the model at hand: no weight is held twice, and the model stays as it is.
"""

import copy

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .beside import Beside
from .hollow import like

QUANTISATION = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")


def bare_model(model: nn.Module, beside: Beside) -> nn.Module:
    """A model of the same class without adapters, with the same layers and weights, not copies of them; but for those
    that PEFT itself will write into, as it does into a resized embedding."""
    bare = like(model)
    share(bare, model)
    for name in [] if beside.fields else beside.tensors:
        path, _, key = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        layer = copy.copy(bare.get_submodule(path))
        layer._parameters = layer._parameters | {key: nn.Parameter(layer.get_parameter(key).detach().clone(), False)}
        setattr(bare.get_submodule(parent), leaf, layer)
    for name in QUANTISATION:
        if name in model.__dict__:
            setattr(bare, name, model.__dict__[name])
    return bare


def share(fresh: nn.Module, own: nn.Module) -> None:
    """Give a hollow model the parameters, buffers and layers of a model."""
    fresh._parameters.update(own._parameters)
    fresh._buffers.update(own._buffers)
    for name in fresh._modules:
        theirs = under(own._modules[name])
        if theirs is not None and theirs._modules:
            share(fresh.get_submodule(name), theirs)
        else:
            fresh._modules[name] = theirs


def under(module: nn.Module | None) -> nn.Module | None:
    """The base's module under PEFT's wrappers."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module
