"""From the policy's weights to the engines': the plan, its transports, the trainer's side and vLLM's."""
