"""A run replayed from the token ids of its rollout files with plain numpy, hdbscan, torch and transformers.

Nothing of the trainer is imported. `Replay.step` recomputes every column of a step's rollout file and takes the step's
optimizer updates with a transformers model and torch's AdamW. Cluster sizes follow from the stored fingerprints, so
that rounding in the replayed weights cannot move a vector into another cluster.
"""

import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import hdbscan
import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

BOX = re.compile(r"\\boxed\s*\{")
UNKNOWN, NOISE = -2, -1
SAME_DISTANCE = 1e-9


@dataclass
class ReplayedStep:
    rows: list[dict]
    """The rollout file."""
    columns: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    """Recomputed, in the order of `rows`; of `cluster_size` and `cluster_label` the set of possible values: several
    where neighbours are equally near or a vote is tied."""
    losses: list[float] = field(default_factory=list)
    """Losses by mini-batch, as `grad_norms`."""
    grad_norms: list[float] = field(default_factory=list)
    entropy: float = 0.0
    """Mean over the tokens that are trained on, before the first update."""


class Replay:
    """A run from its first step on; its model is trained as the steps are replayed."""

    def __init__(self, run: Path, model_dir: Path):
        self.run = run
        self.config = yaml.safe_load((run / "config.yaml").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        adam = self.config["optimizer"]
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [dict(params=matrices, weight_decay=adam["weight_decay"]), dict(params=vectors, weight_decay=0.0)],
            betas=(adam["beta1"], adam["beta2"]),
            eps=adam["epsilon"],
        )
        self.vectors: dict[str, list[np.ndarray]] = defaultdict(list)
        self.steps: dict[str, list[int]] = defaultdict(list)
        """Steps in which each vector was remembered."""
        self.no_answer: dict[str, list[int]] = defaultdict(list)
        """Steps of the mistakes without an answer."""

    def step(self, number: int) -> ReplayedStep:
        rows = pq.read_table(self.run / "rollouts" / f"step_{number:06d}.parquet").to_pylist()
        step = ReplayedStep(rows)
        self._grade(step)
        self._shape(step, number)
        self._keep(step)
        self._advantages(step)
        for row in step.rows:
            row["prompt_ids"] = self._prompt_ids(row["prompt"])
        with torch.no_grad():
            logprobs, entropies, step.columns["fingerprint"] = self._forward(step.rows, step.columns["position"])
        kept = step.columns["kept"]
        step.entropy = torch.cat([entropy for entropy, keep in zip(entropies, kept, strict=True) if keep]).mean().item()
        self._update(step, logprobs, number)
        self._remember(step, number)
        return step

    def _prompt_ids(self, question: str) -> list[int]:
        system = self.config["data"]["system_prompt"]
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": question})
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def _grade(self, step: ReplayedStep) -> None:
        """Correctness, for answers that are whole numbers, over-long penalty, and the position of the answer."""
        longest, overlong = self.config["rollout"]["max_response_tokens"], self.config["reward"]["overlong"]
        for row in step.rows:
            ids = row["response_token_ids"]
            boxes = list(BOX.finditer(row["response"]))
            answer, closed, _ = row["response"][boxes[-1].end() :].partition("}") if boxes else ("", "", "")
            correct = bool(closed) and answer.strip() == row["answer"]
            excess = len(ids) - (longest - overlong["buffer"])
            penalty = min(-excess / overlong["buffer"] * overlong["factor"], 0.0) if overlong["enabled"] else 0.0
            lengths = [len(self.tokenizer.decode(ids[: end + 1], skip_special_tokens=True)) for end in range(len(ids))]
            position = next((i for i, length in enumerate(lengths) if boxes and length >= boxes[-1].end()), -1)
            if position >= 0 and (position + 1 == len(ids) or ids[position + 1] in self.tokenizer.all_special_ids):
                position = -1
            step.columns["correct"].append(correct)
            step.columns["score"].append(correct + penalty)
            step.columns["position"].append(position)

    def _shape(self, step: ReplayedStep, number: int) -> None:
        """Clusters of the mistakes of earlier steps, penalty and shaped score of the wrong responses."""
        assert self.config["penalty"]["target"] == "wrong"
        labels = {key: cluster_labels(vectors, self.config["memory"]) for key, vectors in self.vectors.items()}
        for row, correct, score, position in zip(
            step.rows, *(step.columns[name] for name in ("correct", "score", "position")), strict=True
        ):
            key, possible, sizes = row["key"], None, {0}
            if not correct and position >= 0:
                fingerprint_L = np.array(row["fingerprint"])
                possible = nearest_labels(self.vectors[key], labels.get(key, []), fingerprint_L, self.config["memory"])
                ignored = {UNKNOWN, NOISE} if self.config["memory"]["noise"] == "ignore" else {UNKNOWN}
                members: dict[int, list[int]] = defaultdict(list)
                for label, remembered in zip(labels.get(key, []), self.steps[key], strict=True):
                    members[label].append(remembered)
                sizes = {0 if label in ignored else self._size(members[label], number) for label in possible}
            elif not correct and self.config["memory"]["no_answer"] == "own_cluster":
                sizes = {self._size(self.no_answer[key], number)}
            size = row["cluster_size"] if row["cluster_size"] in sizes else min(sizes)
            penalty = self.config["penalty"]["alpha"] * min(np.log(size + 1), 2)
            step.columns["cluster_label"].append(possible)
            step.columns["cluster_size"].append(sizes)
            step.columns["penalty"].append(penalty)
            step.columns["shaped_score"].append(score if correct else score - penalty)

    def _size(self, remembered: list[int], now: int) -> int:
        """Size of a cluster whose members were remembered in these steps."""
        half_life = self.config["memory"]["half_life_steps"]
        return round(sum(1.0 if half_life is None else 0.5 ** ((now - step) / half_life) for step in remembered))

    def _keep(self, step: ReplayedStep) -> None:
        """The first groups with a spread in the filter's metric, as many as a step trains on."""
        metric, missing = self.config["filter"]["metric"], self.config["train"]["prompts_per_step"]
        values = step.columns["shaped_score" if metric == "shaped" else "correct"]
        for rows in groups(step.rows):
            keep = missing > 0 and (metric == "none" or len({values[row] for row in rows}) > 1)
            missing -= keep
            step.columns["kept"] += [keep] * len(rows)

    def _advantages(self, step: ReplayedStep) -> None:
        advantage = self.config["advantage"]
        for rows in groups(step.rows):
            scores_B = np.array([step.columns["shaped_score"][row] for row in rows])
            mixed = len({step.columns["correct"][row] for row in rows}) > 1
            std = max(scores_B.std(ddof=1), 0.0 if mixed else advantage["std_floor"])
            values = (scores_B - scores_B.mean()) / (std + advantage["epsilon"])
            step.columns["advantage"] += list(values) if step.columns["kept"][rows[0]] else [None] * len(rows)

    def _forward(self, rows: list[dict], positions: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor], list]:
        """Log-probs and entropies of each response, and its fingerprint: the logit of the answer's first token in each
        layer. Padding on the right is invisible to causal attention."""
        sequences = [torch.tensor(row["prompt_ids"] + row["response_token_ids"]) for row in rows]
        output = self.model(pad_sequence(sequences, batch_first=True), output_hidden_states=True)
        logits_BSV = output.logits / self.config["rollout"]["temperature"]
        head_VH = self.model.get_output_embeddings().weight
        logprobs, entropies, fingerprints = [], [], []
        for row, position, sequence, logits_SV, *hidden_SH in zip(
            rows, positions, sequences, logits_BSV, *output.hidden_states[1:], strict=True
        ):
            prompt = len(row["prompt_ids"])
            all_RV = logits_SV[prompt - 1 : len(sequence) - 1].log_softmax(-1)
            logprobs.append(all_RV.gather(1, sequence[prompt:, None])[:, 0])
            entropies.append(-(all_RV.exp() * all_RV).sum(-1).detach())
            states = [layer_SH[prompt + position] for layer_SH in hidden_SH]
            target = sequence[prompt + position + 1] if position >= 0 else 0
            fingerprints.append([float(state_H @ head_VH[target]) for state_H in states] if position >= 0 else None)
        return logprobs, entropies, fingerprints

    def _update(self, step: ReplayedStep, old: list[torch.Tensor], number: int) -> None:
        """AdamW on the clipped surrogate, a mini-batch of kept groups at a time, token mean."""
        policy, advantage, size = self.config["policy"], self.config["advantage"], self.config["train"]
        assert (policy["loss"], policy["aggregation"], policy["importance"]) == ("ppo", "token_mean", "none")
        warmup = max(self.config["optimizer"]["warmup_steps"], 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config["optimizer"]["lr"] * min(number / warmup, 1.0)
        kept = [rows for rows in groups(step.rows) if step.columns["kept"][rows[0]]]
        for first in range(0, len(kept), size["mini_batch_prompts"]):
            chosen = [row for rows in kept[first : first + size["mini_batch_prompts"]] for row in rows]
            logprobs, entropies, _ = self._forward([step.rows[row] for row in chosen], [-1] * len(chosen))
            losses = []
            for row, logprobs_R, entropy_R in zip(chosen, logprobs, entropies, strict=True):
                ratio_R = (logprobs_R - old[row]).exp()
                a_R = torch.full_like(entropy_R, step.columns["advantage"][row])
                if advantage["entropy_coefficient"]:
                    bound_R = a_R.abs() / advantage["entropy_bound"]
                    a_R = a_R + torch.minimum(advantage["entropy_coefficient"] * entropy_R, bound_R)
                clipped_R = ratio_R.clamp(1 - policy["clip_low"], 1 + policy["clip_high"])
                loss_R = torch.maximum(-a_R * ratio_R, -a_R * clipped_R)
                losses.append(torch.where(a_R < 0, loss_R.minimum(-a_R * policy["dual_clip"]), loss_R))
            self.optimizer.zero_grad()
            loss = torch.cat(losses).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config["optimizer"]["clip_grad"])
            self.optimizer.step()
            step.losses.append(loss.item())
            step.grad_norms.append(norm.item())

    def _remember(self, step: ReplayedStep, number: int) -> None:
        for place, row in enumerate(step.rows):
            remembered = step.columns["kept"][place] or self.config["memory"]["remember_filtered"]
            if step.columns["correct"][place] or not remembered:
                continue
            if step.columns["position"][place] >= 0:
                self.vectors[row["key"]].append(np.array(row["fingerprint"]))
                self.steps[row["key"]].append(number)
            elif self.config["memory"]["no_answer"] == "own_cluster":
                self.no_answer[row["key"]].append(number)


def groups(rows: list[dict]) -> list[list[int]]:
    """Places of the rows of each prompt, in order."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        found[row["group"]].append(place)
    return list(found.values())


def unit_vectors(vectors: list[np.ndarray], layers: int) -> np.ndarray:
    vectors_NF = np.stack(vectors)[:, -layers:].astype(np.float64)
    return vectors_NF / np.linalg.norm(vectors_NF, axis=1, keepdims=True)


def cluster_labels(vectors: list[np.ndarray], memory: dict) -> list[int]:
    assert (memory["method"], memory["layer_diff"], memory["window"]) == ("hdbscan", False, None)
    if len(vectors) < 2:
        return [NOISE] * len(vectors)
    model = hdbscan.HDBSCAN(
        min_cluster_size=memory["min_cluster_size"],
        min_samples=memory["min_samples"],
        allow_single_cluster=memory["allow_single_cluster"],
        approx_min_span_tree=False,
        core_dist_n_jobs=1,
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return model.fit(unit_vectors(vectors, memory["last_n_layers"])).labels_.tolist()


def nearest_labels(vectors: list[np.ndarray], labels: list[int], query_L: np.ndarray, memory: dict) -> set[int]:
    """Labels that may win the vote of the nearest vectors: several where neighbours are equally near or the vote is
    tied."""
    if not vectors:
        return {UNKNOWN}
    layers, votes = memory["last_n_layers"], min(memory["knn"], len(vectors))
    distances_N = 1.0 - unit_vectors(vectors, layers) @ unit_vectors([query_L], layers)[0]
    farthest = np.sort(distances_N)[votes - 1]
    nearer = [label for label, d in zip(labels, distances_N, strict=True) if d < farthest - SAME_DISTANCE]
    as_far = Counter(label for label, d in zip(labels, distances_N, strict=True) if abs(d - farthest) <= SAME_DISTANCE)
    as_far = [label for label, count in as_far.items() for _ in range(min(count, votes))]
    winners = set()
    for others in set(combinations(as_far, votes - len(nearer))):
        counts = Counter([*nearer, *others])
        winners |= {label for label, count in counts.items() if count == max(counts.values())}
    return winners
