"""Context parallelism has no owner rule for fingerprints yet, and says so."""

from meds_megatron.errors import UserError


def collect(rank: int) -> str:
    from megatron.core import parallel_state

    from meds_megatron.actor.fingerprint import FingerprintCollector

    parallel_state.initialize_model_parallel(context_parallel_size=2, create_gloo_process_groups=False)
    try:
        FingerprintCollector([], None, "last", "cpu")
    except UserError as error:
        return str(error)
    return ""


def test_fingerprints_refuse_context_parallelism(ranks):
    assert all("context parallelism is not supported yet" in said for said in ranks.run(2, collect))
