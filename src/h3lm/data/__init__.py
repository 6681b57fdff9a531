"""Text in, blocks of tokens out."""

from h3lm.data.blocks import Block as Block
from h3lm.data.blocks import Blocks as Blocks
from h3lm.data.blocks import Index as Index
from h3lm.data.blocks import TokenStream as TokenStream
from h3lm.data.prepare import prepare as prepare
from h3lm.data.tokenizers import Encoder as Encoder
from h3lm.data.tokenizers import byte_tokenizer as byte_tokenizer
from h3lm.data.tokenizers import character_tokenizer as character_tokenizer
from h3lm.data.tokenizers import encode as encode
from h3lm.data.tokenizers import gpt2_tokenizer as gpt2_tokenizer
from h3lm.data.tokenizers import load_tokenizer as load_tokenizer
from h3lm.data.tokenizers import train_bpe as train_bpe
