"""sage-fed: two language models on one device, one gRPC daemon, one budget."""

__version__ = "0.1.0"
