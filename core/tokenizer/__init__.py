"""Text to tokens and back: tokenizers, chat templates, incremental detokenization."""

from core.tokenizer.chat_template import apply_chat_template, chat_prompt
from core.tokenizer.detokenizer import IncrementalDetokenizer
from core.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "apply_chat_template", "chat_prompt", "load_tokenizer"]
