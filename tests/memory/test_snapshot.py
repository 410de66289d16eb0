"""Snapshots: saved on some shards and loaded on others; damaged files are named and affect no other."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import DamagedError, MemoryShard, shard_of

LAYERS = 16
KEYS = [f"problem {number}" for number in range(12)]


def draw(seed: int, count: int = 60) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    keys = [KEYS[number] for number in rng.integers(len(KEYS), size=count)]
    habits = np.random.default_rng(0).normal(size=(4, LAYERS))
    return keys, habits[rng.integers(4, size=count)] + 0.1 * rng.normal(size=(count, LAYERS))


class Shards:
    """Shards side by side, keys routed."""

    def __init__(self, shards: list[MemoryShard]):
        self.shards = shards

    @classmethod
    def load(cls, directory: Path, count: int, config: MemoryConfig | None = None) -> "Shards":
        return cls([MemoryShard.load(directory, config, rank, count) for rank in range(count)])

    def route(self, keys: list[str]):
        owners = np.array([shard_of(key, len(self.shards)) for key in keys])
        for owner, shard in enumerate(self.shards):
            rows = np.flatnonzero(owners == owner)
            yield shard, rows, [keys[row] for row in rows]

    def step(self, keys: list[str], fingerprints: np.ndarray) -> "Shards":
        for shard, rows, mine in self.route(keys):
            shard.remember(mine, fingerprints[rows])
            shard.recluster()
        return self

    def lookup(self, keys: list[str], fingerprints: np.ndarray) -> list[int]:
        sizes = np.zeros(len(keys), int)
        for shard, rows, mine in self.route(keys):
            sizes[rows] = shard.lookup(mine, fingerprints[rows])
        return sizes.tolist()

    def save(self, directory: Path) -> "Shards":
        for shard in self.shards:
            shard.save(directory)
        return self


def new_shards(count: int, config: MemoryConfig | None = None, steps: int = 3) -> Shards:
    shards = Shards([MemoryShard(config or MemoryConfig(), rank, count) for rank in range(count)])
    for seed in range(1, steps + 1):
        shards.step(*draw(seed))
    return shards


@pytest.mark.parametrize("loaded_on", [1, 3, 4, 7])
@pytest.mark.parametrize(
    "config", [MemoryConfig(), MemoryConfig(window=9, half_life_steps=2.0), MemoryConfig(layer_diff=True)]
)
def test_saved_on_four_and_loaded_on_another_number(tmp_path, config, loaded_on):
    saved = new_shards(4, config).save(tmp_path)
    loaded = Shards.load(tmp_path, loaded_on)
    assert loaded.shards[0].config == config
    for seed in (7, 8, 9):
        assert loaded.lookup(*draw(seed)) == saved.lookup(*draw(seed))
        loaded.step(*draw(seed))
        saved.step(*draw(seed))
    loaded.save(tmp_path / "again")
    again = Shards.load(tmp_path / "again", 2)
    assert again.lookup(*draw(5)) == saved.lookup(*draw(5))


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(),
        MemoryConfig(window=9, half_life_steps=2.0),
        MemoryConfig(budget_gib=5_000 / 2**30),
        MemoryConfig(noise="ignore", min_samples=2),
    ],
)
def test_a_run_that_is_saved_and_loaded_is_bit_for_bit_the_run_that_is_not(tmp_path, config):
    whole, resumed = new_shards(2, config, steps=0), new_shards(2, config, steps=0)
    for seed in range(9):
        for shards in (whole, resumed):
            shards.step(*draw(seed))
        if seed % 2:
            resumed = Shards.load(resumed.save(tmp_path / str(seed)) and tmp_path / str(seed), 2, config)
        assert whole.lookup(*draw(20 + seed)) == resumed.lookup(*draw(20 + seed))
        for one, other in zip(whole.shards, resumed.shards, strict=True):
            assert all(one.labels(key).tolist() == other.labels(key).tolist() for key in KEYS)
            one_stats, other_stats = one.stats(), other.stats()
            assert one_stats["moments"].vectors == other_stats["moments"].vectors
            assert one_stats["moments"].sum_F.tobytes() == other_stats["moments"].sum_F.tobytes()
            assert one_stats["moments"].outer_FF.tobytes() == other_stats["moments"].outer_FF.tobytes()
            for name in ("keys", "vectors", "clusters", "noise_vectors", "bytes", "lookups", "hits", "size_sum"):
                assert one_stats[name] == other_stats[name], name
            assert one.bytes_used == other.bytes_used


def test_saves_share_nothing_so_that_damage_stays_in_one(tmp_path):
    shards = new_shards(2).save(tmp_path / "first")
    expected = shards.lookup(*draw(9))
    shards.save(tmp_path / "second").save(tmp_path / "third")
    files = sorted(tmp_path.glob("*/*"))
    assert len(files) == 6 and all(path.stat().st_nlink == 1 for path in files)
    shutil.rmtree(tmp_path / "first")
    for path in (tmp_path / "second").iterdir():
        with open(path, "r+b") as file:
            file.write(b"damage" * 20)
    assert Shards.load(tmp_path / "third", 2).lookup(*draw(9)) == expected


def test_pending_vectors_are_saved_too(tmp_path):
    shards = new_shards(1)
    keys, fingerprints = draw(4)
    shards.shards[0].remember(keys, fingerprints)
    shards.save(tmp_path)
    loaded = Shards.load(tmp_path, 1)
    assert loaded.lookup(*draw(9)) == shards.lookup(*draw(9))
    for each in (shards, loaded):
        each.shards[0].recluster()
    assert loaded.lookup(*draw(9)) == shards.lookup(*draw(9))
    loaded.save(tmp_path)
    assert Shards.load(tmp_path, 3).lookup(*draw(9)) == shards.lookup(*draw(9))


def test_a_shard_that_was_never_clustered_is_saved_too(tmp_path):
    shards = new_shards(3, steps=0)
    keys, fingerprints = draw(4)
    for shard, rows, mine in shards.save(tmp_path / "empty").route(keys):
        shard.remember(mine, fingerprints[rows])
    assert Shards.load(tmp_path / "empty", 2).lookup(*draw(9)) == [0] * 60
    loaded = Shards.load(shards.save(tmp_path / "pending") and tmp_path / "pending", 2)
    for shard in (*shards.shards, *loaded.shards):
        shard.recluster()
    assert loaded.lookup(*draw(9)) == shards.lookup(*draw(9))


def test_evicted_vectors_leave_the_file(tmp_path):
    shards = new_shards(1, MemoryConfig(window=2), steps=0)
    for seed in range(8):
        shards.step(*draw(seed)).save(tmp_path)
    assert shards.shards[0].stats()["vectors"] == 2 * len(KEYS)
    # Eight steps of 60 vectors of 60 bytes would take more than twice as much.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 12_000
    assert Shards.load(tmp_path, 1).lookup(*draw(9)) == shards.lookup(*draw(9))


def change_byte(path: Path, place: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)


DAMAGES = {
    "is missing": Path.unlink,
    "is cut short or altered": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "is cut short to 7 bytes": lambda path: path.write_bytes(path.read_bytes()[:7]),
    "is cut short to 0 bytes": lambda path: path.write_bytes(b""),
    "is cut short or altered .its checksum differs.": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "checksum differs": lambda path: change_byte(path, -1000),
    "checksum differs.*: resume from another": lambda path: change_byte(path, 30),
    "is no saved memory": lambda path: change_byte(path, 0),
    "has format version 11, this program reads version 2": lambda path: change_byte(path, 8, 9),
    "is a copy of shard-00000-of-00002.memory": lambda path: shutil.copy(
        path.with_name("shard-00000-of-00002.memory"), path
    ),
    "cannot be read .Is a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_file_is_named_and_left_out_with_skip_damaged(tmp_path, problem):
    shards = new_shards(2).save(tmp_path)
    damaged = tmp_path / "shard-00001-of-00002.memory"
    DAMAGES[problem](damaged)
    for loaded_on in (2, 3):
        with pytest.raises(DamagedError, match=problem) as error:
            Shards.load(tmp_path, loaded_on)
        assert str(error.value).startswith(str(damaged)) and isinstance(error.value, UserError)
    rest = Shards.load(tmp_path, 1, MemoryConfig(skip_damaged=True)).shards[0]
    assert len(rest.damages) == 1 and rest.damages[0].startswith(str(damaged))
    kept = MemoryShard.load(tmp_path, None, 0, 2)
    for key in KEYS:
        expected = shards.shards[0].labels(key).tolist()
        assert rest.labels(key).tolist() == kept.labels(key).tolist() == expected
    assert 0 < rest.stats()["vectors"] < 180
    rest.save(tmp_path / "mended")
    mended = MemoryShard.load(tmp_path / "mended")
    assert mended.lookup(*draw(9)).tolist() == rest.lookup(*draw(9)).tolist()


def test_one_damaged_file_of_four_is_named_by_all_shards(tmp_path):
    new_shards(4).save(tmp_path)
    (tmp_path / "shard-00002-of-00004.memory").unlink()
    rest = Shards.load(tmp_path, 3, MemoryConfig(skip_damaged=True))
    for shard in rest.shards:
        assert len(shard.damages) == 1 and "shard-00002-of-00004.memory is missing" in shard.damages[0]


def test_no_cut_and_no_flipped_bit_goes_unnoticed(tmp_path):
    new_shards(1, steps=1).save(tmp_path)
    path = tmp_path / "shard-00000-of-00001.memory"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(60), *rng.integers(len(content), size=300)]:
        path.write_bytes(content[:place])
        with pytest.raises(DamagedError):
            MemoryShard.load(tmp_path)
        path.write_bytes(content)
        change_byte(path, place, 1 << int(rng.integers(8)))
        with pytest.raises(DamagedError):
            MemoryShard.load(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, failing):
    shards = new_shards(1).save(tmp_path)
    expected = shards.lookup(*draw(9))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, failing, full)
        with pytest.raises(UserError, match=r"-of-00001\.memory cannot be written \(No space left on device\)"):
            shards.step(*draw(4)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000-of-00001.memory"]
    assert Shards.load(tmp_path, 1).lookup(*draw(9)) == expected


SAVE_FOR_EVER = """
import sys
from tests.memory.test_snapshot import draw, new_shards
shards = new_shards(1, steps=1)
for seed in range(10**6):
    shards.step(*draw(seed, count=400)).save(sys.argv[1])
    print("saved", flush=True)
"""


@pytest.mark.usefixtures("processes")
def test_a_save_that_is_killed_is_never_taken_for_whole(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        vectors = MemoryShard.load(tmp_path).stats()["vectors"]
        assert vectors > 400 and (vectors - 60) % 400 == 0


def test_files_of_another_number_of_shards_are_superseded(tmp_path):
    new_shards(4).save(tmp_path)
    three = Shards.load(tmp_path, 3).step(*draw(4)).save(tmp_path)
    assert Shards.load(tmp_path, 5).lookup(*draw(9)) == three.lookup(*draw(9))


def test_files_of_two_numbers_of_shards_are_refused(tmp_path):
    new_shards(4).save(tmp_path / "four")
    new_shards(3).save(tmp_path)
    shutil.copytree(tmp_path / "four", tmp_path, dirs_exist_ok=True)
    for shards in (3, 4, 5):
        with pytest.raises(UserError, match=r"holds memories of \[3, 4\] shards: remove"):
            MemoryShard.load(tmp_path, None, 0, shards)


def test_nothing_to_load_and_nowhere_to_save_are_errors(tmp_path):
    with pytest.raises(UserError, match="holds no saved memory"):
        MemoryShard.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"shard-00000-of-00001\.memory cannot be written"):
        new_shards(1).save(tmp_path / "file")


def test_forgotten_keys_that_come_back_have_none_of_their_old_vectors(tmp_path):
    shards = new_shards(1, MemoryConfig(budget_gib=3_000 / 2**30))
    shards.save(tmp_path)
    for seed in range(5, 9):
        shards.step(*draw(seed, count=8)).save(tmp_path)
    assert shards.shards[0].stats()["keys"] < len(KEYS)
    assert Shards.load(tmp_path, 1).lookup(*draw(9)) == shards.lookup(*draw(9))


@pytest.mark.parametrize("loaded_on", [1, 3])
def test_statistics_of_a_loaded_shard(tmp_path, loaded_on):
    before = new_shards(1, MemoryConfig(window=9)).save(tmp_path).shards[0].stats()
    loaded = [shard.stats() for shard in Shards.load(tmp_path, loaded_on).shards]
    for name in ("keys", "vectors", "clusters", "noise_vectors", "no_answer", "bytes"):
        assert sum(after[name] for after in loaded) == before[name]
    for place, theirs in enumerate(before["moments"]):
        np.testing.assert_allclose(sum(after["moments"][place] for after in loaded), theirs, atol=1e-9)
    assert all(after["lookups"] == after["reclustered_keys"] == 0 for after in loaded)


@pytest.mark.parametrize("other", [{"norm": "all"}, {"layer_diff": True}, {"last_n_layers": 5}])
def test_vectors_made_in_another_way_are_refused(tmp_path, other):
    new_shards(1).save(tmp_path)
    ((name, value),) = other.items()
    with pytest.raises(UserError, match=f"was saved with memory.{name}=.*, this run has {value}: "):
        MemoryShard.load(tmp_path, MemoryConfig(**other))


def test_a_shard_can_be_loaded_under_other_cluster_settings(tmp_path):
    new_shards(1).save(tmp_path)
    config = MemoryConfig(allow_single_cluster=True, min_cluster_size=3)
    loaded, expected = Shards.load(tmp_path, 2, config), new_shards(2, config)
    assert loaded.lookup(*draw(9)) == expected.lookup(*draw(9))
    assert dataclasses.asdict(loaded.shards[0].config) == dataclasses.asdict(config)
