"""`meds check` on this machine."""

import pytest

from meds_megatron.config import load_config
from meds_megatron.errors import UserError
from meds_megatron.preflight.check import Finding, check

QUICKSTART = "configs/quickstart.yaml"


@pytest.mark.usefixtures("own_ray")
def test_a_machine_that_is_ready(tmp_path):
    """With the link between two pipeline stages, and without making the run directory."""
    config = load_config(QUICKSTART, ["cluster.device=cpu", f"run_dir={tmp_path}/runs/new"])
    findings = check(config)
    by_name = {finding.what: finding for finding in findings}
    assert all(finding.ok for finding in findings if finding.what not in ("disk", "shared memory")), findings
    assert "torch 2." in by_name["versions"].found and "megatron-core 0." in by_name["versions"].found
    assert by_name["layers"].found == "local: Transformer Engine needs a GPU"
    assert by_name["pipeline links"].found.endswith("GB/s over 2 ranks")
    assert float(by_name["pipeline links"].found.split()[0]) > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("own_ray")
def test_what_is_not_ready_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config(QUICKSTART, ["cluster.device=cpu", "run_dir=/proc/new"])
    failed = [finding.what for finding in check(config, links=False) if not finding.ok]
    assert "run directory" in failed
    config.data.train = [str(tmp_path / "none.jsonl")]
    with pytest.raises(UserError, match=r"none\.jsonl: node .* cannot read it"):
        check(config, links=False)


def test_nodes_with_other_versions_are_named():
    from meds_megatron.preflight.check import _compare_versions

    same = [Finding("a", "versions", "ray 2"), Finding("b", "versions", "ray 2")]
    assert _compare_versions(same) == []
    assert not _compare_versions([*same, Finding("c", "versions", "ray 3")])[0].ok
