"""What a trained H3 does along one sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from h3lm.errors import UserError
from h3lm.flashconv import fft_conv, ssm_conv
from h3lm.layers import H3
from h3lm.models.modeling_h3 import H3ForCausalLM
from h3lm.synthetics.tasks import Dataset


@dataclass(frozen=True)
class LayerTrace:
    """The inside of one H3 layer (head dimension 1) on one row; all (D, L), channel first.

    Attributes:
        taps: Shift filter, (D, n_taps).
        k: Keys.
        shifted: Keys behind the shift filter.
        v: Values.
        written: shifted * v, what enters the diagonal SSM.
        held: Output of the diagonal SSM: what the state says.
        q: Queries, which open it.
        o: q * held, what is read.
        worth: What the right answer's log odds lose where the channel's o is zero everywhere, (D,).
    """

    taps: Tensor
    k: Tensor
    shifted: Tensor
    v: Tensor
    written: Tensor
    held: Tensor
    q: Tensor
    o: Tensor
    worth: Tensor


@dataclass(frozen=True)
class Trace:
    """One row, what the model thinks of its end, and its H3 layers.

    Attributes:
        tokens: The row, printed.
        answer: The right answer, printed.
        vocabulary: Printed form of each id.
        probabilities: The model's, of the token after the row.
        layers: Traces of the H3 layers, first to last.
    """

    tokens: list[str]
    answer: str
    vocabulary: list[str]
    probabilities: Tensor
    layers: list[LayerTrace]


def trace(model: H3ForCausalLM, data: Dataset, row: int | None = None) -> Trace:
    """Run a model on a test row and keep what its H3 layers compute.

    Args:
        model: A model whose H3 layers have heads of one channel.
        data: The task's rows.
        row: Which test row; the first that the model answers rightly if None.

    Raises:
        UserError: if no layer is such an H3 layer.
    """
    chosen = [layer for layer in model.model.layers if isinstance(layer.mixer, H3)]
    if not chosen or any(layer.mixer.head_dim != 1 for layer in chosen):
        raise UserError("only H3 layers with heads of one channel can be traced")
    inputs = torch.from_numpy(data.test.inputs)
    answers = torch.from_numpy(data.test.targets[:, -1])
    if row is None:
        with torch.no_grad():
            right = model(inputs, use_cache=False).logits[:, -1].argmax(-1) == answers
        row = int(right.int().argmax())
    entered: list[Tensor] = []
    hooks = [
        layer.mixer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        for layer in chosen
    ]
    ids, answer = inputs[row : row + 1], int(answers[row])
    with torch.no_grad():
        try:
            logits = model(ids, use_cache=False).logits[0, -1]
        finally:
            for hook in hooks:
                hook.remove()
        layers = []
        for layer, u in zip(chosen, entered, strict=True):
            without = _silenced(model, layer.mixer, ids)
            worth = _log_odds(logits, answer) - _log_odds(without, answer)
            layers.append(_trace_layer(layer.mixer, u, worth))
    tokens = data.task.tokens
    return Trace(
        tokens=[tokens[i] for i in inputs[row].tolist()],
        answer=tokens[int(answers[row])],
        vocabulary=list(tokens),
        probabilities=logits.softmax(-1),
        layers=layers,
    )


def _silenced(model: H3ForCausalLM, mixer: H3, ids: Tensor) -> Tensor:
    """Logits behind the row with each of the mixer's channels at zero, (D, vocab)."""
    D = mixer.d_model
    others = 1 - torch.eye(D)[:, None]  # [D rows, 1, D channels]

    def silence(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return ((args[0].unflatten(0, (D, -1)) * others).flatten(0, 1),)

    hook = mixer.output_proj.register_forward_pre_hook(silence)
    try:
        return model(ids.expand(D, -1), use_cache=False).logits[:, -1]
    finally:
        hook.remove()


def _log_odds(logits: Tensor, answer: int) -> Tensor:
    others = logits.clone()
    others[..., answer] = -torch.inf
    return logits[..., answer] - others.logsumexp(-1)


def _trace_layer(mixer: H3, u: Tensor, worth: Tensor) -> LayerTrace:
    q, k, v = mixer.qkv_proj(u).mT.chunk(3, 1)
    taps, system = mixer.shift_ssm.taps(), mixer.diagonal_ssm.system()
    shifted = fft_conv(k, taps[:, : k.shape[-1]])
    written = shifted * v
    held, _ = ssm_conv(written, system)
    o = q * held
    return LayerTrace(
        taps=taps,
        k=k[0],
        shifted=shifted[0],
        v=v[0],
        written=written[0],
        held=held[0],
        q=q[0],
        o=o[0],
        worth=worth,
    )
