"""Activations of a trainer rank.

After "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198, sections 4 and 5), adapted to
these models: grouped-query attention by a fused kernel, which keeps no [S, S] matrix; SwiGLU, unfused; no dropout, and
so no masks; sequence parallelism, which divides the norms' activations by the tensor-parallel ranks. The terms of
`layer_bytes` are the tensors that autograd keeps for megatron-core 0.16.1's layer as `model.gpt` configures it.
"""

import math

from meds_megatron.config import Config, ModelShape, ParallelLayout
from meds_megatron.config.model_shape import LOGITS_BLOCK_TOKENS
from meds_megatron.plan.sizes import ITEM_BYTES, rank_sizes
from meds_megatron.weights.table import padded_vocab


def micro_batches(config: Config, layout: ParallelLayout, length: float) -> int:
    """Micro-batches of one optimizer update on one rank whose sequences have `length` tokens."""
    responses = -(-config.train.mini_batch_prompts * config.rollout.responses_per_prompt // layout.data)
    multiple = layout.pipeline if layout.virtual > 1 else 1
    packs = math.ceil(responses * length / config.train.micro_batch_tokens)
    return -(-packs // multiple) * multiple


def longest(config: Config) -> int:
    """Tokens of the longest prompt and response."""
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens


def layer_bytes(config: Config, shape: ModelShape, tokens: int, on_gpu: bool) -> int:
    """Bytes that one layer keeps on a rank for the backward pass of `tokens` tokens of a micro-batch without
    recomputation. Of context parallelism it leaves out buffers for the keys and values of other ranks.

    On a GPU RMSNorm is one kernel; on a CPU it keeps its normalised input in float32 too. There attention is computed
    sequence by sequence, and the results of all are a tensor of their own.
    """
    tensor, item = config.parallel.tensor, ITEM_BYTES[config.model.dtype]
    slice_tokens = tokens // tensor if config.parallel.sequence else tokens
    heads, kv_heads = shape.num_heads // tensor, shape.num_kv_heads // tensor
    query, key = heads * shape.head_dim, kv_heads * shape.head_dim

    norm_input = item * shape.hidden_size if on_gpu else 8 * shape.hidden_size
    # Two norms: input, 1 / rms, and the output as the input of the next linear layer.
    norms = 2 * slice_tokens * (norm_input + 4 + item * shape.hidden_size)
    # q, k and v as one tensor; q and k after the rotation; the kernel's output and its log-sum-exp.
    attention = tokens * (item * (3 * query + 3 * key) + 4 * heads)
    # Sine and cosine of each token's position, for q and k; on a CPU the sequences' results side by side.
    attention += tokens * item * (4 * shape.head_dim + (0 if on_gpu else query))
    if shape.qk_norm:
        attention += tokens * (_query_key_norms(query, key, kv_heads, item, on_gpu) + 4 * (heads + kv_heads))
    # Both halves before the activation, and activation, second half and product as tensors of their own.
    mlp = tokens * item * 5 * shape.ffn_size // tensor
    return norms + attention + mlp


def _query_key_norms(query: int, key: int, kv_heads: int, item: int, fused: bool) -> int:
    """Bytes a token that the norms of q and k keep in addition to the one tensor of q, k and v.

    q is a copy from it where several key/value heads interleave it. Unfused norms of bfloat16 keep a float32 copy.
    """
    copied = query if kv_heads > 1 else 0
    if fused:
        return item * copied
    if item == 4:
        return 4 * copied + 4 * (query + key)
    return 8 * (query + key)


def stage_bytes(config: Config, shape: ModelShape, layout: ParallelLayout, stage: int, on_gpu: bool) -> int:
    """Bytes that the ranks of a stage keep at the peak of an update, all micro-batches under way together.

    Recomputation: `full` keeps the input of each layer and, in the backward pass, the activations of one; `selective`
    recomputes the attention kernel only, which saves nothing where the kernel is fused.
    """
    item = ITEM_BYTES[config.model.dtype]
    tokens = layout.rank_tokens(config.train.micro_batch_tokens)
    hidden = item * shape.hidden_size * (tokens // layout.tensor if config.parallel.sequence else tokens)
    whole = layer_bytes(config, shape, tokens, on_gpu)
    kept = hidden if config.model.recompute == "full" else whole
    sizes = [chunks[stage] for chunks in layout.chunk_sizes(shape.num_layers)]
    under_way = chunks_under_way(layout, stage, micro_batches(config, layout, longest(config)))
    # The earlier chunks, which run first, are those of which the most micro-batches are under way.
    layers = sum(count * size for count, size in zip(under_way, sizes, strict=True))
    kept = layers * kept + (whole if config.model.recompute == "full" else 0)
    if layout.pipeline > 1:
        # Each chunk's output, until its gradient arrives.
        kept += sum(under_way) * hidden
    if stage == layout.pipeline - 1:
        # The final norm, and the hidden states of all positions gathered from the slices and then picked for the head.
        kept += hidden * (1 if on_gpu else 4) + 2 * item * shape.hidden_size * tokens
    return kept


def chunks_under_way(layout: ParallelLayout, stage: int, count: int) -> list[int]:
    """Micro-batches whose activations each model chunk of a stage keeps at the peak, of `count` in an update.

    1F1B (arXiv 2104.04473, section 2.2) keeps pipeline - stage of them. The interleaved schedule starts
    2 (pipeline - stage - 1) + (virtual - 1) pipeline passes of chunks before the first backward pass and has one more
    under way; chunks take turns of `pipeline` micro-batches.
    """
    if layout.virtual == 1:
        return [min(layout.pipeline - stage, count)]
    passes = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline + 1
    under_way = [0] * layout.virtual
    for number in range(min(passes, count * layout.virtual)):
        under_way[number // layout.pipeline % layout.virtual] += 1
    return under_way


def head_bytes(config: Config, shape: ModelShape, tokens: int, backward: bool) -> int:
    """Bytes of the log-probs of one block of a micro-batch's `tokens` on the last stage (`actor.logprobs`).

    Forward: the logits, their exponentials and the product of both, in float32. Backward as much, with the gradient of
    the hidden states in the model's data type; that of the head's weight goes straight into the gradient buffer.
    """
    item = ITEM_BYTES[config.model.dtype]
    rows = padded_vocab(shape.vocab_size, config.parallel.tensor) // config.parallel.tensor
    block = min(LOGITS_BLOCK_TOKENS, tokens) * rows * 12
    if not backward:
        return block
    return block + item * shape.hidden_size * tokens


def backward_bytes(config: Config, shape: ModelShape, layout: ParallelLayout, stage: int) -> int:
    """Bytes of temporary tensors of a backward pass: a parameter's gradient in the model's data type before it is added
    to the buffer, and the gradients of a layer's widest activations."""
    item, tokens = ITEM_BYTES[config.model.dtype], layout.rank_tokens(config.train.micro_batch_tokens)
    widest = tokens * item * 3 * shape.ffn_size // layout.tensor
    bytes_of_layer = rank_sizes(shape, layout, stage).largest * item + widest
    if stage == layout.pipeline - 1:
        return max(bytes_of_layer, head_bytes(config, shape, tokens, backward=True))
    return bytes_of_layer
