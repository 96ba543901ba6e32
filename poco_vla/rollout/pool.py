"""Environments side by side, stepped a whole chunk at a time, in worker processes while the learner learns."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from poco_vla.config import EnvSpec
from poco_vla.data import Episode
from poco_vla.errors import ConfigError, SimulatorError
from poco_vla.rollout.chunk_env import TimeLimits
from poco_vla.rollout.env_workers import Environments, make_chunk_env
from poco_vla.rollout.workers import Failure, wait
from poco_vla.simulators import env_source, environment, name_of

logger = logging.getLogger(__name__)


@dataclass
class _RunningEpisode:
    """The episode that an environment is in: its seed and instruction, the chunks sent so far and the weights' version
    that chose each, the steps they brought."""

    seed: int
    task: str = ""
    chunks: list[np.ndarray] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


class EnvPool:
    """`num_envs` environments of one kind.

    A round has two calls, so that the learner can work in between: `send` chunks, learn, `receive`.

    An environment that fails (it raises, returns NaN, exceeds a time limit, its process dies) is replaced: the episode
    that it was in is dropped whole, counted in `failures` and reported, and the next seed of its plan is played. After
    `spec.max_failures` in a row without a finished episode, `send` and `reset` raise.

    Args:
        spec: which environment, how many.
        horizon: H, control steps per chunk.
        stride: from an environment's seed to its next one: of several pools that share a plan, the environments of all;
            `num_envs` when None.
        say: tells a person one line.
        give_up: asked while waiting; once True, environments that do not answer are ended, and not replaced.

    Attributes:
        failures: episodes that were dropped.
        suite: names of the tasks that episodes cycle over by their seeds; empty where there is one without a name.
        instructions: of each of these, as far as it is known before an episode begins.
        tasks: [num_envs] instruction of the episode that each environment is in.
        brought: [num_envs] what the last chunk brought: ``reward``, ``success`` and ``terminal`` of its steps, and
            ``ended``; None of an environment that failed or took no step.

    Raises:
        ConfigError: the environment is not there, cannot be made, or breaks a rule.
        SimulatorError: it fails too often.
    """

    def __init__(
        self,
        spec: EnvSpec,
        horizon: int,
        stride: int | None = None,
        *,
        say: Callable[[str], None] = logger.warning,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        config = environment(spec)
        self.spec, self.name = spec, name_of(spec)
        self.num_envs = spec.num_envs
        self.stride = stride or spec.num_envs
        self.horizon = horizon
        self.fps: int = config.fps
        self.say, self.give_up = say, give_up
        self.max_failures = spec.max_failures
        self.failures = 0
        self._limits = TimeLimits(spec.step_timeout, spec.reset_timeout, spec.max_episode_steps)
        self._in_a_row = [0] * spec.num_envs
        self._finished_any = False
        self._error: Exception | None = None
        self._reported: set[str] = set()
        self._end: int | None = None
        self._states: list[dict[str, Any]] = [{"task": "", "reports_success": False} for _ in range(spec.num_envs)]
        self._lost: set[int] = set()
        self._chunks: np.ndarray | None = None
        self.brought: list[Mapping[str, Any] | None] = []
        self._versions = [0] * spec.num_envs
        source = env_source(spec)
        make = partial(make_chunk_env, source.make, horizon, self.stride, self._limits, self.name)
        self._envs = Environments(make, spec.num_envs, source.preload, self._limits, in_process=spec.in_process)
        try:
            found = self._describe()
        except BaseException:
            self._envs.close()
            raise
        self.action_dim: int = found["action_dim"]
        self.time_limit: int | None = found["declared"]
        self.most_steps: int = found["limit"]
        self.suite: list[str] = found["tasks"]
        self.instructions: list[str] = found["instructions"]

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, first_seed: int | list[int], count: int | None = None) -> None:
        """Begin episodes with seeds first_seed, first_seed + 1, ...: `count` of them, or without end. Without end, a
        list gives each environment its own first seed."""
        if isinstance(first_seed, list):
            self._begin(list(first_seed), None)
        else:
            seeds = [first_seed + i for i in range(self.num_envs)]
            self._begin(seeds, first_seed + count if count is not None else None)

    @property
    def obs(self) -> dict[str, np.ndarray]:
        """Return the states to act on: LeRobot key -> [num_envs, ...]."""
        return self._obs

    @property
    def tasks(self) -> list[str]:
        """List the instruction of each environment's present episode; `spec.instruction` where it is given."""
        return [self._task(state) for state in self._states]

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks that episodes cycle over."""
        return max(1, len(self.suite))

    @property
    def idle(self) -> np.ndarray:
        """Return [num_envs] bool: True for environments that have played all their episodes."""
        return np.array([bool(state["idle"]) for state in self._states])

    @property
    def reports_success(self) -> bool:
        """Return True once an environment has given info["is_success"]."""
        return any(state["reports_success"] for state in self._states)

    @property
    def steps_in_flight(self) -> int:
        """Return the control steps of episodes that have not ended yet."""
        return sum(len(row["reward"]) for running in self._running for row in running.rows)

    def send(self, chunks: np.ndarray, version: int = 0) -> None:
        """Start executing one chunk [num_envs, H, action_dim] in each environment, in the robot's units.

        `version` is that of the weights that chose them, to be noted with the steps.
        """
        self._revive(self._lost)
        self.check()
        self._versions = [version] * self.num_envs
        self._chunks = np.ascontiguousarray(chunks, dtype=np.float32)
        seconds = self._limits.step and self._limits.step * self.horizon + self._limits.reset
        for worker, chunk in zip(self._envs.workers, self._chunks, strict=True):
            worker.ask("play", chunk, within=seconds)
            worker.ask("settle", within=self._limits.reset)

    def receive(self) -> tuple[list[Episode], int]:
        """Wait for the chunks; return the episodes that ended, and the number of control steps taken."""
        assert self._chunks is not None, "receive() without send()"
        wait(self._envs.workers, self.give_up)
        chunks, self._chunks = self._chunks, None
        finished: list[Episode] = []
        taken, failed = 0, set()
        self.brought = [None] * self.num_envs
        for i, worker in enumerate(self._envs.workers):
            answers, worker.answers = worker.answers, []
            if answers:
                steps = answers[0]
                taken += steps["length"]
                self.brought[i] = steps if steps["length"] and worker.failure is None else None
                finished += self._collect(i, chunks[i], steps)
            if worker.failure is None:
                self._states[i] = answers[1]
            elif i not in self._lost:
                self._set_aside(i, worker.failure)
                failed.add(i)
        self._revive(failed)
        self._look()
        return finished, taken

    def step(self, chunks: np.ndarray, version: int = 0) -> tuple[list[Episode], int]:
        """Call `send` and `receive`."""
        self.send(chunks, version)
        return self.receive()

    def state(self) -> dict[str, Any]:
        """Return the state from which `restore` replays the running episodes: their seeds, and the chunks sent so far
        with their weights' versions."""
        empty = np.zeros((0, self.horizon, self.action_dim), dtype=np.float32)
        return {
            "seeds": [running.seed for running in self._running],
            "chunks": [np.stack(running.chunks) if running.chunks else empty for running in self._running],
            "versions": [list(running.versions) for running in self._running],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replay the running episodes of a checkpoint: same seeds, same chunks, hence the same states. An episode that
        fails or ends during the replay is not continued."""
        seeds = list(state["seeds"])
        self._begin(seeds, None)
        nothing = np.full((self.horizon, self.action_dim), np.nan, dtype=np.float32)
        for k in range(max(len(chunks) for chunks in state["chunks"])):
            same = [running.seed == seed for running, seed in zip(self._running, seeds, strict=True)]
            self.send(np.stack([c[k] if k < len(c) and same[i] else nothing for i, c in enumerate(state["chunks"])]))
            self._versions = [versions[k] if k < len(versions) else 0 for versions in state["versions"]]
            self.receive()

    def check(self) -> None:
        """Raise the error that stopped the environments, which `receive` leaves to the next call."""
        if self._error is not None:
            raise self._error

    def set_instruction(self, instruction: str | None) -> None:
        """Set the instruction of all episodes from now on; None takes the environment's."""
        self.spec = replace(self.spec, instruction=instruction)
        self._look()

    def close(self) -> None:
        self._envs.close()

    # -- episodes -----------------------------------------------------------------------------------------------------

    def _begin(self, seeds: list[int], end: int | None) -> None:
        self._end, self._lost, self._chunks, self._error = end, set(), None, None
        self._in_a_row = [0] * self.num_envs
        self._running = [_RunningEpisode(seed) for seed in seeds]
        wait(self._envs.workers, self.give_up)  # a chunk may be on its way
        failed = self._ask_to_begin(range(self.num_envs))
        self._revive(failed)
        self.check()
        self._look()

    def _ask_to_begin(self, indices: Iterable[int]) -> set[int]:
        """Begin the episodes of `_running`; return the indices of environments that failed."""
        indices = list(indices)
        workers = self._envs.workers
        for i in indices:
            workers[i].answers = []
            workers[i].ask("begin", self._running[i].seed, self._end, within=self._limits.reset)
        wait([workers[i] for i in indices], self.give_up)
        failed = set()
        for i in indices:
            failure = workers[i].failure
            if failure is not None:
                self._set_aside(i, failure)
                failed.add(i)
            else:
                (self._states[i],) = workers[i].answers
                self._running[i].task = self._task(self._states[i])
            workers[i].answers = []
        return failed

    def _collect(self, i: int, chunk: np.ndarray, steps: Mapping[str, Any]) -> list[Episode]:
        """Append the steps of a chunk; return the episode if it has ended."""
        length = steps["length"]
        if length == 0:
            return []
        running = self._running[i]
        running.chunks.append(chunk)
        running.versions.append(self._versions[i])
        signals = {name: steps[name] for name in ("reward", "success", "terminal")}
        version = np.full(length, self._versions[i], dtype=np.int64)
        running.rows.append(dict(steps["frames"]) | signals | {"action": chunk[:length], "version": version})
        if not steps["ended"]:
            return []
        self._running[i] = _RunningEpisode(running.seed + self.stride)
        self._in_a_row[i], self._finished_any = 0, True
        return [_episode(running)]

    def _task(self, state: Mapping[str, Any]) -> str:
        return self.spec.instruction if self.spec.instruction is not None else state["task"]

    def _look(self) -> None:
        """Update instructions, messages and observations from the environments' states."""
        for i, state in enumerate(self._states):
            if i not in self._lost:
                self._running[i].task = self._task(state)
            for words in state.get("converted", ()):
                self._say_once(f"{self.name}: {words}")
            if state.get("cut_off"):
                self._say_once(
                    f"{self.name} did not end an episode within {self.most_steps} control steps: it is cut off there, "
                    "as by a time limit (env.max_episode_steps sets another)"
                )
        known = [state for state in self._states if "now" in state]
        if len(known) == self.num_envs:
            self._obs = {key: np.stack([state["now"][key] for state in known]) for key in known[0]["now"]}

    def _say_once(self, words: str) -> None:
        if words not in self._reported:
            self._reported.add(words)
            self.say(words)

    # -- failures -----------------------------------------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        """Describe the environments. One that dies or hangs at the start is restarted once."""
        for last in (False, True):
            for worker in self._envs.workers:
                worker.ask("describe", within=self._limits.reset)
            wait(self._envs.workers, self.give_up)
            failed = {i: w.failure for i, w in enumerate(self._envs.workers) if w.failure is not None}
            if not failed:
                break
            failure = next(iter(failed.values()))
            if last or failure.kind not in ("died", "timeout"):
                words = failure.words if failure.kind == "contract" else f"{self.name} cannot be made: {failure.words}"
                raise ConfigError(words + self._advice(failure)) from failure.cause()
            for worker in self._envs.workers:
                worker.answers = []
            self._envs.restart(failed)
        found = [worker.answers.pop() for worker in self._envs.workers]
        return found[0]

    def _set_aside(self, i: int, failure: Failure) -> None:
        """Drop the running episode of environment i after a failure, and count the failure."""
        running = self._running[i]
        self._running[i] = _RunningEpisode(running.seed + self.stride)
        if failure.kind == "stopped":
            self._lost.add(i)
            return
        self.failures += 1
        self._in_a_row[i] += 1
        logger.debug("%s, environment %d: %s\n%s", self.name, i, failure.words, failure.details)
        fatal = failure.kind == "contract" and not self._finished_any
        if fatal or self._in_a_row[i] >= self.max_failures:
            self._lost.add(i)
            self._error = self._fatal(failure, self._in_a_row[i])
            return
        steps = sum(len(row["reward"]) for row in running.rows)
        self.say(
            f"{self.name}, environment {i}: {failure.words}{self._advice(failure)}. Its episode (seed {running.seed}, "
            f"{steps} steps so far) is dropped, and the environment restarted ({self.failures} so far)"
        )

    def _fatal(self, failure: Failure, times: int) -> Exception:
        words = failure.words + self._advice(failure)
        error: Exception
        if failure.kind == "contract" and not self._finished_any:
            error = ConfigError(words)
        else:
            error = SimulatorError(
                f"{self.name} failed {times} times in a row (env.max_failures) without finishing an episode; the last "
                f"time: {words}"
            )
        error.__cause__ = failure.cause()
        return error

    def _advice(self, failure: Failure) -> str:
        if failure.kind != "timeout":
            return ""
        return f" (env.step_timeout {self._limits.step:g} s, env.reset_timeout {self._limits.reset:g} s)"

    def _revive(self, failed: Iterable[int]) -> None:
        """Restart environments that failed and begin the next episode of each; environments that were lost are tried
        again."""
        failed = set(failed)
        while failed and self._error is None:
            self._lost |= failed
            if self.give_up():
                return
            try:
                self._envs.restart(failed)
            except ConfigError as error:  # the system gives no further process
                self._error = SimulatorError(str(error))
                return
            self._lost -= failed
            failed = self._ask_to_begin(failed) - self._lost


def _episode(running: _RunningEpisode) -> Episode:
    columns = {key: np.concatenate([row[key] for row in running.rows]) for key in running.rows[0]}
    return Episode(
        obs={key: column for key, column in columns.items() if key.startswith("observation.")},
        action=columns["action"],
        reward=columns["reward"],
        success=columns["success"].astype(bool),
        terminal=columns["terminal"].astype(bool),
        task=running.task,
        seed=running.seed,
        policy_version=columns["version"],
        interventions=np.zeros(len(columns["action"]), dtype=bool),
    )
