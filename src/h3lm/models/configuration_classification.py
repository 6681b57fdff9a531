"""Configuration of classifiers of sequences."""

from dataclasses import fields, replace
from typing import Any, Self

from h3lm.layers.long_conv import DEFAULT_FILTER_LENGTH
from h3lm.layers.mixers import MixerSizes, mixer
from h3lm.models.configuration_h3 import H3Config

NORMS = ("layer", "batch")
NORM_POSITIONS = ("pre", "post")
POOLINGS = ("last", "mean")


class H3ClassificationConfig(H3Config):
    r"""What a classifier of sequences looks like; by default a language model with another head.

    The number of classes and their names are the library's `num_labels`, `id2label`, `label2id`.

    Args:
        num_channels: Channels of `input_values`; None for a model of `input_ids`.
        intermediate_size: As in `H3Config`; S4's blocks have no MLP, which is 0.
        bidirectional: Whether a position sees what comes after it.
        norm: "layer" or "batch".
        norm_position: "pre": in front of each sublayer; "post": behind each residual sum.
        pooling: What the head sees of a row: its "last" position, or the "mean" of all; padding
            is not among them.
        two_documents: Whether an example is a pair of rows, encoded by one encoder.
        filter_length: Taps of `long_conv`.
        dt_min: Smallest step size of the state space models at the start.
        dt_max: Largest step size at the start.
        s4d_block: Whether S4D is the published block (A of each channel, gated output) instead
            of the baseline of the H3 paper's language models.
        h3_gate_bias: Start of the biases of H3's q and v. At 1 a layer starts near a linear filter;
            at 0 a signal without a mean is worth nothing before two products with itself are
            learned.
        classifier_dropout: Dropout in front of the head.
        initializer_range: As in `H3Config`; None for 1/sqrt(3 inputs) in each linear map, the
            spread of torch's own start.

    Raises:
        ValueError: if a word is unknown, or a mixer has no bidirectional form.
    """

    model_type = "h3_classification"

    num_channels: int | None = None
    bidirectional: bool = False
    norm: str = "layer"
    norm_position: str = "pre"
    pooling: str = "last"
    two_documents: bool = False
    filter_length: int = DEFAULT_FILTER_LENGTH
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    s4d_block: bool = True
    h3_gate_bias: float = 0.0
    classifier_dropout: float = 0.0
    initializer_range: float | None = None  # type: ignore[assignment]  # the base has no None
    use_cache: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the choices that only classifiers have."""
        super().__post_init__(**kwargs)
        for name, allowed in (
            ("norm", NORMS), ("norm_position", NORM_POSITIONS), ("pooling", POOLINGS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if self.num_channels is not None and self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels} must be at least 1")
        if self.filter_length < 1:
            raise ValueError(f"filter_length={self.filter_length} must be at least 1")
        if self.bidirectional:
            for name in self.mixers:
                if not mixer(name).can_be_bidirectional:
                    raise ValueError(f"mixer {name!r} has no bidirectional form")

    @property
    def mixer_sizes(self) -> MixerSizes:
        """Sizes for `layers.MIXERS`."""
        return replace(
            super().mixer_sizes,
            filter_length=self.filter_length,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            bidirectional=self.bidirectional,
            s4d_block=self.s4d_block,
        )

    @classmethod
    def of_language_model(cls, config: H3Config) -> Self:
        """The classifier whose encoder is a language model's."""
        shared = {field.name for field in fields(H3Config)} - {"model_type", "architectures"}
        values = {name: value for name, value in config.to_dict().items() if name in shared}
        values |= {"id2label": config.id2label, "label2id": config.label2id}
        own = {"use_cache": False, "tie_word_embeddings": False, "s4d_block": False}
        return cls(**(values | own))
