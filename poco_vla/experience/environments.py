"""The environments that a run evaluates in, tried before any work."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from poco_vla.config import EnvSpec
from poco_vla.data import Episode, preprocess_obs
from poco_vla.data.episode import first_of_each_task
from poco_vla.learner.broadcast import Sharing
from poco_vla.policy import FlowPolicy
from poco_vla.rollout import EnvPool
from poco_vla.rollout.compatibility import check_env_pictures, check_observations, check_pictures, check_rollout
from poco_vla.run.context import RunContext
from poco_vla.simulators.instructions import settle_instruction


def check_demonstrations(policy: FlowPolicy, demos: Sequence[Episode]) -> None:
    """Show the policy every instruction of the demonstrations, with its first observation.

    Raises:
        PocoError: the policy cannot read one.
    """
    policy.check_prompts(list(first_of_each_task(demos)))
    for task, (episode, step) in first_of_each_task(demos).items():
        first = {key: column[step : step + 1].copy() for key, column in episode.obs.items()}
        preprocess_obs(policy, first, [task])


def open_environments(
    context: RunContext,
    policy: FlowPolicy,
    demos: Sequence[Episode],
    sharing: Sharing,
    resources: ExitStack,
) -> tuple[EnvPool | None, EnvSpec | None]:
    """Return the environments of the main process and their specification with the instruction that the policy gets;
    None for each where there is none. `resources` closes them.

    Raises:
        PocoError: policy, demonstrations and environment do not fit each other.
    """
    config, say = context.config, context.display.say
    spec, envs = config.env, None
    if spec is None:
        return None, None
    if context.accelerator.is_main_process:
        envs = EnvPool(spec, config.horizon, say=say, give_up=context.interruption.is_requested)
        resources.callback(envs.close)
        envs.reset(config.eval.seed)
        spec = settle_instruction(spec, envs.instructions or envs.tasks, first_of_each_task(demos), say)
        envs.set_instruction(spec.instruction)
        check_observations(policy, demos[0].obs, envs)
        check_env_pictures(policy, envs)
        preprocess_obs(policy, envs.obs, envs.tasks)
        check_pictures(policy, demos[0].obs, envs.obs)
        check_rollout(envs, demos[0].action, say)
    (instruction, _), *_ = sharing.values(spec.instruction, [])
    return envs, replace(spec, instruction=instruction)
