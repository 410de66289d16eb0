"""Log-probs, entropy and their gradient in blocks, against plain log-softmax."""

import pytest
import torch

from tests.devices import this_device, tolerance

TOKENS, HIDDEN, VOCAB = 37, 16, 50


def inputs(padded_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [R, H], a head of VOCAB rows with padding behind them, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(TOKENS, HIDDEN, generator=generator)
    head_VH = torch.randn(VOCAB + padded_rows, HIDDEN, generator=generator)
    return hidden_RH, head_VH, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def in_blocks(rank: int, tensor: int, block_tokens: int, temperature: float) -> list[torch.Tensor]:
    """Values and gradients on one tensor-parallel rank that holds its rows of the head."""
    from megatron.core import parallel_state, tensor_parallel

    from meds_megatron.actor import logprobs
    from meds_megatron.actor.process_group import form_groups
    from meds_megatron.config import ParallelConfig

    form_groups(ParallelConfig(tensor=tensor), seed=0)
    hidden_RH, head_VH, targets_R = (tensor.to(this_device()) for tensor in inputs(padded_rows=2))
    mine_VH = head_VH.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()].clone().requires_grad_()
    hidden_RH.requires_grad_()
    values_R, entropy_R = logprobs.logprobs_and_entropy(
        tensor_parallel.copy_to_tensor_model_parallel_region(hidden_RH),
        mine_VH,
        targets_R,
        temperature=temperature,
        vocab_size=VOCAB,
        block_tokens=block_tokens,
    )
    (values_R * torch.linspace(-1, 1, TOKENS, device=values_R.device)).sum().backward()
    return [t.detach().cpu().numpy() for t in (values_R, entropy_R, hidden_RH.grad, mine_VH.grad)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("tensor", "block_tokens"), [(1, 512), (1, 5), (2, 5), (4, 1)])
def test_values_and_gradients_are_those_of_log_softmax(ranks, tensor, block_tokens, temperature):
    hidden_RH, head_VH, targets_R = inputs(padded_rows=2)
    hidden_RH.requires_grad_()
    head_VH.requires_grad_()
    all_RV = (hidden_RH @ head_VH[:VOCAB].T / temperature).log_softmax(-1)
    expected_R = all_RV.gather(1, targets_R[:, None]).squeeze(1)
    (expected_R * torch.linspace(-1, 1, TOKENS)).sum().backward()
    entropy_R = -(all_RV.exp() * all_RV).sum(-1)

    found = ranks.run(tensor, in_blocks, tensor, block_tokens, temperature)
    for values_R, entropies_R, grad_hidden_RH, _ in found:
        assert torch.from_numpy(values_R) == pytest.approx(expected_R.detach(), abs=tolerance(1e-5))
        assert torch.from_numpy(entropies_R) == pytest.approx(entropy_R.detach(), abs=tolerance(1e-5))
        assert torch.allclose(torch.from_numpy(grad_hidden_RH), hidden_RH.grad, atol=tolerance(1e-5))
    grad_VH = torch.cat([torch.from_numpy(result[3]) for result in found])
    assert torch.allclose(grad_VH, head_VH.grad, atol=tolerance(1e-5))


def bfloat16_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `inputs`, in bfloat16 and with logits of up to 32, which bfloat16 itself holds in steps of 1/8."""
    hidden_RH, head_VH, targets_R = inputs(padded_rows=0)
    scale = 32 / (hidden_RH @ head_VH.T).abs().max()
    return (hidden_RH * scale).bfloat16(), head_VH.bfloat16(), targets_R


def in_bfloat16(rank: int, tensor: int, with_buffer: bool) -> list[torch.Tensor]:
    """Log-probs, gradient of the hidden states and that of this rank's rows of the head, which the buffer adds to 1."""
    from megatron.core import parallel_state, tensor_parallel

    from meds_megatron.actor import logprobs
    from meds_megatron.actor.process_group import form_groups
    from meds_megatron.config import ParallelConfig

    form_groups(ParallelConfig(tensor=tensor), seed=0)
    hidden_RH, head_VH, targets_R = (tensor.to(this_device()) for tensor in bfloat16_inputs())
    mine_VH = head_VH.chunk(tensor)[parallel_state.get_tensor_model_parallel_rank()].clone().requires_grad_()
    if with_buffer:
        mine_VH.main_grad = torch.ones(mine_VH.shape, device=mine_VH.device)
    hidden_RH.requires_grad_()
    values_R, _ = logprobs.logprobs_and_entropy(
        tensor_parallel.copy_to_tensor_model_parallel_region(hidden_RH),
        mine_VH,
        targets_R,
        temperature=1.0,
        vocab_size=VOCAB,
        block_tokens=5,
    )
    (values_R * torch.linspace(-1, 1, TOKENS, device=values_R.device)).sum().backward()
    if with_buffer:
        assert mine_VH.grad is None
    head_grad_VH = mine_VH.main_grad - 1 if with_buffer else mine_VH.grad
    return [t.detach().float().cpu().numpy() for t in (values_R, hidden_RH.grad, head_grad_VH)]


@pytest.mark.parametrize(("tensor", "with_buffer"), [(1, True), (2, True), (1, False)])
def test_bfloat16_weights_have_logits_and_the_heads_gradient_in_float32(ranks, tensor, with_buffer):
    hidden_RH, head_VH, targets_R = bfloat16_inputs()
    hidden_RH, head_VH = (t.double().requires_grad_() for t in (hidden_RH, head_VH))
    all_RV = (hidden_RH @ head_VH.T).log_softmax(-1)
    expected_R = all_RV.gather(1, targets_R[:, None]).squeeze(1)
    (expected_R * torch.linspace(-1, 1, TOKENS)).sum().backward()

    found = ranks.run(tensor, in_bfloat16, tensor, with_buffer)
    grad_VH = torch.cat([torch.from_numpy(result[2]) for result in found])
    for values_R, grad_hidden_RH, _ in found:
        assert torch.from_numpy(values_R) == pytest.approx(expected_R.detach().float(), abs=tolerance(1e-5))
        error_RH = torch.from_numpy(grad_hidden_RH) - hidden_RH.grad
        assert error_RH.norm() < 2**-8 * hidden_RH.grad.norm()
    # The gradients of single logits are bfloat16; their sums are rounded again only where there is no buffer.
    error = (grad_VH - head_VH.grad).norm() / head_VH.grad.norm()
    rounded = (head_VH.grad.bfloat16() - head_VH.grad).norm() / head_VH.grad.norm()
    assert error < (0.9 * rounded if with_buffer else 2 * rounded)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_accumulated_in_float32_on_every_device(device, dtype):
    from meds_megatron.actor import logprobs

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((24, 256), (256, 40)))
    expected = left.double() @ right.double()
    found = logprobs.float32_product(left, right)
    total = torch.full((24, 40), 3.0, device=device)
    logprobs.add_float32_product(total, left, right)
    assert found.dtype == total.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert torch.allclose(total.double() - 3, expected, atol=1e-4)


def peak_bytes(rank: int, tokens: int) -> int:
    """The most that the log-probs of `tokens` tokens have allocated at once."""
    from meds_megatron.actor import logprobs
    from meds_megatron.actor.process_group import form_groups
    from meds_megatron.bench.fingerprint import peak_bytes
    from meds_megatron.config import ParallelConfig

    form_groups(ParallelConfig(), seed=0)
    hidden_RH, head_VH = torch.randn(tokens, 8), torch.randn(2000, 8)
    targets_R = torch.zeros(tokens, dtype=torch.int64)
    options = dict(temperature=1.0, vocab_size=2000, block_tokens=64)
    return peak_bytes(lambda: logprobs.logprobs_and_entropy(hidden_RH, head_VH, targets_R, **options))


def test_no_logits_outlive_their_block(cpu_ranks):
    """Ten times the tokens must not take ten times the memory: only what is kept a token grows."""
    (few,), (many,) = (cpu_ranks.run(1, peak_bytes, tokens) for tokens in (128, 1280))
    block = 64 * 2000 * 4
    assert block <= few <= 5 * block
    assert many - few < 1280 * 8 * 8
