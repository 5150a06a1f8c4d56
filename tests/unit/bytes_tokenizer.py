"""A tokenizer as the tests want it: one token per byte, with or without a token at the start."""

from types import SimpleNamespace


class BytesTokenizer:
    """Token ids are bytes; 256 is the beginning of a sequence if there is one."""

    def __init__(self, bos: bool = False):
        self.bos_token_id = 256 if bos else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [256] if add_special_tokens and self.bos_token_id else []
        return SimpleNamespace(input_ids=start + list(text.encode()))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")
