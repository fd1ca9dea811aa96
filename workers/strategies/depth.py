"""Which layer a parameter belongs to, whatever the family of the model."""

from torch import nn


def find_layers(model: nn.Module, num_layers: int = 0) -> tuple[str, int]:
    """The stack of decoder layers: its name within the model, and how many there are.

    The candidates are the module lists that lie in no other one (a layer's experts are a list, too). One of
    `num_layers` members is taken before a longer one: a vision tower may be deeper than the decoder.

    Raises:
        ValueError: The model has no list of modules.
    """
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not is_inner:
            found.append((name, len(module)))
    if not found:
        raise ValueError("the model has no list of layers that could be told apart")
    return max(found, key=lambda stack: (stack[1] == num_layers, stack[1]))


def embedding_names(model: nn.Module) -> frozenset[str]:
    """Parameters of embedding tables, canonical names: a head tied to one is the same parameter."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return frozenset(name for name, p in model.named_parameters() if id(p) in tables)


def layer_depths(model: nn.Module, num_layers: int = 0) -> dict[str, int]:
    """Depth of every parameter: 0 for embeddings, 1 to L for layers, L + 1 for what follows them.

    Raises:
        ValueError: The model has no list of layers.
    """
    stack, count = find_layers(model, num_layers)
    embeddings = embedding_names(model)
    depths = {}
    for name, _ in model.named_parameters():
        if name.startswith(f"{stack}."):
            depths[name] = int(name.removeprefix(f"{stack}.").partition(".")[0]) + 1
        else:
            depths[name] = 0 if name in embeddings else count + 1
    return depths
