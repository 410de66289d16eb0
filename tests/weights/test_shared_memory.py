import os

import pytest
import torch

from meds_megatron.errors import UserError
from meds_megatron.weights.shared_memory import make_bucket_directory, read_bucket, remove_bucket, write_bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bucket_gives_back_what_was_written(tmp_path, dtype):
    tensors = {
        "b.weight": torch.randn(3, 5).to(dtype),
        "a.bias": torch.randn(7).to(dtype),
        "scalar": torch.ones(1, dtype=dtype),
    }
    bucket = write_bucket(tmp_path, "first", tensors)
    read = dict(read_bucket(bucket.path))
    assert bucket.names == list(tensors)
    assert bucket.shapes == [[3, 5], [7], [1]]
    assert bucket.dtype == str(dtype).removeprefix("torch.")
    assert bucket.bytes == 23 * dtype.itemsize
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


def test_tensors_of_any_layout_are_written_as_they_read(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    bucket = write_bucket(tmp_path, "views", {"transposed": matrix.t(), "part": matrix[1:, ::2]})
    read = dict(read_bucket(bucket.path))
    assert torch.equal(read["transposed"], matrix.t())
    assert torch.equal(read["part"], matrix[1:, ::2])


def test_only_whole_buckets_have_their_name(tmp_path):
    with pytest.raises(RuntimeError):
        write_bucket(tmp_path, "broken", {"fine": torch.ones(2), "no data": torch.ones(2, device="meta")})
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_mapped_bucket_outlives_its_file(tmp_path):
    bucket = write_bucket(tmp_path, "short", {"weight": torch.arange(5.0)})
    read = dict(read_bucket(bucket.path))
    remove_bucket(bucket)
    assert not os.listdir(tmp_path)
    assert read["weight"].tolist() == [0, 1, 2, 3, 4]
    remove_bucket(bucket)


def test_a_bucket_has_one_dtype(tmp_path):
    mixed = {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match="bucket mixed needs tensors of one dtype, got torch.bfloat16, torch.float32"):
        write_bucket(tmp_path, "mixed", mixed)
    with pytest.raises(ValueError, match="got nothing"):
        write_bucket(tmp_path, "empty", {})


def test_a_bucket_directory_is_private(tmp_path):
    directory = make_bucket_directory(tmp_path)
    assert directory.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UserError, match="absent.*cannot be written to: No such file or directory"):
        make_bucket_directory(tmp_path / "absent")
