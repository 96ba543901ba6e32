"""The demonstrations of a run: made or found, opened, and held against the configuration."""

from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator

from poco_vla.checkpointing.statistics import RunStatistics
from poco_vla.config import DatasetConfig, TrainConfig
from poco_vla.data import DatasetInfo, Episode, open_dataset, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.data.folder import check_videos
from poco_vla.data.signals import check_reward
from poco_vla.data.statistics import meta_in_use
from poco_vla.demonstrations.scripted import demonstrations_root, ensure_demonstrations
from poco_vla.policy import FlowPolicy
from poco_vla.progress import Display
from poco_vla.registry import load_adapter
from poco_vla.rollout.compatibility import check_fit, check_inputs
from poco_vla.simulators import env_source, environment, num_tasks


@dataclass(frozen=True)
class RunData:
    """The dataset of a run.

    Attributes:
        config: where it lies.
        dataset: LeRobot's.
        statistics: that the run normalises by.
        env_config: LeRobot's configuration of the environment; None without one.
    """

    config: DatasetConfig
    dataset: Any
    statistics: RunStatistics
    env_config: Any

    @property
    def info(self) -> DatasetInfo:
        """Return its features, rate and the statistics in use."""
        return self.statistics.info

    def read(self, policy: FlowPolicy, config: TrainConfig, display: Display) -> list[Episode]:
        """Return the demonstrations, after the check that policy, data and environment fit each other.

        Raises:
            PocoError: they do not.
        """
        check_inputs(policy, self.info, self.env_config)
        demos = read_episodes(
            self.dataset,
            self.config,
            policy.input_keys,
            horizon=config.horizon,
            resize_images=policy.resize_images,
            say=display.say,
        )
        self.statistics.check(policy, demos)
        return demos


def open_data(config: TrainConfig, accelerator: Accelerator, display: Display) -> RunData:
    """Open the dataset of a run; the main process makes the demonstrations first where there are none yet.

    Raises:
        PocoError: dataset and environment do not fit each other, or the configuration.
    """
    where = config.dataset
    env_config = environment(config.env) if config.env is not None else None
    if config.env is not None:
        env_source(config.env)  # says what is not installed
    if config.demonstrations is not None and not (config.dataset.root or config.dataset.repo_id):
        assert config.env is not None
        root = demonstrations_root(config.env, config.demonstrations)
        if accelerator.is_main_process and not (root / "meta" / "info.json").is_file():
            with display.stage("demonstrations", config.demonstrations.episodes * num_tasks(config.env)) as bar:
                ensure_demonstrations(config.env, config.demonstrations, bar.to)
        accelerator.wait_for_everyone()
        where = replace(config.dataset, repo_id=f"local/{root.name}", root=root)
    dataset = open_dataset(where, config.rename_map)
    statistics = RunStatistics(config, describe_dataset(dataset), display.say)
    check_reward(statistics.info.features, config.reward)
    if config.policy is None:  # the policy is built from all cameras; a pretrained one may leave some out
        videos = [key for key, feature in statistics.info.features.items() if feature["dtype"] == "video"]
        check_videos(dataset, videos, str(dataset.root))
    if env_config is not None:
        check_fit(statistics.info, env_config)
    return RunData(where, dataset, statistics, env_config)


def open_policy(config: TrainConfig, data: RunData, accelerator: Accelerator) -> FlowPolicy:
    """Return the policy that the run trains, which normalises by the run's statistics.

    Raises:
        PocoError: it cannot be made, or does not fit the data.
    """
    adapter = load_adapter(config.adapter)
    device = accelerator.device
    # LeRobot knows "cuda:1", but neither "cpu:0" nor "mps:0".
    options = config.policy_options | {"device": str(device) if device.type == "cuda" else device.type}
    if config.policy is None:
        policy = adapter.from_dataset(data.info.features, data.info.stats, horizon=config.horizon, **options)
    else:
        policy = adapter.from_pretrained(
            config.policy,
            horizon=config.horizon,
            features=data.info.features,
            stats=data.info.stats,
            statistics=config.statistics,
            dataset_meta=meta_in_use(data.dataset),
            **options,
        )
    return data.statistics.put_on(policy)
