"""Language models on the same core: data, tasks, evaluation of generations. Imports transformers, never diffusers."""
