"""The LoRA family around ResLoRA: methods that change how adapters are trained. What is exported stays a plain LoRA."""
