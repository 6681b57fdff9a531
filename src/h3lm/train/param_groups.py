"""Optimiser groups from what the modules ask for."""

from collections import defaultdict
from typing import Any, NamedTuple

from torch import nn

from h3lm.ssm import ParameterHint, SSMModule


class Rates(NamedTuple):
    """What one group of parameters is trained with."""

    learning_rate: float
    weight_decay: float


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    ssm_max_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    Every `SSMModule` says by its `training_hints` which of its parameters want another rate or
    decay; everything else is treated alike, biases and norms included, as in the paper's runs.

    Args:
        model: The model.
        learning_rate: Peak rate.
        weight_decay: Common weight decay.
        ssm_max_learning_rate: Upper bound of the rate where a hint has one; the hint's own if
            None.

    Returns:
        Groups for a torch optimiser, the largest first, each with the `names` of its parameters.
    """
    hints: dict[int, ParameterHint] = {}
    for module in model.modules():
        if isinstance(module, SSMModule):
            for name, hint in module.training_hints.items():
                hints[id(getattr(module, name))] = hint
    members: dict[Rates, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hint = hints.get(id(parameter), ParameterHint())
        rate, decay = learning_rate, weight_decay
        if hint.max_learning_rate is not None:
            rate = min(rate, ssm_max_learning_rate or hint.max_learning_rate)
        if hint.weight_decay is not None:
            decay = hint.weight_decay
        members[Rates(rate, decay)].append((name, parameter))
    groups = [
        {
            "params": [parameter for _, parameter in named],
            "names": [name for name, _ in named],
            "lr": rates.learning_rate,
            "weight_decay": rates.weight_decay,
        }
        for rates, named in members.items()
    ]
    return sorted(groups, key=lambda group: -sum(p.numel() for p in group["params"]))


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """A table of groups: sizes, rates, and which parameters."""
    lines = [f"{'parameters':>14} {'tensors':>8} {'rate':>9} {'decay':>6}  which"]
    for i, group in enumerate(groups):
        kinds = sorted({".".join(name.split(".")[-2:]) for name in group["names"]})
        which = ", ".join(kinds) if i else "all others"
        size = sum(p.numel() for p in group["params"])
        lines.append(
            f"{size:>14,} {len(group['names']):>8} {group['lr']:>9.1e} "
            f"{group['weight_decay']:>6.2f}  {which if len(groups) > 1 else 'all'}"
        )
    return "\n".join(lines)
