"""Hugging Face from here up."""

from h3lm.models.configuration_h3 import H3Config as H3Config
from h3lm.models.modeling_h3 import H3ForCausalLM as H3ForCausalLM
from h3lm.models.modeling_h3 import H3Model as H3Model
