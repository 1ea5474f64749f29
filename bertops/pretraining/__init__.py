"""Pretraining from scratch on any text: RoBERTa (masked language model) and ALBERT (with sentence order)."""

from bertops.pretraining.settings import AlbertSettings, RobertaSettings, Settings

__all__ = ["AlbertSettings", "RobertaSettings", "Settings"]
