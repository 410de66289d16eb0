"""The shape of the model that a config names, and the kind of device that it runs on, without the model itself."""

from pathlib import Path

from meds_megatron.config import Config, ModelShape
from meds_megatron.config.model_shape import ARITHMETIC, QWEN, published_shape
from meds_megatron.errors import UserError

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def planned_shape(config: Config) -> ModelShape:
    """The shape in model.path's config.json; without that, of the published model that the path names; or of the model
    that the run would generate.

    Raises UserError when none of these gives the shape.
    """
    model = config.model
    if model.make == "arithmetic":
        return ARITHMETIC
    if model.make == "random":
        return _random_shape(config)
    assert model.path is not None  # `validate_model` has checked it.
    path = Path(model.path).expanduser()
    if (path / "config.json").is_file():
        return ModelShape.from_hf(path)
    shape = published_shape(model.path)
    if shape is None:
        raise UserError(
            f"{path} is not here, and its name is not that of a model whose shape is known ({', '.join(QWEN)}); copy "
            "the model's config.json into a directory and give that as model.path."
        )
    return shape


def _random_shape(config: Config) -> ModelShape:
    random = config.model.random
    if random.vocab_size is None:
        raise UserError(
            "model.random.vocab_size is not set, and without it the size of the embedding is known only when the model "
            "is made; set it to the tokenizer's number of tokens or more."
        )
    return ModelShape(
        architecture=random.architecture,
        hidden_size=random.hidden_size,
        num_layers=random.num_layers,
        num_heads=random.num_heads,
        num_kv_heads=random.num_kv_heads,
        head_dim=random.head_dim,
        ffn_size=random.ffn_size,
        vocab_size=random.vocab_size,
        tie_embeddings=random.tie_embeddings,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_positions=32768,
    )


def planned_on_gpu(config: Config) -> bool:
    """Whether the run is planned for GPUs: with cluster.device = auto, if this machine has an NVIDIA driver."""
    if config.cluster.device == "auto":
        return NVIDIA_DRIVER.exists()
    return config.cluster.device == "cuda"
