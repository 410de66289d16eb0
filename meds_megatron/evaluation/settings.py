"""Settings of an evaluation: all that its responses and verdicts depend on, and the name of its output."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from meds_megatron.config import DataConfig
from meds_megatron.errors import UserError

Dtype = Literal["float32", "bfloat16"]
LONGEST_RESPONSE = 8192
"""Default of --max-tokens, or what the model's positions allow."""


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling of the responses, as on the command line."""

    n_sampling: int = 1
    """Responses to each problem."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    max_tokens: int = LONGEST_RESPONSE
    seed: int = 0
    dtype: Literal["auto"] | Dtype = "auto"
    """`auto` is the model's own."""

    def check(self) -> None:
        """Raises UserError for settings that give n equal responses."""
        if self.temperature == 0 and self.n_sampling > 1:
            raise UserError(
                f"--temperature 0 gives {self.n_sampling} equal responses to each problem: raise it, or set "
                "--n-sampling 1"
            )


@dataclass(frozen=True)
class EvalSettings:
    """One data set and how it is evaluated: the header of its output."""

    model: str
    """Absolute path of the directory, or of the run."""
    model_files: str
    """Digest of names, sizes and times of the model's files."""
    data: str
    data_digest: str
    """Digest of the file's content."""
    start_idx: int
    end_idx: int
    """Problems [start_idx:end_idx] of the file; -1 is all from start_idx on."""
    prompt_type: str
    system_prompt: str | None
    chat_template: bool
    enable_thinking: bool | None
    sampling: SamplingSettings
    graders: tuple[str, ...]
    fingerprints: bool
    versions: dict[str, str]
    """Versions of vLLM, torch and this package."""

    def header(self) -> dict[str, Any]:
        """The settings as in the output's first row."""
        return asdict(self) | {"graders": list(self.graders)}

    @property
    def file_name(self) -> str:
        """Name with every setting but the paths; texts are in it by a digest."""
        sampling = self.sampling
        prompt = self.prompt_type
        if self.system_prompt not in (None, DataConfig.system_prompt):
            prompt += "-" + hashlib.blake2b(self.system_prompt.encode(), digest_size=3).hexdigest()
        if self.enable_thinking is not None:
            prompt += "-thinking" if self.enable_thinking else "-no-thinking"
        parts = [
            prompt,
            f"t{sampling.temperature:g}",
            f"p{sampling.top_p:g}",
            f"topk{sampling.top_k}",
            f"n{sampling.n_sampling}",
            f"max{sampling.max_tokens}",
            f"seed{sampling.seed}",
            f"s{self.start_idx}",
            f"e{self.end_idx}",
            sampling.dtype,
            "+".join(self.graders),
        ]
        return "_".join(parts + (["fingerprints"] if self.fingerprints else [])) + ".jsonl"


@dataclass(frozen=True)
class EngineOptions:
    """Placement and resources of the engines; the responses do not depend on them, rounding aside."""

    address: str | None = None
    """Ray cluster to join; None starts Ray on this machine."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    engines: int | None = None
    """None takes all GPUs, and one engine without GPUs."""
    tensor: int = 1
    threads: int | None = None
    """CPU threads of an engine rank without CUDA; None is one."""
    max_num_seqs: int = 256
    kv_cache_gib: float | None = None
    """KV cache of an engine rank; None is what vLLM finds free, and 1 without CUDA."""
    enforce_eager: bool = False
    workers: int = 1
    """Grader processes."""


@dataclass(frozen=True)
class EvalRequest:
    """Request of a command line."""

    model: str
    data: tuple[str, ...]
    """jsonl or parquet files, or `arithmetic`, the toy task."""
    sampling: SamplingSettings
    max_tokens: int | None
    """None: LONGEST_RESPONSE, or less where the model has fewer positions."""
    ks: tuple[int, ...]
    graders: tuple[str, ...]
    prompt_type: str
    """`qwen-instruct` is LIMO's (the system message of Qwen-Math and the chat template), `question` the bare question,
    and `auto` what a run was trained with, or `qwen-instruct` for a model of no run."""
    enable_thinking: bool | None
    start_idx: int
    end_idx: int
    output_dir: Path
    engines: EngineOptions
    fingerprints: bool = False


def request_of(
    model: str | None,
    data: Sequence[str],
    ks: Sequence[int] | None,
    graders: tuple[str, ...],
    workers: int,
    **options: Any,
) -> EvalRequest:
    """The request of a command line; `options` are the other fields of the four classes above by name.

    Raises UserError where the model or the data is not given.
    """
    if not model or not data:
        raise UserError("expected a model and --data FILE, or --regrade FILE: see meds eval --help")

    def those_of(kind: type) -> dict[str, Any]:
        return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}

    max_tokens = options.pop("max_tokens")
    if options["temperature"] is None:
        options["temperature"] = 0.0 if options["n_sampling"] == 1 else 1.0
    return EvalRequest(
        model=model,
        data=tuple(dict.fromkeys(data)),
        max_tokens=max_tokens,
        ks=tuple(ks or ()),
        graders=graders,
        output_dir=Path(options.pop("output_dir")).expanduser().absolute(),
        sampling=SamplingSettings(**those_of(SamplingSettings)),
        engines=EngineOptions(workers=workers, **those_of(EngineOptions)),
        **options,
    )


def dataset_name(source: str) -> str:
    """Name of a data set: the stem of its file, with LIMO's layout (`aime/test.jsonl`) that of its directory."""
    path = Path(source)
    is_split = path.stem in ("test", "train", "validation") and path.absolute().parent.name
    return path.absolute().parent.name if is_split else path.stem


def content_digest(source: str) -> str:
    """Digest of a file's content; "" for a generated task."""
    path = Path(source).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def files_digest(directory: Path) -> str:
    """Digest of names, sizes and times of the files in a directory."""
    found = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.iterdir())
    return hashlib.sha256(repr(found).encode()).hexdigest()


def request_seed(seed: int, dataset: str, problem_id: str) -> int:
    """Seed of a problem's first response; response i has this plus i. Below 2^62, other for every problem."""
    digest = hashlib.blake2b(f"{seed}\0{dataset}\0{problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
