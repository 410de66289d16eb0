"""What is saved comes back, on any number of shards; what is damaged is named and harms nothing else."""

import json
import os
import shutil
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


class Fleet:
    """Shards side by side, keys routed."""

    def __init__(self, shards: list[MemoryShard]):
        self.shards = shards

    @classmethod
    def load(cls, directory: Path, count: int, config: MemoryConfig | None = None) -> "Fleet":
        return cls([MemoryShard.load(directory, config, rank, count) for rank in range(count)])

    def route(self, keys: list[str]):
        owners = np.array([shard_of(key, len(self.shards)) for key in keys])
        for owner, shard in enumerate(self.shards):
            rows = np.flatnonzero(owners == owner)
            yield shard, rows, [keys[row] for row in rows]

    def step(self, keys: list[str], fingerprints: np.ndarray) -> "Fleet":
        for shard, rows, mine in self.route(keys):
            shard.remember(mine, fingerprints[rows])
            shard.recluster()
        return self

    def lookup(self, keys: list[str], fingerprints: np.ndarray) -> list[int]:
        sizes = np.zeros(len(keys), int)
        for shard, rows, mine in self.route(keys):
            sizes[rows] = shard.lookup(mine, fingerprints[rows])
        return sizes.tolist()

    def save(self, directory: Path) -> "Fleet":
        for shard in self.shards:
            shard.save(directory)
        return self


def new_fleet(count: int, config: MemoryConfig | None = None, steps: int = 3) -> Fleet:
    fleet = Fleet([MemoryShard(config or MemoryConfig(), rank, count) for rank in range(count)])
    for seed in range(1, steps + 1):
        fleet.step(*draw(seed))
    return fleet


def segments_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.segment"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("loaded_on", [1, 3, 4, 7])
@pytest.mark.parametrize(
    "config", [MemoryConfig(), MemoryConfig(window=9, half_life_steps=2.0), MemoryConfig(layer_diff=True)]
)
def test_saved_on_four_and_loaded_on_another_number(tmp_path, config, loaded_on):
    saved = new_fleet(4, config).save(tmp_path)
    loaded = Fleet.load(tmp_path, loaded_on)
    assert loaded.shards[0].config == config
    for seed in (7, 8, 9):
        assert loaded.lookup(*draw(seed)) == saved.lookup(*draw(seed))
        loaded.step(*draw(seed))
        saved.step(*draw(seed))
    loaded.save(tmp_path / "again")
    again = Fleet.load(tmp_path / "again", 2)
    assert again.lookup(*draw(5)) == saved.lookup(*draw(5))


def test_a_save_writes_only_what_is_new_and_is_whole_by_itself(tmp_path):
    fleet = new_fleet(2).save(tmp_path / "first")
    before = segments_in(tmp_path / "first")
    fleet.step(*draw(4)).save(tmp_path / "second")
    after = segments_in(tmp_path / "second")
    assert len(before) == 2 and len(after) == 4
    shared = {path.name for path in before} & {path.name for path in after}
    assert len(shared) == 2
    assert all(os.path.samefile(tmp_path / "first" / name, tmp_path / "second" / name) for name in shared)
    shutil.rmtree(tmp_path / "first")
    assert Fleet.load(tmp_path / "second", 2).lookup(*draw(9)) == fleet.lookup(*draw(9))
    # The linked segments' first home is gone; the next save still finds them where they were saved last.
    fleet.step(*draw(5)).save(tmp_path / "third")
    assert Fleet.load(tmp_path / "third", 3).lookup(*draw(9)) == fleet.lookup(*draw(9))


def test_a_resumed_run_goes_on_adding(tmp_path):
    new_fleet(1).save(tmp_path / "first")
    resumed = Fleet.load(tmp_path / "first", 1).step(*draw(4)).save(tmp_path / "second")
    assert len(segments_in(tmp_path / "second")) == 2
    assert Fleet.load(tmp_path / "second", 1).lookup(*draw(9)) == resumed.lookup(*draw(9))


def test_what_waits_for_a_recluster_is_saved_too(tmp_path):
    fleet = new_fleet(1)
    keys, fingerprints = draw(4)
    fleet.shards[0].remember(keys, fingerprints)
    fleet.save(tmp_path)
    loaded = Fleet.load(tmp_path, 1)
    assert loaded.lookup(*draw(9)) == fleet.lookup(*draw(9))
    for each in (fleet, loaded):
        each.shards[0].recluster()
    assert loaded.lookup(*draw(9)) == fleet.lookup(*draw(9))
    loaded.save(tmp_path)
    assert Fleet.load(tmp_path, 3).lookup(*draw(9)) == fleet.lookup(*draw(9))


def test_segments_that_are_mostly_dropped_are_written_anew(tmp_path):
    fleet = new_fleet(1, MemoryConfig(window=2), steps=0)
    for seed in range(8):
        fleet.step(*draw(seed)).save(tmp_path)
    assert fleet.shards[0].stats()["vectors"] == 2 * len(KEYS)
    # Eight steps of 60 vectors of 60 bytes would take more than twice as much.
    assert sum(path.stat().st_size for path in segments_in(tmp_path)) < 12_000
    assert Fleet.load(tmp_path, 1).lookup(*draw(9)) == fleet.lookup(*draw(9))


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_remove(path: Path) -> None:
    path.unlink()


def damage_version(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] = 9
    path.write_bytes(content)


DAMAGES = [
    (damage_cut, "is cut short"),
    (damage_flip, "checksum differs"),
    (damage_remove, "is missing"),
    (damage_version, "has format version 9, this program reads version 1"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_segment_is_named_and_the_rest_loads_if_told_to(tmp_path, damage, said):
    fleet = new_fleet(2)
    fleet.save(tmp_path).step(*draw(4)).save(tmp_path)
    damaged = segments_in(tmp_path)[-1]
    damage(damaged)
    with pytest.raises(DamagedError, match=said) as error:
        Fleet.load(tmp_path, 3)
    assert damaged.name in str(error.value) and isinstance(error.value, UserError)
    rest = Fleet.load(tmp_path, 1, MemoryConfig(skip_damaged=True)).shards[0]
    assert len(rest.damages) == 1 and damaged.name in rest.damages[0]
    lost = fleet.shards[0].stats()["vectors"] + fleet.shards[1].stats()["vectors"] - rest.stats()["vectors"]
    assert 0 < lost < 60
    # The shard that does not own the segment is untouched, and a save of what is left is whole.
    whole = 0
    for rank in (0, 1):
        try:
            MemoryShard.load(tmp_path, None, rank, 2)
            whole += 1
        except DamagedError:
            pass
    assert whole == 1
    rest.save(tmp_path / "mended")
    mended = MemoryShard.load(tmp_path / "mended")
    assert mended.lookup(*draw(9)).tolist() == rest.lookup(*draw(9)).tolist()


@pytest.mark.parametrize(("damage", "said"), [(damage_remove, "is missing"), (damage_cut, "not a whole manifest")])
def test_a_damaged_manifest_is_named(tmp_path, damage, said):
    new_fleet(4).save(tmp_path)
    damage(tmp_path / "shard-00002-of-00004.json")
    with pytest.raises(DamagedError, match=f"shard-00002-of-00004.json {said}|shard-00002-of-00004.json is {said}"):
        Fleet.load(tmp_path, 3)
    rest = Fleet.load(tmp_path, 3, MemoryConfig(skip_damaged=True))
    assert all(len(shard.damages) == 1 for shard in rest.shards)


def test_a_manifest_of_another_version_or_content_is_refused(tmp_path):
    new_fleet(1).save(tmp_path)
    path = tmp_path / "shard-00000-of-00001.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"version": 2}))
    with pytest.raises(DamagedError, match="has format version 2"):
        MemoryShard.load(tmp_path)
    whole["manifest"]["step"] += 1
    path.write_text(json.dumps(whole))
    with pytest.raises(DamagedError, match="checksum differs"):
        MemoryShard.load(tmp_path)


def test_another_layout_saved_in_the_same_place_supersedes_the_first(tmp_path):
    new_fleet(4).save(tmp_path)
    three = Fleet.load(tmp_path, 3).step(*draw(4)).save(tmp_path)
    assert Fleet.load(tmp_path, 5).lookup(*draw(9)) == three.lookup(*draw(9))


def test_nothing_to_load_and_vectors_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no saved memory"):
        MemoryShard.load(tmp_path / "nowhere")
    new_fleet(1).save(tmp_path)
    with pytest.raises(UserError, match="saved with memory.last_n_layers=14, this run has 5"):
        MemoryShard.load(tmp_path, MemoryConfig(last_n_layers=5))


def test_forgotten_keys_that_come_back_do_not_meet_their_old_vectors(tmp_path):
    fleet = new_fleet(1, MemoryConfig(budget_gib=3_000 / 2**30))
    fleet.save(tmp_path)
    for seed in range(5, 9):
        fleet.step(*draw(seed, count=8)).save(tmp_path)
    assert fleet.shards[0].stats()["keys"] < len(KEYS)
    assert Fleet.load(tmp_path, 1).lookup(*draw(9)) == fleet.lookup(*draw(9))


def test_a_loaded_shard_knows_what_it_holds(tmp_path):
    fleet = new_fleet(1, MemoryConfig(window=9)).save(tmp_path)
    before, after = fleet.shards[0].stats(), MemoryShard.load(tmp_path).stats()
    for name in ("keys", "vectors", "clusters", "noise_vectors", "unboxed", "bytes"):
        assert after[name] == before[name]
    for ours, theirs in zip(after["moments"], before["moments"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert after["lookups"] == after["reclustered_keys"] == 0


@pytest.mark.parametrize("other", [{"norm": "all"}, {"layer_diff": True}, {"last_n_layers": 3}])
def test_vectors_that_mean_something_else_are_refused(tmp_path, other):
    new_fleet(1).save(tmp_path)
    (name,) = other
    with pytest.raises(UserError, match=f"was saved with memory.{name}="):
        MemoryShard.load(tmp_path, MemoryConfig(**other))
