"""Run as a program: the log-probs that plain vLLM gives to token ids, as a JSON list on the last line.

Arguments: a Hugging Face directory, and the token ids as a JSON list. Nothing of ours is in it.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "TORCHDYNAMO_DISABLE": "1",
}


def main(directory: str, tokens: list[int]) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=directory,
        dtype="float32",
        max_model_len=len(tokens) + 1,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
    )
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=tokens)], parameters, use_tqdm=False)
    found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
