"""What the server of `gateway_processes.py` has before it forks: the imports of a gateway, and the demo tokenizer."""

from .gateway_processes import MODEL, tokenizer

tokenizer(MODEL)
