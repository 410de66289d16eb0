"""Models as files: megatron-core checkpoints from Hugging Face directories and back, and whether two are the same."""
