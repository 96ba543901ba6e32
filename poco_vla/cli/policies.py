"""`poco-vla eval` and `poco-vla serve`: a policy by its folder or Hub id."""

import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from poco_vla.config import EnvSpec, from_json
from poco_vla.errors import ConfigError
from poco_vla.terminal import SafeConsole


@dataclass
class Eval:
    """Success rate of an exported policy."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder or Hub id of a policy or a head, which acts by plain samples; a run's folder acts as the run did."""
    adapter: str | None = None
    """Adapter that wraps it. Left out: the one that its folder or repository names."""
    base: str | None = None
    """Hub id or folder of a head's base, where it is not where it was."""
    revision: str | None = None
    """Hub commit, tag or branch."""
    env: str | None = None
    """Where it acts, as JSON: '{"type": "ogbench", "task": "...", "options": {"episode_length": 120}}'. Left out: the
    environment of the run that exported the policy (result.json beside its folder)."""
    device: str = "cpu"
    """Torch device."""
    episodes: int = 50
    """Episodes."""
    seed: int = 100_000
    """Seed of the first episode."""

    def execute(self) -> None:
        """Print the success rate."""
        from poco_vla.evaluation import evaluate

        found = _policy_of(self)
        env = _env_of(self, found.about)
        acting, trained = _acting(self, found)
        result = evaluate(acting, env, episodes=self.episodes, seed=self.seed, trained=trained)
        SafeConsole().print(f"success {result.success} of {self.episodes} episodes")


@dataclass
class Serve:
    """A policy for robots elsewhere, by openpi's websocket protocol."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder or Hub id of a policy or a head, which acts by plain samples; a run's folder acts as the run did."""
    adapter: str | None = None
    """Adapter that wraps it. Left out: the one that its folder or repository names."""
    base: str | None = None
    """Hub id or folder of a head's base, where it is not where it was."""
    revision: str | None = None
    """Hub commit, tag or branch."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of this machine's, for which a token is needed."""
    port: int = 8000
    """Port; 0 takes a free one."""
    token: str | None = None
    """Token that clients must send ("Authorization: Api-Key TOKEN"). Default: the environment variable POCO_VLA_TOKEN,
    which others on this machine cannot read; @FILE is the first line of a file."""
    certificate: Path | None = None
    """TLS certificate (PEM)."""
    key: Path | None = None
    """Its private key (PEM)."""
    insecure: bool = False
    """Serve other machines without a token."""
    fps: float | None = None
    """Control steps per second, told to clients. Left out: those of the data that the policy was trained on."""
    device: str = "cpu"
    """Torch device."""
    seed: int = 0
    """Of the policy's noise."""

    def execute(self) -> None:
        """Answer until Ctrl-C."""
        from poco_vla.hub.rate import rate_of
        from poco_vla.rollout import Actor
        from poco_vla.rollout.actor import UNTRAINED
        from poco_vla.serving.access import read_token
        from poco_vla.serving.requests import read_observation_features
        from poco_vla.serving.server import PolicyServer

        found = _policy_of(self)
        fps = rate_of(self.policy, self.revision) if self.fps is None else self.fps
        acting, trained = _acting(self, found)
        actor = Actor(acting, self.seed, 1 if trained else UNTRAINED)
        server = PolicyServer(
            actor,
            read_observation_features(str(found.folder), actor.policy.input_keys),
            adapter=found.adapter,
            fps=fps,
            host=self.host,
            port=self.port,
            token=read_token(self.token),
            certificate=self.certificate,
            key=self.key,
            insecure=self.insecure,
        )
        with server:
            SafeConsole().print(f"serving {found.adapter} at {server.url}; Ctrl-C ends it")
            sys.stdout.flush()
            threading.Event().wait()


@dataclass(frozen=True)
class _Policy:
    """A policy that a command line names: its adapter, the folder of its small files, what the folder says of it, and
    what loads it."""

    adapter: str
    folder: Path
    about: dict[str, Any]
    load: Callable[[], Any]


def _policy_of(command: Eval | Serve) -> _Policy:
    """Find a policy, and its adapter where none is told."""
    from poco_vla.devices import check_device
    from poco_vla.hub import load_head, located
    from poco_vla.pretrained.heads import read_about
    from poco_vla.registry import load_adapter

    check_device(command.device)
    if command.adapter is not None:
        load_adapter(command.adapter)  # a mistyped name is told before anything is fetched
    options: dict[str, Any] = {"device": command.device} | ({} if command.base is None else {"base": command.base})
    source = located(command.policy, command.revision)
    about = read_about(source.folder)
    if source.revision is not None:
        options["revision"] = source.revision
    if command.adapter is None and about:
        return _Policy(about["adapter"], source.folder, about, lambda: load_head(source.name, **options))
    name = command.adapter or _run_of(command.policy, "by which adapter, with --adapter").get("adapter", "flow_mlp")
    adapter = load_adapter(name)
    return _Policy(name, source.folder, about, lambda: adapter.from_pretrained(source.name, **options))


def _acting(command: Eval | Serve, found: _Policy) -> tuple[Any, bool]:
    """Return what acts, and True unless it is an algorithm that was not trained beyond warm-up: a run's algorithm where
    its folder is given, or a policy by itself. Say where that acts otherwise than its run did."""
    from poco_vla.hub.acting import load_acting
    from poco_vla.hub.places import RESULT
    from poco_vla.report.commands import acting_note

    run = Path(command.policy).expanduser()
    if (run / RESULT).is_file():
        return load_acting(run, found.load())
    if note := acting_note(found.about):
        SafeConsole().print(note)
    return found.load(), True


def _env_of(command: Eval, about: Mapping[str, Any]) -> EnvSpec:
    """Return the environment that is asked for, or that of the policy's own run, as its folder or poco.json has it."""
    if command.env is not None:
        try:
            return _with_instruction(from_json(EnvSpec, json.loads(command.env)), about)
        except (json.JSONDecodeError, AttributeError) as error:
            raise ConfigError(f"--env is no JSON object: {error}") from error
    env = about.get("results", {}).get("env") or _run_of(command.policy, "where it acts with --env")["env"]
    if env is None:
        raise ConfigError(f"the run of {command.policy} had no environment: say where it acts with --env")
    return from_json(EnvSpec, env)


def _with_instruction(env: EnvSpec, about: Mapping[str, Any]) -> EnvSpec:
    """Give an environment the instruction that the policy's own run told in it, unless it has one."""
    trained = about.get("results", {}).get("env") or {}
    if env.instruction is None and (trained.get("type"), trained.get("task")) == (env.type, env.task):
        return replace(env, instruction=trained.get("instruction"))
    return env


def _run_of(policy: str, otherwise: str) -> dict[str, Any]:
    """Return result.json of the run that exported the policy."""
    from poco_vla.hub.places import run_of
    from poco_vla.report import read_result

    run = run_of(policy)
    if run is None:
        raise ConfigError(f"{policy} does not lie in a run's folder: say {otherwise}")
    return read_result(run)
