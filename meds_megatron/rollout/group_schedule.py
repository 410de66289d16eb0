"""Schedule of the prompts to generate and the groups that a training step takes: a state machine without I/O."""

from collections.abc import Sequence
from math import sqrt

from meds_megatron.config import Config


class GroupSchedule:
    """Admits prompts to generation, and finished groups to the step that is open.

    A group is admitted under the policy version of that moment, and no step trains on it when the version is higher by
    more than `train.max_staleness`: that step is its deadline. Finished groups are examined (scored, filtered) in
    chunks; those kept fill the open step up to P = `train.prompts_per_step`, those dropped are replaced.

    With `max_staleness` 0 a step admits generation batches of `filter.generation_prompts`, each when the one before is
    finished and examined whole, until it is full: dynamic sampling as published, which leaves nothing over.

    With S > 0 prompts are admitted as soon as there is room for them, also between steps (as many for each as its
    generation batches would have), and groups are examined as they finish. Those that a full step has no use for wait
    for the next one. For every version d from the current one v on, slack(d) is the number of places in steps up to
    that of version d, less those that groups whose deadline is at d or before will need:

        slack(d) = places left in the open step + (d - v) P - demand(groups with a deadline <= d)

    Groups are admitted only while slack(v + S) > 0, and one is examined before others of earlier deadlines only where
    slack remains for all of those (earliest deadline first is feasible). A step waits for the groups whose deadline it
    is: those that finish late are no worse off. The last steps admit only what the steps after them have places for.

    demand is the number of groups, so that slack is never below 0 and nothing is thrown away for its age. Only with
    `filter.generation_prompts` G above P is it less: as many of the groups as the filter is likely to keep, two
    standard deviations above the mean, given what it kept in the last steps. Up to G groups are then under way for a
    step, so that the replacements of those that the filter drops need not be begun when all else is finished; and what
    it keeps beyond that may be dropped for its age, as without staleness everything beyond a full step is.
    """

    def __init__(self, config: Config) -> None:
        self.prompts_per_step = config.train.prompts_per_step
        self.max_staleness = config.train.max_staleness
        self._batch = config.filter.generation_prompts or self.prompts_per_step
        self._max_batches = config.filter.max_batches
        self._chunk = config.train.mini_batch_prompts
        self._generating: dict[int, int] = {}
        """Version of admission of each group whose responses are generated or graded, by its number."""
        self._finished: dict[int, int] = {}
        """The same of finished groups that no step has examined."""
        self.version = 0
        """Version of the policy: that of the open step, or of the next one."""
        self._is_open = False
        self._later_steps = config.train.steps
        self._batches = self._kept = self._examined = 0
        """Counts of the open step: generation batches (with `max_staleness` 0), groups kept and examined."""
        self._drawn = -self.max_staleness * self.prompts_per_step
        """Prompts admitted since the last step was closed; the first step also admits those that are ahead of it."""
        self._recently_kept = self._recently_filtered = 0.0
        """Groups that the filter kept and all that it saw, those of each earlier step counted by half."""

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the groups that were admitted and not examined, in order."""
        return sorted([*self._generating, *self._finished])

    @property
    def missing(self) -> int:
        """Groups that the open step lacks."""
        return self.prompts_per_step - self._kept if self._is_open else 0

    @property
    def generation_batches(self) -> int:
        """Generation batches of the open step; with `max_staleness` above 0 as many as its groups would have made."""
        return self._batches if self.max_staleness == 0 else -(-self._examined // self._batch)

    @property
    def is_complete(self) -> bool:
        """Whether the open step is full, or as full as `filter.max_batches` allows, and no group's last chance."""
        return (self.missing == 0 and not self._due(self.version)) or not (self.unfinished or self.room)

    @property
    def room(self) -> int:
        """Prompts to admit now."""
        if self.max_staleness == 0:
            may_admit = self.missing > 0 and not self.unfinished and self._batches < self._max_batches
            return self._batch if may_admit else 0
        places = self.missing + min(self.max_staleness, self._later_steps) * self.prompts_per_step
        under_way = len(self._generating) + len(self._finished)
        return max(0, min(self._most_under_way(places) - under_way, self._max_batches * self._batch - self._drawn))

    def open_step(self, version: int, later_steps: int) -> None:
        """Begins a step that trains the policy of `version` and is followed by `later_steps`."""
        self.version, self._later_steps, self._is_open = version, later_steps, True
        self._batches = self._kept = self._examined = 0

    def admit(self, numbers: Sequence[int]) -> None:
        """Prompts of these group numbers, higher than all before, are generated from now on."""
        self._generating |= dict.fromkeys(numbers, self.version)
        self._batches += 1
        self._drawn += len(numbers)

    def finish(self, number: int) -> None:
        """All responses of a group are generated and graded."""
        self._finished[number] = self._generating.pop(number)

    def examinable(self) -> list[int]:
        """Finished groups that the open step is to examine now, all in one chunk; none while it waits for others."""
        finished = sorted(self._finished)
        if self.max_staleness == 0:
            return [] if self._generating else finished
        if self.missing == 0:
            return [number for number in finished if number in self._due(self.version)]
        chunk = self._within_deadlines(finished)[: self.missing]
        is_last = not self._generating and not self.room
        return chunk if is_last or len(chunk) >= min(self._chunk, self.missing) else []

    def examined(self, number: int, kept: bool) -> None:
        """A finished group goes into the open step, or is dropped by the filter or as one too many."""
        del self._finished[number]
        if self.missing > 0:
            self._recently_kept += kept
            self._recently_filtered += 1
        self._kept += kept
        self._examined += 1

    def close_step(self) -> None:
        """The open step has all its groups."""
        self._is_open, self._drawn = False, 0
        self._recently_kept /= 2
        self._recently_filtered /= 2

    def _due(self, d: int) -> set[int]:
        """Groups that no step after that of version d may train on."""
        admitted = self._generating | self._finished
        return {number for number, version in admitted.items() if version + self.max_staleness <= d}

    def _within_deadlines(self, numbers: Sequence[int]) -> list[int]:
        """Groups of `numbers` that can be examined together and leave every other group a place before its deadline."""
        slack = {d: self._slack(d) for d in range(self.version, self.version + self.max_staleness)}
        chosen: list[int] = []
        for number in numbers:
            # It takes a place in all steps up to a d that is before its own deadline, and is not counted there.
            earlier = range(self.version, self._finished[number] + self.max_staleness)
            if all(slack[d] > 0 for d in earlier):
                chosen.append(number)
                for d in earlier:
                    slack[d] -= 1
        return chosen

    def _slack(self, d: int) -> float:
        places = self.missing + (d - self.version) * self.prompts_per_step
        return places - self._demand(len(self._due(d)))

    def _demand(self, groups: int) -> float:
        """Places that `groups` groups are likely to need at most."""
        if self._batch <= self.prompts_per_step:
            return groups
        share = self._kept_share
        return min(groups, groups * share + 2 * sqrt(groups * share * (1 - share)))

    def _most_under_way(self, places: int) -> int:
        """Groups to have under way for `places` places."""
        most = max(places, places * self._batch // self.prompts_per_step)
        return next(groups for groups in range(most, places - 1, -1) if self._demand(groups) <= places)

    @property
    def _kept_share(self) -> float:
        """Share of the groups that the filter keeps; 1 before it saw any."""
        return (self._recently_kept + 1) / (self._recently_filtered + 1)
