import json

from meds_megatron.bench import memory as bench


def test_the_memory_bench_compares_spreads_and_scales():
    small = dict(
        histories=(16, 64),
        keys=24,
        new=12,
        straightforward_keys=6,
        shard_counts=(1, 8),
        sample_keys=64,
        save_steps=(10,),
    )
    answer = bench.run(**small)
    assert json.loads(json.dumps(answer)) == answer
    for row in answer["rows"]:
        assert set(row) == {
            "repeats",
            "history",
            "ours_s",
            "straightforward_s",
            "speedup",
            "lookup_s",
            "same_partition",
        }
        assert row["speedup"] >= 20 and row["same_partition"] == 1.0
    assert [row["repeats"] for row in answer["rows"]] == [0.0, 0.0, 0.5, 0.5]
    assert [row["shards"] for row in answer["shards"]] == [1, 8]
    assert max(row["imbalance"] for row in answer["shards"]) <= 0.15
    assert answer["million"]["ratio"] <= 1.5
    (saved,) = answer["save"]
    vectors = 10 * 24 * 16 // 8
    assert vectors * 4 * (28 + 1) < saved["mib"] * 2**20 < 1.5 * vectors * 4 * (28 + 1)
