"""The model: GPT, its configuration, kernels, LoRA, and conversion to Hugging Face directories."""
