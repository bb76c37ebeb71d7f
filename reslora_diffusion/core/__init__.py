"""The method, for any torch model: torch and PEFT only. Importing it makes PEFT know `ResLoraConfig`."""

from .peft.model import register

register()
