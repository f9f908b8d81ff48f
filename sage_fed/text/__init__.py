"""Text to token ids and back: chat template, encoding, incremental decoding, stop strings.

Owns one checkpoint's tokenizer and the promise that nothing a client writes becomes a
control token. Does not know tiers, jobs or the model that consumes the ids.
Fails with `ModelLoadError` at load and with `InvalidField` for a prompt that cannot be encoded.
"""

from sage_fed.text.decoding import IncrementalDecoder, StopMatcher
from sage_fed.text.tokenizer import Tokenizer, write_padded_tokenizer
from sage_fed.text.tokenizer_files import fingerprint, locate_tokenizer

__all__ = [
    "IncrementalDecoder",
    "StopMatcher",
    "Tokenizer",
    "fingerprint",
    "locate_tokenizer",
    "write_padded_tokenizer",
]
