"""The model directory, read before anything is started."""

from pathlib import Path
from typing import TYPE_CHECKING

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.data.tokenizer import load_tokenizer
from meds_megatron.errors import UserError
from meds_megatron.rollout.llm import stop_token_ids
from meds_megatron.weights.hf_weights import HfWeights
from meds_megatron.weights.table import build_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_model_files(model_dir: Path, shape: ModelShape) -> "PreTrainedTokenizerBase":
    """The model's tokenizer. Raises UserError when a rank or an engine could not load the weights or the tokenizer;
    the headers of the weights are read only."""
    HfWeights(model_dir).check(build_table(shape).hf_shapes)
    tokenizer = load_tokenizer(model_dir)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"the tokenizer in {model_dir} has {len(tokenizer)} tokens, more than the {shape.vocab_size} rows of the "
            "model's embedding: use the tokenizer that belongs to the model"
        )
    stop_token_ids(model_dir, tokenizer.eos_token_id)
    return tokenizer
