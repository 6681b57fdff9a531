"""H3 language models for transformers."""

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import StaticLayer
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from h3lm.layers import H3, Block, CausalAttention
from h3lm.layers.attention import Rotation
from h3lm.layers.long_conv import LongConv
from h3lm.layers.projection import project_channel_first, project_channel_last
from h3lm.layers.recurrence import Recurrence
from h3lm.layers.step import (
    Stream,
    add_norm,
    attend_step,
    can_advance,
    can_multiply,
    can_norm,
    product,
)
from h3lm.models import decoding, kept
from h3lm.models.cache import DecodingCache, RingLayer, check_room, prepare_cache
from h3lm.models.configuration_h3 import NOT_CAUSAL, H3Config
from h3lm.models.loss import IGNORED, head_loss
from h3lm.models.slices import RowSlice, past_cut, stand_in
from h3lm.ssm import SSMModule

logger = logging.getLogger("h3lm.models")


@dataclass(frozen=True)
class Where:
    """Which positions the layers of one call see, made once for all of them.

    Attributes:
        padding: (B, L), zero at padding; for mixers with a state of constant size.
        cu_seqlens: Boundaries of packed documents in the rows laid end to end.
        bias: Attention mask (B, 1, L, S), or None for plain causal attention.
        rotation: Rotary embedding of the positions.
        step: The cache whose rows each advance by one position in place, or None.
        slice: Which part of the rows this process holds, or None for all.
    """

    padding: Tensor | None
    cu_seqlens: Tensor | None
    bias: Tensor | None
    rotation: Rotation | None
    step: DecodingCache | None = None
    slice: RowSlice | None = None


class H3DecoderLayer(GradientCheckpointingLayer, Block):
    """A block whose mixer keeps its state in a generation cache."""

    def __init__(self, config: H3Config, layer_idx: int) -> None:
        super().__init__(
            config.mixers[layer_idx],
            config.mixer_sizes,
            config.inner_width(layer_idx),
            dropout=config.residual_dropout,
            norm_eps=config.layer_norm_eps,
        )
        self.layer_idx = layer_idx
        # Marks for the initialisation, as in the release: what a layer adds to the residual stream
        # starts smaller, but for H3's own output projection; without an MLP it is the mixer's
        residual: list[Any] = [] if self.mlp is None else [self.mlp.down_proj]
        if self.mixer_name == "attention" or config.scale_h3_output or self.mlp is None:
            residual.append(self.mixer.output_proj)
        for projection in residual:
            projection.adds_to_residual = True

    def forward(  # type: ignore[override]  # the state goes to the cache, not to the caller
        self, r: Tensor, where: Where, cache: Cache | None = None
    ) -> Tensor:
        """Advance the residual stream (B, L, D)."""
        return self.compute(r, where, cache)

    def compute(self, r: Tensor, where: Where, cache: Cache | None) -> Tensor:
        """`forward` without what the library wraps it in: what a compiler may take."""
        u = self.norm1(r)
        aside = None if where.slice is None else stand_in(r)
        if where.step is not None:
            mixed = self._step(u, where, where.step)
        elif isinstance(self.mixer, CausalAttention):
            q, k, v = self.mixer.project(u, where.rotation)
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
                if where.bias is None and q.shape[2] > 1 and _has_room(cache, self.layer_idx):
                    # nothing seen before: there is room behind the prompt, no keys
                    k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
            if where.slice is not None:
                k = where.slice.up_to_here(k)
                v = where.slice.up_to_here(v)
                r = past_cut(r, aside)
            mixed = self.mixer.attend(q, k, v, where.bias)
        elif where.slice is not None:
            # The mixer's parts by hand: a compiled block is cut where others send something, and
            # keeps what stands on either side in one piece only if that is in this frame
            qkv = project_channel_first(self.mixer.qkv_proj, u)
            o, _ = self.mixer.core_of_slice(
                qkv, process_group=where.slice.group, cu_seqlens=where.cu_seqlens,
                with_state=False, received=where.slice.received,
            )  # fmt: skip
            r = past_cut(r, aside)
            mixed = project_channel_last(self.mixer.output_proj, o)
        elif where.cu_seqlens is not None:
            mixed, _ = self.mixer(u.reshape(1, -1, u.shape[2]), cu_seqlens=where.cu_seqlens)
            mixed = mixed.view_as(u)
        else:
            mixed = self._mix_with_state(u, where, cache)
        return self.finish(r, mixed)

    def _step(self, u: Tensor, where: Where, cache: DecodingCache) -> Tensor:
        """One position of each row, over the memory of the cache."""
        stored = cache.layers[self.layer_idx]
        if isinstance(self.mixer, CausalAttention):
            return self.mixer.step(
                u, stored.keys, stored.values, cache.lengths, cache.longest, where.rotation
            )
        return self._mix_with_state(u, where, cache)

    def can_advance(self, r: Tensor, cache: DecodingCache) -> bool:
        """Whether a step may go through `advance`."""
        if isinstance(self.mixer, H3):
            stored = cache.layers[self.layer_idx]
            fits = isinstance(stored, RingLayer) and stored.ring() is not None
        else:
            fits = isinstance(self.mixer, CausalAttention)
        return fits and can_advance(self, r)

    def step_core(self, where: Where, cache: DecodingCache, qkv: Tensor) -> Tensor:
        """What `advance` needs of the mixer: one position of each row, (rows, 3 D) to (rows, D)."""
        stored = cache.layers[self.layer_idx]
        if isinstance(self.mixer, CausalAttention):
            return attend_step(qkv, stored.keys, stored.values, cache.lengths, where.rotation)
        # in the chain of kernels in front of it none writes this layer's state
        mixed = self.mixer.step_core(qkv, stored.ring(), stored.operators, early=True)
        stored.stepped(move=False)
        return mixed

    def _mix_with_state(self, u: Tensor, where: Where, cache: Cache | None) -> Tensor:
        if cache is None:
            return self._mix_and_forget(u, None, where)
        stored = cache.layers[self.layer_idx]
        if isinstance(stored, RingLayer) and u.shape[1] == 1 and where.padding is None:
            ring = None if torch.is_grad_enabled() else stored.ring()
            if ring is not None:
                mixed = self.mixer.step_in_place(u, ring, stored.operators)
                stored.stepped()
                return mixed
        packed = stored.read()
        state = None if packed is None else self.mixer.unpack_state(*packed)
        if not stored.keeps:
            return self._mix_and_forget(u, state, where)
        mixed, state = self.mixer(u, state, mask=where.padding)
        stored.write(self.mixer.pack_state(state), u.shape[1])
        return mixed

    def _mix_and_forget(self, u: Tensor, state: Any, where: Where) -> Tensor:
        may_forget = isinstance(self.mixer, H3 | Recurrence | LongConv)
        unneeded = {"with_state": False} if may_forget else {}
        return self.mixer(u, state, mask=where.padding, **unneeded)[0]


class H3PreTrainedModel(PreTrainedModel):
    """Weights, initialisation and what the library should know of the family."""

    config_class = H3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["H3DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state can't be rolled back: no assisted generation
    _can_compile_fullgraph = True
    # A decay in bfloat16 is another model (see `ssm.SSMModule`)
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "shift_ssm", "diagonal_ssm", "dplr_ssm", "backward_readout", "long_filter",
        "backward_filter",
    ]  # fmt: skip

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: else saving what came by remote code would copy our source."""

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, SSMModule):
            self._init_ssm(module)
        elif isinstance(module, nn.Linear | nn.Embedding):
            if getattr(module, "adds_to_residual", False):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LongConv):
            nn.init.ones_(module.skip)

    @staticmethod
    def _init_ssm(module: SSMModule) -> None:
        parameters = dict(module.named_parameters(recurse=False))
        loaded = {
            name: parameter.detach().clone()
            for name, parameter in parameters.items()
            if getattr(parameter, "_is_hf_initialized", False)
        }
        if len(loaded) < len(parameters):
            module.reset_parameters()
            with torch.no_grad():
                for name, value in loaded.items():
                    parameters[name].copy_(value)


class H3Model(H3PreTrainedModel):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, config: H3Config) -> None:
        if config.mixer_sizes.bidirectional:  # a classifier's config
            raise ValueError(NOT_CAUSAL)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.num_learned_positions:
            self.embed_positions = nn.Embedding(config.num_learned_positions, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        # Any: a ModuleList forgets what it holds
        self.layers: Any = nn.ModuleList(
            H3DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.process_group: ProcessGroup | None = None  # see `slices.share_rows`
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of every position.

        Args:
            input_ids: (B, L) token ids; or give `inputs_embeds`.
            attention_mask: (B, S) with zeros at padding, S counting what the cache has seen.
                A model of attention alone takes (B, 1, L, S) too; behind a filled cache any
                does, of which it says to attention which keys are there.
            position_ids: (B, L). Where they restart within a row (and no attention mask or
                filled cache is given), documents are packed: none sees another's state or keys.
            past_key_values: Cache to continue; filled in place.
            inputs_embeds: (B, L, D) in place of `input_ids`.
            use_cache: Whether to return a cache; by default as configured, but not in training.
            output_hidden_states: Whether to return what each layer saw.
            cu_seq_lens_q: Boundaries of packed documents in one row (B = 1), as the library's
                flattening collator gives them; needed under `torch.compile`, where positions
                can't be looked at.
            return_dict: False for a plain tuple.
            kwargs: Ignored, as the library passes more than a model needs.

        Raises:
            ValueError: if both or neither of ids and embeddings are given, an id is out of range
                (on the CPU), a position exceeds the learned table, or a mask or positions are not
                of the inputs' shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, exactly one of them")
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if past_key_values is not None or use_cache:
            past_key_values = prepare_cache(past_key_values, self.config)
            check_room(past_key_values, inputs_embeds.shape[1])
        where, position_ids = self._where(
            inputs_embeds, attention_mask, position_ids, past_key_values, cu_seq_lens_q
        )
        r = inputs_embeds
        if self.config.num_learned_positions:
            r = r + self.embed_positions(self._check_positions(position_ids))
        r = self.embedding_dropout(r)
        seen = (r,) if output_hidden_states else ()
        if where.step is not None and not seen and self._can_advance(r, where.step):
            r = self._advance(r, where, where.step)
        else:
            for layer in self.layers:
                r = layer(r, where, past_key_values)
                if output_hidden_states:
                    seen = (*seen, r)
            r = self.norm(r)
        output = BaseModelOutputWithPast(
            last_hidden_state=r,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*seen[:-1], r) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _can_advance(self, r: Tensor, cache: DecodingCache) -> bool:
        blocks = all(layer.can_advance(r, cache) for layer in self.layers)
        return blocks and can_norm(self.norm, r)

    def _advance(self, r: Tensor, where: Where, cache: DecodingCache) -> Tensor:
        """All layers and the last norm for one position of each row, (B, 1, D)."""
        stream = Stream(r[:, 0].contiguous())
        for layer in self.layers:
            stream = layer.advance(stream, functools.partial(layer.step_core, where, cache))
        r = add_norm(stream, self.norm)[1][:, None]
        if cache.ring.steps is not None:  # not in front of it: a plain kernel parts the chain
            cache.ring.move()
        return r

    def _where(
        self,
        embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Where, Tensor]:
        """Resolve masks, positions and packing into what the layers need."""
        B, L, _ = embeds.shape
        if not isinstance(attention_mask, Tensor | dict | None):
            raise ValueError(
                f"attention_mask must be a tensor, not {type(attention_mask).__name__}"
            )
        masks = attention_mask if isinstance(attention_mask, dict) else None
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        rows = mask if mask is not None and mask.dim() == 2 else None
        if isinstance(cache, DecodingCache) and cache.stepping:
            position_ids = cache.lengths[:, None]
            return Where(None, None, None, self._rotation(position_ids), cache), position_ids
        if self.process_group is not None:
            return self._where_in_rows(embeds, attention_mask, position_ids, cache, cu_seqlens)
        seen = 0 if cache is None else cache.get_seq_length()
        self._check_mask(mask, position_ids, B, L, seen)
        if cu_seqlens is not None:
            position_ids = _positions_in(cu_seqlens, L)
        elif position_ids is None:
            if rows is not None:
                position_ids = (rows.long().cumsum(1) - 1).clamp(min=0)[:, -L:]
            else:
                position_ids = (torch.arange(L, device=embeds.device) + seen)[None]
        elif attention_mask is None and isinstance(seen, int) and seen == 0:
            cu_seqlens = _packed_boundaries(position_ids, B)

        if masks is not None:  # made by `generate` for a compilable cache
            bias, padding = masks.get("full_attention"), masks.get("linear_attention")
        else:
            padding = None if rows is None else _padding(rows, L)
            # prompts in a decoding cache have no padding: plain causal attention, and no mask of
            # length times length
            plain = isinstance(cache, DecodingCache)
            bias = None if plain else self._bias(embeds, mask, position_ids, cache, cu_seqlens)
        return Where(padding, cu_seqlens, bias, self._rotation(position_ids)), position_ids

    def _where_in_rows(
        self,
        embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Where, Tensor]:
        """`_where` for a slice of the rows, by positions that count over all slices."""
        if attention_mask is not None or cache is not None or cu_seqlens is not None:
            raise ValueError(
                "rows over several processes take no attention_mask, no cache and no "
                "cu_seq_lens_q: position_ids that restart mark packed documents"
            )
        assert self.process_group is not None
        part = RowSlice.of(embeds, self.process_group, self.layers)
        boundaries = bias = None
        if position_ids is None:  # nothing is packed, and no device need be asked
            position_ids = part.positions(embeds.device)
        else:
            boundaries = part.boundaries(position_ids, len(embeds))
            if "full_attention" in self.config.layer_types:
                bias = part.attention_mask(position_ids)
        rotation = self._rotation(position_ids)
        return Where(None, boundaries, bias, rotation, slice=part), position_ids

    def _bias(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor | None:
        if "full_attention" not in self.config.layer_types:
            return None
        if attention_mask is None and cache is None and cu_seqlens is None:
            return None  # under a CUDA graph the library would make a mask of length times length
        return create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=None if cu_seqlens is not None else cache,
            position_ids=position_ids if cu_seqlens is not None else None,
        )

    def _rotation(self, position_ids: Tensor) -> Rotation | None:
        mixers = (getattr(layer, "mixer", None) for layer in self.layers)
        attention = next((m for m in mixers if isinstance(m, CausalAttention)), None)
        return None if attention is None else attention.rotation(position_ids)

    def _check_ids(self, input_ids: Tensor) -> None:
        # On a GPU the look would stall it, and the embedding asserts on the device by itself
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        last = self.embed_tokens.num_embeddings - 1
        if low < 0 or high > last:
            raise ValueError(
                f"input_ids go from {low} to {high}, the model has ids 0 to {last}: "
                "is this its tokenizer?"
            )

    def _check_mask(
        self, mask: Tensor | None, position_ids: Tensor | None, B: int, L: int, seen: Any
    ) -> None:
        """Refuse what would be broadcast, cut or left aside without a word."""
        if torch.compiler.is_compiling():
            return
        if position_ids is not None and (
            position_ids.dim() < 2
            or position_ids.shape[-2] not in (1, B)
            or position_ids.shape[-1] != L
        ):
            raise ValueError(
                f"position_ids is {tuple(position_ids.shape)} for {B} rows of {L} positions"
            )
        if mask is None:
            return
        if mask.dim() == 4 and (seen or set(self.config.layer_types) == {"full_attention"}):
            return  # behind a cache it tells attention which slots of keys are filled
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)}: give (B, S), zeros at padding; what one "
                "position sees of others is attention's alone. position_ids that restart, or "
                "cu_seq_lens_q, keep documents apart"
            )
        needed = (B, seen + L) if isinstance(seen, int) else (B, mask.shape[1])
        if mask.shape != needed:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)}, these inputs need {needed}: a number for "
                "each position of each row, with those that the cache has seen"
            )

    def _check_positions(self, position_ids: Tensor) -> Tensor:
        limit = self.config.num_learned_positions
        look = position_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and int(position_ids.max()) >= limit:
            raise ValueError(
                f"position {int(position_ids.max())} exceeds the model's {limit} learned positions"
            )
        return position_ids


class H3ForCausalLM(H3PreTrainedModel, GenerationMixin):
    """H3, hybrid or Transformer language model, by `H3Config.mixers`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: H3Config) -> None:
        super().__init__(config)
        self.model = H3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def train(self, mode: bool = True) -> "H3ForCausalLM":
        """Switch mode; what `generate` kept on the device is freed for training."""
        if mode:
            kept.forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "H3ForCausalLM":
        kept.forget(self)
        return super()._apply(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Linear:
        """The language model head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token at every position; arguments as in `H3Model.forward`.

        Args:
            input_ids: (B, L) token ids.
            attention_mask: (B, S), zeros at padding.
            position_ids: (B, L); restarts mark packed documents.
            past_key_values: Cache to continue.
            inputs_embeds: (B, L, D) in place of ids.
            labels: (B, L) token ids, -100 where there is no target; shifted inside.
            use_cache: Whether to return a cache.
            output_hidden_states: Whether to return what each layer saw.
            logits_to_keep: Compute the last so many logits only (0: all), or those at positions.
            return_dict: False for a plain tuple.
            skip_logits: Return the loss of `labels` alone, for which the logits are never whole.
            kwargs: `cu_seq_lens_q` for packed rows; `shift_labels`, already shifted, and
                `num_items_in_batch` for the loss.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        if labels is not None and self.model.process_group and "shift_labels" not in kwargs:
            raise ValueError("rows over several processes take shift_labels: shift before slicing")
        if skip_logits and labels is not None and type(self.lm_head) is nn.Linear:
            targets = kwargs.get("shift_labels")
            if targets is None:
                targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            lean = CausalLMOutputWithPast(
                loss=head_loss(
                    hidden.last_hidden_state, self.lm_head.weight, targets,
                    kwargs.get("num_items_in_batch"),
                ),
                hidden_states=hidden.hidden_states,
            )  # fmt: skip
            return lean if return_dict is not False else lean.to_tuple()
        # 0 keeps all: a slice from minus zero is a slice from the start
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._head(hidden.last_hidden_state[:, keep], past_key_values)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=hidden.past_key_values,
            hidden_states=hidden.hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()

    def _head(self, hidden: Tensor, cache: Cache | None) -> Tensor:
        if isinstance(cache, DecodingCache) and cache.stepping:
            x = hidden[:, 0].contiguous()
            if can_multiply(self.lm_head, x):
                return product(self.lm_head, x)[:, None]
        return self.lm_head(hidden)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Embedding:
        """Resize embedding and head; ids below `new_num_tokens` count as the tokenizer's."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None and self.config.tokenizer_vocab_size is not None:
            self.config.tokenizer_vocab_size = new_num_tokens
        return embedding

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # The library makes the cache; its layers for constant states are exchanged for ours
        given = model_kwargs.get("past_key_values") is not None
        if given:
            needed = kwargs.get("max_cache_length", args[-1] if args else 0)
            check_room(model_kwargs["past_key_values"], needed)
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        if isinstance(model_kwargs.get("past_key_values"), Cache):
            cache = prepare_cache(model_kwargs["past_key_values"], self.config)
            cache.made_by_generate = not given and generation_config.cache_implementation is None
        return result

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The library's loop, or ours where it gives the same tokens without work on the host."""
        decoding.check_prompts(input_ids, model_kwargs)
        why_not = decoding.refusal(
            self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus,
            model_kwargs,
        )  # fmt: skip
        if why_not is None:
            return decoding.generate(
                self, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
                model_kwargs.get("attention_mask"),
            )  # fmt: skip
        _announce_slow_loop(why_not)
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus,
            streamer, **model_kwargs,
        )  # fmt: skip

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        known = self.config.tokenizer_vocab_size
        if known is not None and known < self.config.vocab_size:
            padding = list(range(known, self.config.vocab_size))
            processors.insert(0, SuppressTokensLogitsProcessor(padding, device=self.device))
        return processors


@functools.cache
def _announce_slow_loop(reason: str) -> None:
    logger.info("generate: the library's loop, since %s", reason)


def _has_room(cache: Cache, layer: int) -> bool:
    """Whether a layer's keys come back with slots of a fixed memory that are still empty."""
    return not isinstance(cache, DecodingCache) and isinstance(cache.layers[layer], StaticLayer)


def _padding(attention_mask: Tensor, length: int) -> Tensor | None:
    """The mask of this call's positions, or None where it hides nothing."""
    mask = attention_mask[:, -length:]
    if length == 1 and attention_mask.shape[1] > 1:
        return None  # a generated token is never padding, and a look would stall the GPU
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _packed_boundaries(position_ids: Tensor, batch: int) -> Tensor | None:
    """Boundaries of documents in the rows laid end to end, or None if each row is one."""
    if torch.compiler.is_compiling() or position_ids.shape[1] == 1:
        return None
    position_ids = position_ids.expand(batch, -1)
    starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).flatten().nonzero()[:, 0]
    if len(starts) == batch:
        return None
    return F.pad(starts, (0, 1), value=position_ids.numel())


def _positions_in(cu_seqlens: Tensor, length: int) -> Tensor:
    token = torch.arange(length, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens.to(token.dtype)[1:], token, right=True)
    return (token - cu_seqlens[owner])[None]


AutoConfig.register(H3Config.model_type, H3Config, exist_ok=True)
AutoModel.register(H3Config, H3Model, exist_ok=True)
AutoModelForCausalLM.register(H3Config, H3ForCausalLM, exist_ok=True)
