"""Configuration of the H3 family."""

from typing import Any, Self

from transformers import PreTrainedConfig

from h3lm.layers.mixers import MixerSizes, mixer
from h3lm.models.remote_code import auto_map, write_remote_code

HYBRID = "-hybrid"
NOT_CAUSAL = (
    "bidirectional=True: a layer that sees what it is asked to predict does not fit a causal "
    "model; classifiers (H3ClassificationConfig) may have it"
)


class H3Config(PreTrainedConfig):
    r"""What an H3 language model, a hybrid or a Transformer of the same code looks like.

    Args:
        vocab_size: Rows of the embedding, and logits of each position. Never altered here.
        tokenizer_vocab_size: Ids that the tokenizer knows; `generate` emits none above. None
            means `vocab_size`.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the MLPs; 4 * hidden_size if None, 0 for blocks without.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads of the attention layers.
        mixers: The mixer of each layer, `num_hidden_layers` names; or one word: a name for all of
            them, `"hybrid"` for H3 with attention at `attention_layers`, or `"NAME-hybrid"` for
            another mixer in place of H3. Stored as the list.
        attention_layers: Layers, counted from 0, that are attention; in a hybrid 1 and 1 + n/2 by
            default.
        rotary_dim: Rotated features of each attention head; 0 for no rotary embedding.
        num_learned_positions: Rows of a learned position table at the embedding; 0 for none.
        d_state: State size of the SSMs.
        h3_head_dim: Channels of an H3 head.
        h3_num_taps: Taps of H3's shift SSM, its state size; `d_state` if None, as in the paper.
            Few are enough to compare neighbours, and generalise better from little data.
        gss_mlp: Whether the block of a GSS layer has an MLP. The published layer has none: its wide
            gate takes the MLP's place, and presets leave it out.
        embedding_dropout: Dropout on the embedding.
        residual_dropout: Dropout on what each sublayer adds.
        attention_dropout: Dropout on attention weights.
        layer_norm_eps: Epsilon of every LayerNorm.
        initializer_range: Standard deviation of new linear and embedding weights.
        scale_h3_output: Whether H3's output projection starts scaled by 1/sqrt(2 layers), like
            the other residual projections. The release does not.
        use_cache: Whether the model returns a cache in eval mode.
        tie_word_embeddings: Whether the head is the embedding.

    Raises:
        ValueError: if sizes do not divide, the choice of mixers contradicts itself or a layer
            would be bidirectional.
    """

    model_type = "h3"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the library's own form)

    vocab_size: int = 50264
    tokenizer_vocab_size: int | None = None
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mixers: list[str] | str = "hybrid"
    attention_layers: list[int] | None = None
    rotary_dim: int = 0
    num_learned_positions: int = 0
    d_state: int = 64
    h3_head_dim: int = 1
    h3_num_taps: int | None = None
    gss_mlp: bool = True
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    scale_h3_output: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Resolve the words of `mixers` and check that everything fits."""
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.mixers = _resolve_mixers(self.mixers, self.attention_layers, self.num_hidden_layers)
        self.attention_layers = [i for i, name in enumerate(self.mixers) if name == "attention"]
        self._check_sizes()
        if kwargs.get("bidirectional"):
            raise ValueError(NOT_CAUSAL)
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("num_hidden_layers", "intermediate_size", "num_learned_positions"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must be positive")
        if self.hidden_size % self.num_attention_heads and "attention" in self.mixers:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide "
                f"hidden_size={self.hidden_size}"
            )
        if self.h3_head_dim < 1 or self.hidden_size % self.h3_head_dim:
            raise ValueError(
                f"h3_head_dim={self.h3_head_dim} must divide hidden_size={self.hidden_size}"
            )
        if self.d_state < 2 or self.d_state % 2:
            raise ValueError(f"d_state={self.d_state} must be even and positive")
        if self.h3_num_taps is not None and self.h3_num_taps < 1:
            raise ValueError(f"h3_num_taps={self.h3_num_taps} must be positive")
        head_dim = self.hidden_size // self.num_attention_heads
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even and at most {head_dim}, "
                "the width of an attention head"
            )
        known = self.tokenizer_vocab_size
        if known is not None and not 1 <= known <= self.vocab_size:
            raise ValueError(
                f"tokenizer_vocab_size={known} must be within vocab_size={self.vocab_size}"
            )

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Write the configuration, and what finds our classes from it without importing `h3lm`."""
        self.auto_map = auto_map(type(self))
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: else saving what came by remote code would copy our source."""

    @property
    def layer_types(self) -> list[str]:
        """The layers in transformers' words: what kind of cache each of them needs."""
        return [
            "linear_attention" if mixer(name).constant_state else "full_attention"
            for name in self.mixers
        ]

    def inner_width(self, layer: int) -> int | None:
        """Inner width of a layer's MLP; None if its block has none."""
        if self.mixers[layer] == "gss" and not self.gss_mlp:
            return None
        return self.intermediate_size or None

    @property
    def mixer_sizes(self) -> MixerSizes:
        """Sizes for `layers.MIXERS`."""
        return MixerSizes(
            d_model=self.hidden_size,
            d_state=self.d_state,
            h3_head_dim=self.h3_head_dim,
            h3_num_taps=self.h3_num_taps,
            num_heads=self.num_attention_heads,
            rotary_dim=self.rotary_dim,
            attention_dropout=self.attention_dropout,
        )

    @classmethod
    def from_preset(cls, size: str, mixers: str | list[str] = "hybrid", **overrides: Any) -> Self:
        """One of the paper's sizes: "125m", "355m", "1.3b" or "2.7b".

        `h3lm presets` lists them with their parameter counts.

        Args:
            size: Name of the size.
            mixers: As the field; "h3" has h3_head_dim 8 as in the paper, "attention" rotary
                embedding over the whole head, hybrids have no positions at all, GSS layers no MLP.
            overrides: Any field of the config.

        Raises:
            ValueError: if the size or an override is unknown.
        """
        from h3lm.models.presets import preset_fields

        return cls(**preset_fields(cls, size, mixers, overrides))


def _resolve_mixers(
    mixers: list[str] | str, attention_layers: list[int] | None, num_layers: int
) -> list[str]:
    for layer in attention_layers or ():
        if not 0 <= layer < num_layers:
            raise ValueError(
                f"attention_layers has {layer}, the model has layers 0 to {num_layers - 1}"
            )
    if isinstance(mixers, str):
        mixers = _expand_word(mixers, attention_layers, num_layers)
    for name in mixers:
        mixer(name)
    if len(mixers) != num_layers:
        raise ValueError(f"mixers names {len(mixers)} layers, num_hidden_layers is {num_layers}")
    attention = [i for i, name in enumerate(mixers) if name == "attention"]
    if attention_layers is not None and sorted(set(attention_layers)) != attention:
        raise ValueError(
            f"attention_layers={attention_layers} contradicts mixers, "
            f"which has attention at {attention}"
        )
    return list(mixers)


def _expand_word(word: str, attention_layers: list[int] | None, num_layers: int) -> list[str]:
    if word != "hybrid" and not word.endswith(HYBRID):
        return [word] * num_layers
    other = word.removesuffix(HYBRID) if word != "hybrid" else "h3"
    if attention_layers is None:
        attention_layers = [i for i in (1, 1 + num_layers // 2) if i < num_layers]
        if not attention_layers:
            raise ValueError(f"a hybrid needs at least 2 layers, num_hidden_layers is {num_layers}")
    return ["attention" if i in attention_layers else other for i in range(num_layers)]
