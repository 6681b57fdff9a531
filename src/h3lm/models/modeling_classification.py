"""Classifiers of token ids, signals and series for transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from h3lm.layers import MLP, mixer
from h3lm.layers.batch_norm import BatchNorm
from h3lm.layers.projection import dtype_of_products
from h3lm.models.configuration_classification import H3ClassificationConfig
from h3lm.models.configuration_h3 import H3Config
from h3lm.models.modeling_h3 import H3PreTrainedModel

# kernels load rows of such lengths fastest, and few lengths mean few plans for FFTs
LENGTH_UNIT = 64


class H3EncoderLayer(GradientCheckpointingLayer):
    """A mixer and an MLP, if there is one, with their norms and residual sums.

    pre:   r = r + dropout(mixer(norm1(r)));   r = r + dropout(mlp(norm2(r)))
    post:  r = norm1(r + dropout(mixer(r)));   r = norm2(r + dropout(mlp(r)))
    """

    def __init__(self, config: H3ClassificationConfig, layer_idx: int) -> None:
        super().__init__()
        name, D = config.mixers[layer_idx], config.hidden_size
        self.pre_norm = config.norm_position == "pre"
        self.both_ways = config.bidirectional
        self.norm1 = _norm(config)
        self.mixer: Any = mixer(name).build(config.mixer_sizes)
        if name == "h3":
            projection: Any = self.mixer.qkv_proj
            projection.gate_bias = config.h3_gate_bias  # a mark for the initialisation
        residual: list[Any] = [] if name != "attention" else [self.mixer.output_proj]
        self.mlp = None
        inner_width = config.inner_width(layer_idx)
        if inner_width is not None:
            self.norm2 = _norm(config)
            self.mlp = MLP(D, inner_width)
            residual.append(self.mlp.down_proj)
        self.dropout = nn.Dropout(config.residual_dropout)
        for projection in residual:  # a mark for the initialisation, as in `H3DecoderLayer`
            projection.adds_to_residual = True

    def forward(self, r: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Advance the residual stream (B, L, D); what stands behind `lengths` is padding."""
        r = self._residual(r, self.norm1, self._mix, lengths)
        if self.mlp is not None:
            mlp = self.mlp
            r = self._residual(r, self.norm2, lambda u, _: mlp(u), lengths)
        return r

    def _residual(
        self, r: Tensor, norm: nn.Module, sublayer: Any, lengths: Tensor | None
    ) -> Tensor:
        if not self.pre_norm:
            return _normalise(norm, self._added(r, r, sublayer, lengths), lengths)
        # in what the sublayer reads, so that it turns and casts nothing
        last = norm is self.norm1 and getattr(self.mixer, "reads_positions_last", False)
        seen = norm._forward_hooks or norm._forward_pre_hooks  # by whoever calls it as a module
        if isinstance(norm, BatchNorm) and not seen:
            u, r = norm.beside(r, lengths, dtype=dtype_of_products(r), positions_last=last)
        else:
            u = _normalise(norm, r, lengths)
        return self._added(r, u, sublayer, lengths)

    def _added(self, r: Tensor, u: Tensor, sublayer: Any, lengths: Tensor | None) -> Tensor:
        """The residual stream r plus what the sublayer makes of u."""
        dropped = self.training and self.dropout.p > 0
        if sublayer == self._mix and not dropped and hasattr(self.mixer, "reads_positions_last"):
            return self._mix(u, lengths, residual=r)
        return r + self.dropout(sublayer(u, lengths))

    def _mix(self, u: Tensor, lengths: Tensor | None, **residual: Tensor) -> Tensor:
        u = u.to(dtype_of_products(u))
        # a causal mixer never sees the padding, since it stands behind
        where = {"lengths": lengths} if self.both_ways else {}
        return self.mixer(u, **where, **residual)[0]


class H3ClassificationPreTrainedModel(H3PreTrainedModel):
    """What classifiers have beyond language models: batch norm, and torch's own spread."""

    config_class = H3ClassificationConfig
    _no_split_modules = ["H3EncoderLayer"]  # noqa: RUF012 (the library's own form)
    _is_stateful = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BatchNorm):
            for parameter, start in ((module.weight, 1.0), (module.bias, 0.0)):
                nn.init.constant_(parameter, start)
            for buffer, start in ((module.running_mean, 0.0), (module.running_var, 1.0)):
                assert buffer is not None
                nn.init.constant_(buffer, start)
        elif self.config.initializer_range is None and isinstance(module, nn.Linear | nn.Embedding):
            linear = isinstance(module, nn.Linear)
            std = module.weight.shape[1] ** -0.5
            nn.init.normal_(module.weight, std=std / 3**0.5 if linear else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
                if hasattr(module, "spreads_bias"):
                    nn.init.normal_(module.bias, std=std / 3**0.5)
        else:
            super()._init_weights(module)
        gate_bias = getattr(module, "gate_bias", 0.0)
        if isinstance(module, nn.Linear) and module.bias is not None and gate_bias:
            q, _, v = module.bias.chunk(3)
            for gate in (q, v):
                nn.init.constant_(gate, gate_bias)


class H3Encoder(H3ClassificationPreTrainedModel):
    """Embedding, blocks and final norm: a sequence to hidden states.

    Its weights have the names of `H3Model`'s.
    """

    def __init__(self, config: H3ClassificationConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        if config.num_channels is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, D)
        else:
            embed_values: Any = nn.Linear(config.num_channels, D)
            # a mark for the initialisation: a layer norm behind one channel whose biases are 0
            # would leave of a signal its sign
            embed_values.spreads_bias = True
            self.embed_values = embed_values
        if config.num_learned_positions:
            self.embed_positions = nn.Embedding(config.num_learned_positions, D)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers: Any = nn.ModuleList(
            H3EncoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = _norm(config) if config.norm_position == "pre" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The map of ids, or of channels, to the width of the model."""
        return self.embed_tokens if self.config.num_channels is None else self.embed_values

    def set_input_embeddings(self, value: Any) -> None:
        """Replace it."""
        name = "embed_tokens" if self.config.num_channels is None else "embed_values"
        setattr(self, name, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        lengths: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Hidden states of the positions that count, from the beginning of each row.

        Args:
            input_ids: (B, L) token ids; or give one of the next two.
            attention_mask: (B, L), zeros at padding, anywhere in a row. Nothing of what stands
                there is seen.
            input_values: (B, L, C) numbers.
            inputs_embeds: (B, L, D) in place of both.
            lengths: (B,), in place of a mask: how many positions of each row count, from its
                beginning; 0 for a row that is not there. No device is waited for, and shapes stay
                as they are.
            output_hidden_states: Whether to return what each layer saw.
            return_dict: False for a plain tuple.
            kwargs: Ignored, as the library passes more than a model needs.

        Returns:
            Hidden states (B, longest row, D). What counted was moved to the beginning of its row;
            behind it they mean nothing.

        Raises:
            ValueError: if not exactly one input is given, or it is not one of this model; or if
                there are a mask and lengths, or a length is not of a row.
        """
        embeds = self.embed(input_ids, input_values, inputs_embeds)
        r, _, seen = self.run(embeds, attention_mask, lengths)
        output = BaseModelOutput(
            last_hidden_state=r, hidden_states=(*seen[:-1], r) if output_hidden_states else None
        )
        return output if return_dict is not False else output.to_tuple()

    def run(
        self, embeds: Tensor, attention_mask: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Hidden states, how many of each row count (None: all), and what each layer saw."""
        if lengths is None:
            most = self.config.num_learned_positions or None
            r, lengths = _to_the_front(embeds, attention_mask, most)
        else:
            if attention_mask is not None or lengths.shape != embeds.shape[:1]:
                raise ValueError("give lengths (B,) in place of an attention_mask, not beside it")
            _check_lengths(lengths, embeds.shape[1])
            r = _without_padding(embeds, lengths)
        if not r.shape[1]:
            raise ValueError("rows without positions have nothing to tell a class by")
        if self.config.num_learned_positions:
            if r.shape[1] > self.config.num_learned_positions:
                raise ValueError(
                    f"a row of {r.shape[1]} positions exceeds the model's "
                    f"{self.config.num_learned_positions} learned positions"
                )
            r = r + self.embed_positions.weight[: r.shape[1]]
        r = self.embedding_dropout(r)
        seen = [r]
        for layer in self.layers:
            r = layer(r, lengths)
            seen.append(r)
        return (r if self.norm is None else _normalise(self.norm, r, lengths)), lengths, seen

    def embed(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """What the blocks take, (..., L, D), from the one input that is given."""
        if sum(x is not None for x in (input_ids, input_values, inputs_embeds)) != 1:
            raise ValueError("give one of input_ids, input_values and inputs_embeds")
        channels = self.config.num_channels
        if inputs_embeds is not None:
            return inputs_embeds
        if input_values is not None:
            if channels is None:
                raise ValueError("this model takes input_ids: its num_channels is None")
            if input_values.shape[-1] != channels:
                raise ValueError(
                    f"input_values has {input_values.shape[-1]} channels, the model {channels}"
                )
            # autocast would leave 8 bits of a signal, and narrow the residual stream
            with torch.autocast(input_values.device.type, enabled=False):
                return self.embed_values(input_values.to(self.embed_values.weight.dtype))
        assert input_ids is not None
        if channels is not None:
            raise ValueError(f"this model takes input_values of {channels} channels, not input_ids")
        return self.embed_tokens(self._checked(input_ids))

    def _checked(self, input_ids: Tensor) -> Tensor:
        # On a GPU the look would stall it, and the embedding asserts on the device by itself
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
            return input_ids
        low, high = int(input_ids.min()), int(input_ids.max())
        last = self.embed_tokens.num_embeddings - 1
        if low < 0 or high > last:
            raise ValueError(f"input_ids go from {low} to {high}, the model has ids 0 to {last}")
        return input_ids


class ClassificationHead(nn.Module):
    """Dropout and a linear map; over pairs, an MLP of both rows, their difference and product."""

    def __init__(self, config: H3ClassificationConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.pair_proj = nn.Linear(4 * D, D) if config.two_documents else None
        self.output_proj = nn.Linear(D, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D), or (B, 2, D) for pairs, to (B, num_labels)."""
        pooled = self.dropout(pooled)
        if self.pair_proj is not None:
            a, b = pooled.unbind(1)
            pooled = F.gelu(self.pair_proj(torch.cat([a, b, a - b, a * b], -1)))
        return self.output_proj(pooled)


class H3ForSequenceClassification(H3ClassificationPreTrainedModel):
    """A class for each sequence, or for each pair of them, by `H3ClassificationConfig`.

    From a language model's folder it takes the encoder, and its head starts anew.
    """

    def __init__(self, config: H3Config) -> None:
        if not isinstance(config, H3ClassificationConfig):
            config = H3ClassificationConfig.of_language_model(config)
        super().__init__(config)
        self.model = H3Encoder(config)
        self.classifier = ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits of the classes; arguments as in `H3Encoder.forward`.

        For pairs (`two_documents`) every input has an axis of 2 behind B, the mask too.

        Args:
            input_ids: (B, L) or (B, 2, L) token ids.
            attention_mask: (B, L) or (B, 2, L), zeros at padding.
            input_values: (B, L, C) or (B, 2, L, C) numbers.
            inputs_embeds: (B, L, D) or (B, 2, L, D).
            labels: (B,) classes.
            lengths: (B,) or (B, 2), in place of a mask where padding stands behind each row.
            output_hidden_states: Whether to return what each layer saw.
            return_dict: False for a plain tuple.
            kwargs: `num_items_in_batch` for the loss; else ignored.

        Raises:
            ValueError: as `H3Encoder.forward`, or if pairs are not pairs.
        """
        embeds = self.model.embed(input_ids, input_values, inputs_embeds)
        if self.config.two_documents:
            if embeds.dim() != 4 or embeds.shape[1] != 2:
                found = tuple(embeds.shape[:-1])
                raise ValueError(f"a model of pairs takes inputs (B, 2, L), here it is {found}")
            embeds = embeds.flatten(0, 1)
            attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
            lengths = None if lengths is None else lengths.flatten()
        elif embeds.dim() != 3:
            found = tuple(embeds.shape[:-1])
            raise ValueError(f"a model of single rows takes inputs (B, L), here it is {found}")
        hidden, lengths, seen = self.model.run(embeds, attention_mask, lengths)
        pooled = _pool(hidden, lengths, self.config.pooling)
        if self.config.two_documents:
            pooled = pooled.unflatten(0, (-1, 2))
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=(*seen[:-1], hidden) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


def _norm(config: H3ClassificationConfig) -> nn.Module:
    kind = BatchNorm if config.norm == "batch" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


def _normalise(norm: nn.Module, r: Tensor, lengths: Tensor | None) -> Tensor:
    return norm(r, lengths) if isinstance(norm, BatchNorm) else norm(r)


def _to_the_front(
    embeds: Tensor, attention_mask: Tensor | None, most: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Move what counts to the beginning of each row, in its order; padding stands behind it.

    A causal mixer then never sees padding, and one that runs both ways needs to know lengths only.

    Args:
        embeds: (B, L, D).
        attention_mask: (B, L), zeros at padding.
        most: Positions up to which rows may be padded.

    Returns:
        (B, the longest in units of `LENGTH_UNIT` but at most L, D), and lengths (B,) or None where
        there is no padding.
    """
    if attention_mask is None:
        return embeds, None
    if attention_mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}, the input {tuple(embeds.shape[:2])}"
        )
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    longest = embeds.shape[1]
    if not torch.compiler.is_compiling():
        shortest, longest = torch.stack(lengths.aminmax()).tolist()
        if shortest == embeds.shape[1]:
            return embeds, None
        if not shortest:
            raise ValueError("a row of the attention_mask hides everything: leave that row out")
        padded = min(-LENGTH_UNIT * (-longest // LENGTH_UNIT), embeds.shape[1], most or 10**9)
        longest = max(longest, padded)
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    front = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
    return _without_padding(front, lengths), lengths


def _check_lengths(lengths: Tensor, most: int) -> None:
    """Refuse lengths beyond the rows, on the CPU: nothing else is waited for."""
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or not len(lengths):
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > most:
        raise ValueError(f"lengths go from {low} to {high}, rows have {most} positions")


def _without_padding(embeds: Tensor, lengths: Tensor) -> Tensor:
    """Zeros behind each row: an FFT would spread the rounding of what stands there over it."""
    padding = torch.arange(embeds.shape[1], device=embeds.device) >= lengths[:, None]
    return embeds.masked_fill(padding[..., None], 0)


def _pool(hidden: Tensor, lengths: Tensor | None, how: str) -> Tensor:
    """One vector for each row, (B, D); zeros for a row without anything."""
    if lengths is None:
        return hidden[:, -1] if how == "last" else hidden.mean(1)
    if how == "last":
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths.clamp(min=1) - 1]
        return last.masked_fill(lengths[:, None] == 0, 0)
    valid = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    total = hidden.masked_fill(~valid[..., None], 0).sum(1)
    return total / lengths[:, None].clamp(min=1).to(hidden.dtype)


AutoConfig.register(H3ClassificationConfig.model_type, H3ClassificationConfig, exist_ok=True)
AutoModel.register(H3ClassificationConfig, H3Encoder, exist_ok=True)
AutoModelForSequenceClassification.register(
    H3ClassificationConfig, H3ForSequenceClassification, exist_ok=True
)
# A language model's folder too; `register` allows one configuration for a class
AutoModelForSequenceClassification._model_mapping.register(
    H3Config, H3ForSequenceClassification, exist_ok=True
)
