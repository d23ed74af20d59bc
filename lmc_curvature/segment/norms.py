"""The weight-carrying module that a normalisation belongs to, told from the order in which modules are registered."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# What blocks that register their normalisations after what these feed call the first: Llama and its like, and ViT.
_OF_THE_INPUT = re.compile(r"^input_|_before$")


def weights_of_norms(model: nn.Module) -> dict[str, str]:
    """Name of each normalisation to the name of the weight-carrying module that it belongs to, if there is one.

    That is the module registered right before it. In a parent that normalises what its modules take in, it is the
    module that the normalisation feeds: where the first child with weights is a normalisation, the next one; where the
    parent says `norm_first`, or calls its first normalisation one of the input (`input_layernorm`), they feed the other
    children in order. One that feeds nothing in its parent stays with what precedes.
    """
    names = {module: name for name, module in model.named_modules()}
    fed = {norm: weights for parent in names for norm, weights in _fed(parent, names)}
    joined: dict[str, str] = {}
    previous = None
    for module, name in names.items():
        if name == "" or ".parametrizations." in name:
            continue
        if module in fed:
            joined[name] = names[fed[module]]
        elif _is_normalization(module):
            if previous is not None:
                joined[name] = previous
            previous = None
        elif _carries(module):
            previous = name
    return joined


def _fed(parent: nn.Module, names: Mapping[nn.Module, str]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each normalisation of a parent that feeds one of its children, and the first module there with weights."""
    below = [list(filter(_carries, child.modules())) for child in parent.children()]
    children = [modules for modules in below if modules]
    norms = [child for child in children if _is_norm(child)]
    others = [child for child in children if not _is_norm(child)]
    if not norms or not others:
        return
    if _is_norm(children[0]):
        runs = [list(run) for _, run in groupby(children, _is_norm)]
        # Several side by side feed what follows one by one; where less follows, the last of them do.
        pairs = [
            pair
            for run, after in zip(runs[::2], runs[1::2], strict=False)
            for pair in zip(run[-len(after) :], after, strict=False)
        ]
    elif len(norms) <= len(others) and _says_norm_first(parent, names[norms[0][0]], others):
        pairs = list(zip(norms, others, strict=False))
    else:
        return
    for (norm, *_), child in pairs:
        yield norm, next(module for module in child if not _is_normalization(module))


def _says_norm_first(parent: nn.Module, first_norm: str, others: Sequence[Sequence[nn.Module]]) -> bool:
    if getattr(parent, "norm_first", False) is True:
        # A stack of blocks may say so of them; its own normalisation comes after all.
        return not any(_is_normalization(module) for child in others for module in child)
    return bool(_OF_THE_INPUT.search(first_norm.rpartition(".")[2]))


def _carries(module: nn.Module) -> bool:
    statistics = isinstance(module, _NormBase) and module.running_mean is not None
    own = next(module.parameters(recurse=False), None) is not None
    return own or statistics or hasattr(module, "parametrizations")


def _is_norm(child: Sequence[nn.Module]) -> bool:
    """Whether a child is a normalisation, or wraps one and nothing else that has weights."""
    return len(child) == 1 and _is_normalization(child[0])


def _is_normalization(module: nn.Module) -> bool:
    # Networks bring norms of their own (LlamaRMSNorm, LayerNorm2d): the name is what they have in common.
    named_so = "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
    return named_so or isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm))
