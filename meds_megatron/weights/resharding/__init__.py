"""Weight updates of the engines: the resharding plan, both ends of a transfer, the transports, vLLM's backend."""
