"""The distributed optimizer around the policy, and its learning rate."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.transformer_config import TransformerConfig

from meds_megatron.config import OptimizerConfig
from meds_megatron.model.gpt import PolicyModel


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """The rate of training step `step` (from 0): rises linearly over `warmup_steps` steps, then stays.

    A function of the step alone, so that a resumed run cannot step it twice.
    """
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


def wrap(chunks: list[PolicyModel]) -> list[DistributedDataParallel]:
    """Gives the chunks gradient buffers in float32, summed over data-parallel ranks by reduce-scatter."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        # megatron-core's check raises on the rank that finds a NaN while the others wait for it; `step` has its own.
        check_for_nan_in_grad=False,
    )
    model_config = chunks[0].config
    wrapped = [
        DistributedDataParallel(model_config, settings, chunk, disable_bucketing=place > 0)
        for place, chunk in enumerate(chunks)
    ]
    # The loss is a share of the mini-batch's global sum: gradients are finished as they are, not divided by tokens.
    model_config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(
        model, None, **kwargs
    )
    return wrapped


def build(
    chunks: list[DistributedDataParallel], model_config: TransformerConfig, config: OptimizerConfig
) -> MegatronOptimizer:
    """AdamW with its moments and float32 weights sharded over the data-parallel ranks."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    model_config.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def step(optimizer: MegatronOptimizer, loss: float) -> tuple[float, bool]:
    """Clips the gradients and updates the weights: the whole model's gradient norm, and whether the update was made.

    It is skipped on every rank, with weights, moments and step count unchanged, when the loss of any rank (a share of
    the mini-batch's; 0 off the last pipeline stage), any gradient, or the norm is not finite. megatron-core skips only
    where it scales the loss, for float16.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    parameters = [part.get_parameters() for part in optimizer.chained_optimizers]
    # The norm leaves out the copies that tensor-parallel ranks hold of the same parameter.
    gradients = [parameter.grad for group in parameters for parameter in group if parameter.grad is not None]
    local_norm = float(torch.nn.utils.get_total_norm(gradients))
    if not _on_all_ranks(all(map(math.isfinite, (loss, grad_norm, local_norm)))):
        return grad_norm, False
    clip_grad = optimizer.config.clip_grad
    for group in parameters:
        if group and clip_grad > 0:
            clip_grad_by_total_norm_fp32(group, clip_grad, grad_norm)
    optimizer.step_with_ready_grads()
    return grad_norm, True


def _on_all_ranks(condition: bool) -> bool:
    agreed = torch.tensor([condition], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
    return bool(agreed.item())
