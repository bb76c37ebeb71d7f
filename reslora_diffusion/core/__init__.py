"""The method, for any torch model: torch and PEFT only. `..registration` makes PEFT know `ResLoraConfig`."""
