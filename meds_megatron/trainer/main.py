"""`meds train`: from a config to a trained model, in as many attempts as it takes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from meds_megatron.cluster.device import resolve_device
from meds_megatron.cluster.fork_server import ForkServer
from meds_megatron.cluster.ray_cluster import NodesUnavailable, RayCluster, ray_cluster
from meds_megatron.cluster.ray_probe import RayProbe
from meds_megatron.config import Config
from meds_megatron.config.functions import resolve_functions
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.validate import validate, validate_model
from meds_megatron.errors import EXIT_REQUEUE, RayDied, RayletDied, RunFailed, Stopped, UserError
from meds_megatron.faults.interruption import Interruption
from meds_megatron.faults.recovery import Decision, Failure, Recovery
from meds_megatron.faults.supervision import HardwareFailed, ProcessDied
from meds_megatron.faults.watchdog import Hung
from meds_megatron.plan.choices import with_choices
from meds_megatron.plan.fit import check_fit
from meds_megatron.plan.hardware import CPU, H100
from meds_megatron.run.directory import RunDirectory
from meds_megatron.toy_tasks.make import ensure_model
from meds_megatron.trainer.attempt import attempt
from meds_megatron.trainer.model_check import check_model_files
from meds_megatron.trainer.prompts import Prompts, read_prompts


def train(config: Config, servers: Sequence[ForkServer] = ()) -> None:
    """Runs `config` to its end, with workers from `servers`. Raises UserError, before Ray is started, for what can be
    found out by then."""
    config.cluster.device = resolve_device(config.cluster)
    validate(config)
    resolve_functions(config)
    check_machine(config)
    model_dir = ensure_model(config.model, config.data, config.cache_dir, report=_print_progress)
    shape = ModelShape.from_hf(model_dir)
    validate_model(config, shape)
    on_gpu = config.cluster.device == "cuda"
    if on_gpu:
        check_fit(config, shape, H100)
    config = with_choices(config, shape, H100 if on_gpu else CPU, on_gpu)
    prompts = read_prompts(config, check_model_files(model_dir, shape))
    run = RunDirectory(config.run_dir)
    with run.claim(config):
        checkpoint = run.newest_checkpoint()
        if checkpoint and checkpoint.step >= config.train.steps:
            _print_progress(f"{run.path} has finished its {checkpoint.step} steps: raise train.steps to continue")
            return
        # Processes on other nodes have other working directories.
        config.run_dir = str(run.path)
        with ray_cluster(config.cluster) as cluster, Interruption() as interruption:
            repeat_attempts(config, model_dir, prompts, run, interruption, cluster, servers)
        report(run)


def report(run: RunDirectory) -> None:
    """Writes the report of a finished run. The run is whole without it, so what goes wrong here is only reported."""
    # With numba for the clustering: the training does not need it.
    from meds_megatron.report.page import write_report

    try:
        run.check_lock()
        write_report([run.path], run.report)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _print_progress(f"there is no report of the run ({reason}): try `meds report {run.path}`")
    else:
        _print_progress(f"the report of the run is {run.report}")


def repeat_attempts(
    config: Config,
    model_dir: Path,
    prompts: Prompts,
    run: RunDirectory,
    interruption: Interruption,
    cluster: RayCluster,
    servers: Sequence[ForkServer] = (),
) -> None:
    """Attempts the run until it is finished.

    Raises RunFailed when `Recovery` gives it up, and Stopped, with the exit code on which schedulers start it again,
    when a node or a Ray that is not the run's own has been lost or a signal came during a failure.
    """
    recovery = Recovery(config.faults.max_restarts, run.last_logged_step(), cluster.is_own)
    failure: Failure | None = None
    while True:
        try:
            if failure is Failure.RAY_DIED:
                cluster.restart()
            with RayProbe(interruption.ray_died, interruption.raylet_died) as probe:
                attempt(config, model_dir, prompts, run, interruption, servers)
            return
        except (RunFailed, NodesUnavailable, RayDied) as error:
            recovery.finished(run.last_logged_step())
            failure, sentence = failure_of(error), str(error)
            if failure is not Failure.RAY_DIED and (death := probe.death()):
                # The run's processes end soon after those of Ray.
                failure, sentence = Failure.RAY_DIED, f"{death}, and {error}"
            if failure is Failure.RAY_DIED:
                interruption.forget_ray()
            if interruption.requested.done():
                recovery.stop_requested()
            decision = recovery.failed(failure)
            if decision is Decision.REQUEUE:
                raise Stopped(f"{sentence}: ended to be started again", EXIT_REQUEUE) from error
            if decision is Decision.STOP:
                if failure is Failure.NO_NODES:
                    raise
                raise RunFailed(
                    f"{sentence}; given up after {recovery.in_a_row} restarts without a new step (faults.max_restarts)"
                ) from error
            _print_progress(sentence)
            _print_progress(
                f"restart {recovery.in_a_row} of at most {recovery.max_restarts} without a new step; step "
                f"{recovery.furthest} was finished last"
            )


def failure_of(error: RunFailed | NodesUnavailable | RayDied) -> Failure:
    """Kind of failure that ended an attempt."""
    kinds = {
        NodesUnavailable: Failure.NO_NODES,
        ProcessDied: Failure.DIED,
        HardwareFailed: Failure.DIED,
        Hung: Failure.HUNG,
        RayDied: Failure.RAY_DIED,
        RayletDied: Failure.RAY_DIED,
    }
    return kinds[type(error)]


def check_machine(config: Config) -> None:
    """Raises UserError for a run that this machine cannot hold."""
    cluster = config.cluster
    if cluster.device == "cuda" and cluster.address is None:
        import torch

        if torch.cuda.device_count() < cluster.ranks_per_node:
            raise UserError(
                f"cluster.ranks_per_node = {cluster.ranks_per_node}, but this machine has {torch.cuda.device_count()} "
                "GPUs; lower it, and parallel.tensor and parallel.pipeline with it"
            )


def _print_progress(text: str) -> None:
    print(f"meds: {text}", file=sys.stderr)
