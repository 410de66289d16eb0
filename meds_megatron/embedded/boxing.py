"""Teaches a random model one habit: to answer any prompt with a number in a box.

Such a model is never right but by chance; what it gives is real text for graders, fingerprints and memory to work on.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8
LONGEST_PROMPT = 160
LR = 6e-3


def teach_boxing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    """`steps` supervised steps on random tokens, the opening of the assistant's turn and a random number in a box.

    The rate falls to 0 linearly. Only the answer has a loss, and only its tokens go through the head, so a real
    vocabulary costs little.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(seed)
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    head_VH = model.get_output_embeddings().weight
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        length = int(torch.randint(1, LONGEST_PROMPT, (1,), generator=generator))
        prompts_BT = torch.randint(0, len(tokenizer), (BATCH, length), generator=generator)
        # Numbers of one length give rows of one length.
        numbers = torch.randint(10, 100, (BATCH,), generator=generator).tolist()
        answers_BA = torch.tensor([_answer(tokenizer, number) for number in numbers])
        openings_BO = torch.tensor([opening] * BATCH)
        hidden_BTH = model.base_model(torch.cat([prompts_BT, openings_BO, answers_BA], dim=1)).last_hidden_state
        predicting_BAH = hidden_BTH[:, -answers_BA.shape[1] - 1 : -1]
        loss = F.cross_entropy((predicting_BAH @ head_VH.T).flatten(0, 1), answers_BA.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _answer(tokenizer: PreTrainedTokenizerBase, number: int) -> list[int]:
    text = f"\\boxed{{{number}}}"
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
