"""Problems of data sets, prompts and the sampler."""
