"""expertmesh: a serving cluster for Qwen3 mixture-of-experts models with separate attention and expert tiers."""

__version__ = "0.1.0"
