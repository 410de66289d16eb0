"""Bytes sent, against the collectives that megatron-core starts and the pipeline's own tensors."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from meds_megatron.config import QWEN, Config, ParallelConfig, ParallelLayout
from meds_megatron.plan.network import share_sizes, step_traffic
from meds_megatron.weights.resharding.plan import ReshardPlan
from tests.plan import meta_rank

SHAPE = replace(
    QWEN["Qwen3-8B"],
    hidden_size=256,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=768,
    vocab_size=512,
)
SEQUENCE, ROWS = 64, 2


def config_of(parallel: dict, recompute: str = "none", ranks: int = 8) -> Config:
    config = Config(parallel=ParallelConfig(**parallel))
    config.cluster.ranks_per_node = ranks
    config.model.dtype, config.model.recompute = "float32", recompute
    return config


def traffic_of(config: Config, tokens: float):
    layout = ParallelLayout.from_config(config)
    return step_traffic(config, SHAPE, layout, tokens=tokens, local_bytes_per_second=1e9, network_bytes_per_second=1e9)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel_layers_send_what_is_predicted(cpu_ranks, sequence, recompute):
    config = config_of(dict(tensor=2, sequence=sequence), recompute, ranks=2)
    (found,) = cpu_ranks.run(1, sent_by_layers, config)
    traffic = traffic_of(config, tokens=SEQUENCE * ROWS)
    assert (traffic.tensor_forward, traffic.tensor_update) == found


def test_context_parallel_layers_send_what_is_predicted(cpu_ranks):
    config = config_of(dict(context=2), ranks=2)
    ((forward, update),) = cpu_ranks.run(1, sent_by_layers, config)
    traffic = traffic_of(config, tokens=SEQUENCE * ROWS)
    assert traffic.context_forward == forward
    # These layers keep the keys and values that they have gathered; Transformer Engine's send them again.
    assert traffic.context_update == update + forward


def sent_by_layers(_rank: int, config: Config) -> tuple[int, int]:
    """Bytes that a rank of two sends in ring collectives by the layers' forward pass alone, and by an update's."""
    from meds_megatron.model.attention import packed_sequences
    from meds_megatron.model.gpt import build_chunks, transformer_config

    meta_rank.install("cpu")
    dist.destroy_process_group()
    with meta_rank.rank_of(config.parallel, 2, 0):
        (chunk,) = build_chunks(SHAPE, transformer_config(SHAPE, config.model, config.parallel), SEQUENCE)
        for parameter in chunk.parameters():
            # Its gradient is made by the layers that compute it, without a wrapper.
            parameter.grad = None
        tokens = ROWS * SEQUENCE // (2 if config.parallel.sequence else config.parallel.context)
        hidden = torch.randn(tokens, 1, SHAPE.hidden_size, requires_grad=True)
        sequences = packed_sequences([SEQUENCE] * ROWS, "cpu")
        settings = dict(
            attention_mask=None,
            rotary_pos_emb=chunk.rotary_pos_emb(SEQUENCE, packed_seq=True),
            packed_seq_params=sequences,
        )
        # The final norm would be on another stage of a longer pipeline: layers alone are counted.
        chunk.decoder.final_layernorm = None
        chunk.decoder.post_layer_norm = False
        with torch.no_grad(), SentBytes() as forward:
            chunk.decoder(hidden, **settings)
        with SentBytes() as update:
            chunk.decoder(hidden, **settings).sum().backward()
    return forward.total, update.total


class SentBytes(TorchDispatchMode):
    """Bytes that one of two ranks sends in the collectives that are started while it is active, by rings."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.total += {
                "allreduce_": lambda: sum(tensor.nbytes for tensor in args[0]),
                "_allgather_base_": lambda: args[0].nbytes // 2,
                "_reduce_scatter_base_": lambda: args[1].nbytes // 2,
            }[name]()
        return func(*args, **(kwargs or {}))


def test_pipeline_sends_each_hidden_state_once_forward_and_back():
    hidden = 1000 * SHAPE.hidden_size * 4
    two = traffic_of(config_of(dict(pipeline=2), ranks=2), tokens=1000)
    assert (two.pipeline_forward, two.pipeline_update) == (hidden, 2 * hidden)
    split = traffic_of(config_of(dict(tensor=2, sequence=True, pipeline=2), ranks=4), tokens=1000)
    assert split.pipeline_forward == hidden // 2
    assert traffic_of(config_of({}, ranks=1), tokens=1000).pipeline_forward == 0


def test_data_parallel_ranks_exchange_gradients_and_weights_once_an_update():
    config = config_of({}, ranks=4)
    config.model.dtype = "bfloat16"
    updates = config.train.prompts_per_step // config.train.mini_batch_prompts
    table = ReshardPlan(SHAPE, ParallelLayout(), 1).table
    elements = sum(a.local_shape(1)[0] * (a.columns or 1) for a in table.stored)
    assert traffic_of(config, 1000).data == updates * 3 * elements * (4 + 2) // 4


def test_groups_that_cross_nodes_are_found():
    config = config_of(dict(tensor=2, pipeline=2), ranks=4)
    config.cluster.nodes = 2
    # Node 0 has stage 0 of both replicas, node 1 stage 1.
    traffic = traffic_of(config, 1000)
    assert traffic.pipeline_crosses and not traffic.data_crosses
    config.parallel.pipeline = 1
    traffic = traffic_of(config, 1000)
    assert traffic.data_crosses and not traffic.pipeline_crosses


def test_one_layers_transfers_stand_for_all():
    plan = ReshardPlan(QWEN["Qwen3-8B"], ParallelLayout(tensor=4, pipeline=3, virtual=2), 2)
    sizes: dict[tuple[int, int, int], int] = {}
    for bucket in plan.buckets:
        for transfer in plan.transfers(bucket):
            key = plan.pipeline_stage(bucket), transfer.trainer_rank, transfer.engine_rank
            sizes[key] = sizes.get(key, 0) + transfer.elements
    assert share_sizes(plan) == sizes
