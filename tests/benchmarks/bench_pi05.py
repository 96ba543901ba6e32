"""What pi0.5 costs behind one shared prefix, against LeRobot's own code on the same weights. `make benchpi` runs it.

    python tests/benchmarks/bench_pi05.py [gradient] [sampling] [update] [trainer] [memory] [--quick] [--depth 2]
        [--candidates 16] [--horizon 10] [--states 2] [--cameras 2] [--threads 2] [--device cuda] [--dtype bfloat16]
        [--json FILE]

- gradient: forward and backward of the flow loss of N candidates per state. Baselines: LeRobot's joint training forward
  with the VLM frozen, prefix and all once per candidate; and its cached path with the cache repeated per candidate.
- sampling: N chunks per state by Euler steps. Baseline: LeRobot's cached sampler, the cache repeated per candidate.
- update: one update of POCO, stage by stage, and the rate of its matrix products beside a large one of the same run.
- trainer: updates by the real Trainer out of a dataset on disk, stage by stage. Baseline: the same trainer, in which
  LeRobot's `denoise_step` moves every candidate, over the same cache repeated per candidate.
- memory: the largest batch whose update fits on a card (CUDA only).

On a CPU every stack has the real widths and `--depth` layers. Variants take turns, so that whatever else runs meets all
of them alike. Weights are random and the vocabulary is small where that changes no time.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from measure import HERE, device_name, keep_in, table_of, thread_count
from poco_vla_pi05 import processors
from poco_vla_pi05.adapter import Pi05
from poco_vla_pi05.architecture import TINY, Architecture, empty_policy
from poco_vla_pi05.checkpoint import drop_language_heads
from poco_vla_pi05.tokenizer import byte_tokenizer
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from poco_vla import ChunkBatch, Poco, PocoConfig, flow_errors, integrate
from poco_vla.algorithms import poco as equations
from poco_vla.config import DatasetConfig, OptimConfig, TrainConfig
from poco_vla.data import Episode
from poco_vla.recording.recorder import write_dataset
from poco_vla.training import Trainer

type Section = Literal["gradient", "sampling", "update", "trainer", "memory"]
type Rows = list[dict[str, Any]]

STATE_DIM, ACTION_DIM = 7, 6
GIB = 1024**3


@dataclass(frozen=True)
class Args:
    """Measure gradients, samples and updates of pi0.5, against LeRobot's own code."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = (
        "gradient",
        "sampling",
        "update",
        "trainer",
        "memory",
    )
    """What to measure; `memory` needs CUDA and is left out without."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the backbone and of the head's matrix products; None is float32 on a CPU, bfloat16 on a GPU."""
    depth: int | None = None
    """Layers of every stack; None is 2 on a CPU, all of them on a GPU."""
    states: int | None = None
    """B; None is 2 on a CPU, 64 on a GPU."""
    candidates: int = 16
    """N."""
    horizon: int = 10
    """H."""
    cameras: int = 2
    """Pictures in a prefix, 256 tokens each."""
    prompt: int = 60
    """Valid tokens of the longest prompt; the others are a little shorter, and all are padded to LeRobot's 200."""
    rows: int = 8
    """Rows that LeRobot's joint forward takes at once: two layers of one row keep some 350 MB."""
    rounds: int = 3
    """Measurements of each variant, in turns, after one that does not count."""
    threads: int | None = None
    """CPU threads; None is torch's default."""
    clock: Literal["wall", "cpu"] = "wall"
    """"cpu" counts the seconds that this process ran: with one thread, what it would take were nothing else running."""
    card: float = 24.0
    """Memory of the card that `memory` asks about, in GiB; one of them is left to CUDA itself."""
    quick: bool = False
    """One round, one state, one layer."""
    tiny: bool = False
    """A model of 0.3 million parameters: shows that everything runs, and nothing else."""
    json: Path | None = None
    """File for the figures."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and keep the figures where asked."""
    args = tyro.cli(Args, args=argv)
    if args.quick:
        args = replace(args, rounds=1, states=args.states or 1, depth=args.depth or 1)
    console = Console() if Console().is_terminal else Console(width=120)
    sections: dict[Section, tuple[str, Callable[[Case], Rows]]] = {
        "gradient": ("Gradient of the flow loss of all candidates", bench_gradient),
        "sampling": ("Sampling all candidates", bench_sampling),
        "update": ("One update of POCO", bench_update),
        "trainer": ("One update of POCO, by the Trainer", bench_trainer),
        "memory": (f"Largest update on a card of {args.card:g} GiB", bench_memory),
    }
    with thread_count(args.threads) if args.threads else nullcontext():
        case = Case.of(args)
        console.print(case.description)
        figures: dict[str, Any] = {"case": case.description, "torch": torch.__version__, "args": jsonable(args)}
        for name in args.sections:
            if name == "memory" and args.device == "cpu":
                continue
            title, bench = sections[name]
            rows = bench(case)
            console.print(table_of(title, rows))
            figures[name] = rows
            release(args.device)
        if not (args.quick or args.tiny):
            kept = {
                case.key(name): {"case": case.description, "rows": figures[name]} for name in sections.keys() & figures
            }
            console.print(f"kept in {keep_in(HERE / 'results', kept).name}")
    if args.json:
        figures["date"] = datetime.now(UTC).date().isoformat()
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def jsonable(args: Args) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}


# -- the model, by two codes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One set of weights, and what is asked of it."""

    args: Args
    adapter: Pi05
    states: int
    description: str

    @classmethod
    def of(cls, args: Args) -> "Case":
        cuda = args.device == "cuda"
        depth = args.depth or (None if cuda else 2)
        full = TINY if args.tiny else replace(Architecture(), vocab=Architecture().vocab if cuda else 1024)
        architecture = full.with_depth(depth) if depth else full
        adapter = random_adapter(args, architecture)
        states = args.states or (64 if cuda else 2)
        case = cls(args, adapter, states, "")
        mask = case.observations(states)[OBS_LANGUAGE_ATTENTION_MASK]
        pictures = args.cameras * (architecture.image_size // architecture.vision.patch) ** 2
        place = torch.cuda.get_device_name() if cuda else f"{device_name()}, {torch.get_num_threads()} threads"
        backbone = adapter.policy.config.dtype
        counted = "; seconds of CPU time" if args.clock == "cpu" else ""
        description = (
            f"{place}{counted}; torch {torch.__version__}; {backbone}; {architecture.vlm.depth} layers of 18, widths "
            f"{architecture.vlm.width} and {architecture.expert.width}\n"
            f"B {states}, N {args.candidates}, H {args.horizon}, K {adapter.spec.flow_steps}; prefix of "
            f"{pictures} + {mask.shape[1]} tokens, of which {pictures} + {int(mask.sum(1).min())} to "
            f"{int(mask.sum(1).max())} valid"
        )
        return replace(case, description=description)

    def key(self, section: str) -> str:
        """Under which a section is kept."""
        dtype, threads = self.adapter.policy.config.dtype, torch.get_num_threads()
        return f"pi05 {section}, {dtype}, B {self.states}, {threads} threads"

    @property
    def device(self) -> str:
        return self.args.device

    def now(self) -> float:
        """Seconds, once all that was asked of the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.args.clock == "cpu" else time.perf_counter()

    def observations(self, states: int, seed: int = 0) -> dict[str, Any]:
        """Pictures of noise; prompts of up to `args.prompt` tokens, a few tokens apart."""
        generator = torch.Generator().manual_seed(seed)
        config = self.adapter.policy.config
        images = {
            key: torch.rand((states, *feature.shape), generator=generator)
            for key, feature in config.image_features.items()
        }
        lengths = self.args.prompt - torch.arange(states)[:, None] % 8
        mask = torch.arange(config.tokenizer_max_length) < lengths
        tokens = torch.randint(5, 200, mask.shape, generator=generator) * mask
        state = torch.randn((states, STATE_DIM), generator=generator)
        obs = images | {OBS_STATE: state, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: mask}
        return {key: value.to(self.device) for key, value in obs.items()}

    def draws(self, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Chunks, noise [B, N, H, A] and times [B, N] (1 is the action), for both codes."""
        spec, generator = self.adapter.spec, torch.Generator().manual_seed(seed)
        shape = (self.states, self.args.candidates, spec.horizon, spec.width)
        chunks, noise = torch.randn((2, *shape), generator=generator)
        chunks[..., spec.action_dim :] = 0
        time = self.adapter.sample_time(shape[:2], generator)
        return chunks.to(self.device), noise.to(self.device), time.to(self.device)

    def batch(self, states: int) -> ChunkBatch:
        """Transitions for an update."""
        spec = self.adapter.spec
        actions = torch.zeros(states, spec.horizon, spec.width)
        actions[..., : spec.action_dim].uniform_(-1, 1)
        every = torch.ones(states, dtype=torch.bool)
        return ChunkBatch(
            obs=self.observations(states),
            next_obs=self.observations(states, seed=1),
            actions=actions,
            valid=torch.ones(states, spec.horizon, dtype=torch.bool),
            returns=torch.zeros(states),
            discount=torch.full((states,), 0.9),
            is_demo=every,
            is_success=every,
        ).to(self.device)


def random_adapter(args: Args, architecture: Architecture) -> Pi05:
    """The adapter with random weights, drawn where they will lie."""
    size = architecture.image_size
    images = {f"{OBS_IMAGES}.cam{i}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for i in range(args.cameras)}
    config = PI05Config(
        input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        chunk_size=args.horizon,
        n_action_steps=args.horizon,
        image_resolution=(size, size),
        dtype=args.dtype or ("bfloat16" if args.device == "cuda" else "float32"),
        device=args.device,
    )
    policy = empty_policy(config, architecture)
    drop_language_heads(policy)
    generator = torch.Generator(args.device).manual_seed(0)
    weights = {}
    for name, parameter in policy.state_dict().items():
        # Every parameter matters and hidden states stay of order one: a fresh adaRMS would be zero.
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        drawn = torch.randn(parameter.shape, generator=generator, device=args.device).mul_(scale)
        weights[name] = drawn.to(parameter.dtype)
    policy.load_state_dict(weights, assign=True)
    return Pi05(policy, architecture=architecture).to(args.device).eval()


def stock_twin(adapter: Pi05) -> Any:
    """LeRobot's core model on the same weights, in LeRobot's own dtypes, the VLM frozen as by `train_expert_only`.

    Memory is shared wherever the dtype is the same.
    """
    policy = empty_policy(adapter.policy.config, adapter.architecture)
    drop_language_heads(policy)
    own = adapter.policy.state_dict()
    policy.load_state_dict({name: own[name].to(p.dtype) for name, p in policy.state_dict().items()}, assign=True)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(Pi05.in_head(name))
    return policy.to(next(adapter.parameters()).device).eval().model


def stock_inputs(adapter: Pi05, obs: dict[str, Any]) -> tuple[Any, ...]:
    images, masks = adapter.policy._preprocess_images(dict(obs))
    return images, masks, obs[OBS_LANGUAGE_TOKENS], obs[OBS_LANGUAGE_ATTENTION_MASK]


@torch.no_grad()
def stock_prefix(model: Any, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, Any]:
    """The first half of LeRobot's `sample_actions`: padding mask and KV cache of B states."""
    embedded, pad, attention = model.embed_prefix(*inputs)
    mask = prepare_attention_masks_4d(make_att_2d_masks(pad, attention))
    core = model.paligemma_with_expert
    core.paligemma.model.language_model.config._attn_implementation = "eager"
    _, cache = core.forward(
        attention_mask=mask,
        position_ids=torch.cumsum(pad, dim=1) - 1,
        past_key_values=None,
        inputs_embeds=[embedded, None],
        use_cache=True,
    )
    return pad, cache


def repeated(prefix: tuple[torch.Tensor, Any], states: slice, times: int) -> dict[str, Any]:
    """Some states' masks and cache, each once per candidate, as `denoise_step` takes them."""
    pad, cache = prefix
    layers = tuple((layer.keys[states], layer.values[states], None) for layer in cache.layers)
    wide = type(cache)(layers)
    wide.batch_repeat_interleave(times)
    return {"prefix_pad_masks": pad[states].repeat_interleave(times, dim=0), "past_key_values": wide}


# -- gradients --------------------------------------------------------------------------------------------------------


def bench_gradient(case: Case) -> Rows:
    """Time and saved bytes of each way to the same loss. Each yields the losses of its micro-batches."""
    adapter, stock, n = case.adapter, stock_twin(case.adapter), case.args.candidates
    obs, (chunks, noise, t) = case.observations(case.states), case.draws()
    valid = torch.ones(case.states, adapter.spec.horizon, dtype=torch.bool, device=case.device)
    inputs, total = stock_inputs(adapter, obs), chunks.shape[0] * chunks.shape[1]
    flat_chunks, flat_noise, flat_time = chunks.flatten(0, 1), noise.flatten(0, 1), 1 - t.flatten()
    prefix = adapter.encode(obs)

    def joint() -> Iterator[torch.Tensor]:
        images, masks, tokens, token_masks = inputs
        for start in range(0, total, case.args.rows):
            rows = torch.arange(start, min(start + case.args.rows, total), device=case.device)
            of_state = rows // n  # the prefix's inputs, once per candidate
            losses = stock.forward(
                [image[of_state] for image in images],
                [mask[of_state] for mask in masks],
                tokens[of_state],
                token_masks[of_state],
                flat_chunks[rows],
                flat_noise[rows],
                flat_time[rows],
            )
            yield losses[..., :ACTION_DIM].mean(dim=(1, 2)).sum() / total

    def cached() -> Iterator[torch.Tensor]:
        once, group = stock_prefix(stock, inputs), max(1, case.args.rows // n)
        for start in range(0, case.states, group):
            states, rows = slice(start, start + group), slice(start * n, (start + group) * n)
            time = flat_time[rows, None, None]
            x = time * flat_noise[rows] + (1 - time) * flat_chunks[rows]
            velocity = stock.denoise_step(**repeated(once, states, n), x_t=x, timestep=flat_time[rows])
            error = (flat_noise[rows] - flat_chunks[rows] - velocity)[..., :ACTION_DIM]
            yield error.square().mean(dim=(1, 2)).sum() / total

    def ours(recompute: bool, encode: bool) -> Iterator[torch.Tensor]:
        adapter.recompute = recompute
        shared = adapter.encode(obs) if encode else prefix
        yield flow_errors(adapter, shared, chunks, valid, noise=noise, t=t).mean()
        adapter.recompute = True

    label = f"cache repeated x{n}"
    ways: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
        "ours": partial(ours, True, True),
        f"LeRobot, joint, prefix repeated x{n}": joint,
        f"LeRobot, cached, {label}": cached,
        "ours, all kept for backward": partial(ours, False, True),
        "ours, prefix at hand": partial(ours, True, False),
        "ours, prefix at hand, all kept": partial(ours, False, False),
    }
    parameters = [*adapter.policy.parameters(), *stock.parameters()]
    cache = [*prefix.keys, *prefix.values]  # a layer that is computed again reads them in backward
    held = {"ours": cache, "ours, prefix at hand": cache}
    works = {name: partial(backward, way, parameters, held.get(name, []), case) for name, way in ways.items()}
    for way in ways.values():
        next(way()).backward()
    adapter.recompute = True
    found = in_turns(works, case, warm=True)
    seconds = {name: [one["seconds"] for one in every] for name, every in found.items()}
    saved = {name: every[-1] for name, every in found.items()}
    own_time, own_bytes, own_loss = min(seconds["ours"]), saved["ours"]["bytes"], saved["ours"]["loss"]
    rows: Rows = [
        {
            "what": name,
            "s": min(seconds[name]),
            "s, median": statistics.median(seconds[name]),
            "saved MB": saved[name]["bytes"] / 1e6,
            **({"peak MB": saved[name]["peak"] / 1e6} if case.device == "cuda" else {}),
            "x ours, time": min(seconds[name]) / own_time,
            "x ours, saved": saved[name]["bytes"] / own_bytes,
            "loss, off by": abs(saved[name]["loss"] / own_loss - 1),
        }
        for name in ways
    ]
    layer = (saved["ours, all kept for backward"]["bytes"] - own_bytes) / adapter.architecture.expert.depth
    with_layer = {"saved MB": (own_bytes + layer) / 1e6, "x ours, saved": 1 + layer / own_bytes}
    return [*rows, {"what": "ours, and the layer that backward has in hand"} | with_layer]


def backward(
    way: Callable[[], Iterator[torch.Tensor]], parameters: list[torch.nn.Parameter], held: list[Any], case: "Case"
) -> dict[str, float]:
    """Forward and backward of every micro-batch, one after the other.

    Returns:
        ``seconds``; ``loss``, summed; ``bytes`` kept for backward, summed: every storage once, parameters left out,
        `held` put in. On a GPU also ``peak``, the largest memory over what lay there before, gradients included.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if case.device == "cuda" else 0
    total, loss_sum, started = 0, 0.0, case.now()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for loss in way():
            for tensor in held:
                pack(tensor)
            total, loss_sum = total + sum(found.values()), loss_sum + loss.item()
            found.clear()
            loss.backward()
    seconds = case.now() - started
    peak = torch.cuda.max_memory_allocated() - before if case.device == "cuda" else 0
    return {"seconds": seconds, "loss": loss_sum, "bytes": total, "peak": peak}


# -- samples ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bench_sampling(case: Case) -> Rows:
    adapter, stock, n = case.adapter, stock_twin(case.adapter), case.args.candidates
    obs, (_, noise, _) = case.observations(case.states), case.draws()
    inputs, steps = stock_inputs(adapter, obs), adapter.spec.flow_steps

    def stock_sample(once: Any) -> torch.Tensor:
        """The second half of `sample_actions`. The cache is repeated here: ours has no such step."""
        denoise = partial(stock.denoise_step, **repeated(once, slice(None), n))
        x = euler_integrate(lambda x, time: denoise(x_t=x, timestep=time), noise.flatten(0, 1), steps)
        return x.view(noise.shape)

    prefix, once = adapter.encode(obs), stock_prefix(stock, inputs)
    works: dict[str, Callable[[], torch.Tensor]] = {
        "ours, prefix at hand": lambda: integrate(adapter, prefix, noise, steps),
        f"LeRobot, prefix at hand, cache repeated x{n}": lambda: stock_sample(once),
        "ours, with the prefix": lambda: integrate(adapter, adapter.encode(obs), noise, steps),
        "LeRobot, with the prefix": lambda: stock_sample(stock_prefix(stock, inputs)),
    }
    samples = {name: work() for name, work in works.items()}
    expected = samples[f"LeRobot, prefix at hand, cache repeated x{n}"]
    gaps = {name: (sample - expected).abs().max().item() for name, sample in samples.items()}
    timed = {name: partial(seconds_of, work, case) for name, work in works.items()}
    seconds = in_turns(timed, case)
    rows: Rows = []
    for ours, theirs in zip(*[iter(works)] * 2, strict=True):
        rows += [
            {
                "what": name,
                "s": min(seconds[name]),
                "s, median": statistics.median(seconds[name]),
                "x ours": min(seconds[name]) / min(seconds[ours]),
                f"off by (of {expected.abs().max():.2g})": gaps[name],
            }
            for name in (ours, theirs)
        ]
    return rows


# -- one update -------------------------------------------------------------------------------------------------------


def bench_update(case: Case) -> Rows:
    """Each stage without what is inside it: its time, its matrix products, and their rate beside a large one's."""
    update = Update(case, case.states)
    update.run(lambda: 0)  # the first one makes the optimizer's state
    release(case.device)
    update.run(lambda: 0)
    peak = torch.cuda.max_memory_allocated() / 1e9 if case.device == "cuda" else None
    with FlopCounterMode(display=False) as counter:
        flops = update.run(counter.get_total_flops)
    product, product_flops = large_product(case)
    rounds, best = [], float("inf")
    for _ in range(case.args.rounds):
        rounds.append(update.run(None))
        best = min(best, seconds_of(product, case), seconds_of(product, case))
    whole = [sum(one.values()) for one in rounds]
    rows = [
        stage_row(name, [one[name] for one in rounds], min(whole), flops[name], product_flops / best)
        for name in rounds[0]
    ]
    rows.append(stage_row("update", whole, min(whole), sum(flops.values()), product_flops / best))
    rows.append(
        {"what": "one large product", "ms": best * 1e3, "GFLOP": product_flops / 1e9}
        | {"GFLOP/s": product_flops / best / 1e9, "of large product": "100 %"}
    )
    if peak:
        rows.append({"what": f"peak memory: {peak:.1f} GB"})
    return rows


def stage_row(name: str, seconds: list[float], whole: float, flops: float, peak_rate: float) -> dict[str, Any]:
    rate = flops / min(seconds)
    return {
        "what": name,
        "ms": min(seconds) * 1e3,
        "ms, median": statistics.median(seconds) * 1e3,
        "of update": f"{min(seconds) / whole:.0%}",
        "GFLOP": flops / 1e9,
        "GFLOP/s": rate / 1e9,
        "of large product": f"{rate / peak_rate:.0%}",
    }


def large_product(case: Case) -> tuple[Callable[[], Any], int]:
    """A square matrix product in the dtype of the head's own, and its FLOPs."""
    size = 8192 if case.device == "cuda" else 256 if case.args.tiny else 2048
    a, b = torch.randn(2, size, size, device=case.device, dtype=case.adapter.compute)
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), 2 * size**3


class Update:
    """An update of POCO whose stages are told apart from outside."""

    def __init__(self, case: Case, states: int) -> None:
        self.device, self.candidates, self.cpu_clock = case.device, case.args.candidates, case.args.clock == "cpu"
        self.poco = Poco(case.adapter, PocoConfig(num_candidates=self.candidates)).to(case.device)
        self.optimizer = torch.optim.Adam([p for p in self.poco.parameters() if p.requires_grad], lr=5e-5, fused=True)
        self.batch = case.batch(states)

    def run(self, reading: Callable[[], float] | None) -> dict[str, float]:
        """One update: stage -> seconds, or how much else `reading` grew."""
        clock = Clock(self.device, reading or (time.process_time if self.cpu_clock else None))
        poco = self.poco
        with told_apart(poco, clock, self.candidates):
            with clock.span(f"M-step: {self.candidates} + 1 flow errors"):
                loss, _ = poco(self.batch, "online")
            with clock.span("backward"):
                loss.backward()
            with clock.span("Adam, target critic"):
                self.optimizer.step()
                self.optimizer.zero_grad()
                poco.after_step("online")
        return clock.stages()


@contextmanager
def told_apart(poco: Poco, clock: "Clock", candidates: int) -> Iterator[None]:
    """While this lasts, the parts of a loss of `poco` run in spans of `clock`."""
    critic = "critic"
    methods = [
        (poco, "critic_loss", critic, None),
        (poco.policy, "encode", "encode s and s'", "encode s and s'"),
        (poco.target_critic, "forward", "E-step: their values", critic),
        (equations, "propose", f"E-step: {candidates} chunks at s", "critic: one chunk at s'"),
    ]
    with ExitStack() as stack:
        for owner, name, alone, within in methods:
            stack.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name), alone, within)))
        yield


class Clock:
    """How long named spans took, each without the spans inside it; by CUDA's own events on a GPU.

    Args:
        device: where the work runs.
        reading: another quantity that grows, instead of time.
    """

    def __init__(self, device: str, reading: Callable[[], float] | None = None) -> None:
        self.events = device == "cuda" and reading is None
        self.reading = reading or time.perf_counter
        self.closed: list[tuple[str, str | None, Any, Any]] = []
        self.open: list[str] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        parent = self.open[-1] if self.open else None
        self.open.append(name)
        begin = self._now()
        yield
        self.open.pop()
        self.closed.append((name, parent, begin, self._now()))

    def timed(self, function: Callable[..., Any], alone: str, within_critic: str | None) -> Callable[..., Any]:
        """`function` in a span of its own; what the critic's loss needs has another name."""

        def run(*args: Any, **options: Any) -> Any:
            with self.span((within_critic or alone) if "critic" in self.open else alone):
                return function(*args, **options)

        return run

    def stages(self) -> dict[str, float]:
        if self.events:
            torch.cuda.synchronize()
        names = [name for name, *_ in self.closed]
        found = dict.fromkeys(names, 0.0)
        for name, parent, begin, end in self.closed:
            took = begin.elapsed_time(end) / 1e3 if self.events else end - begin
            found[name] += took
            if parent:
                found[parent] -= took
        return found

    def _now(self) -> Any:
        if not self.events:
            return self.reading()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


# -- the same, end to end ---------------------------------------------------------------------------------------------


def bench_trainer(case: Case) -> Rows:
    """Updates of one trainer, in turns by our head and by LeRobot's, from the same weights on. What is drawn differs
    from update to update, its size does not."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(case, Path(folder))
        try:
            label = f"LeRobot, cache repeated x{case.args.candidates}"
            heads = {"ours": nullcontext, label: partial(stock_head, trainer)}
            works = {name: partial(trainer_update, trainer, case, head) for name, head in heads.items()}
            found = in_turns(works, case)
        finally:
            trainer.close()
    best = {name: min(every, key=lambda one: sum(one[0].values())) for name, every in found.items()}
    peaks = {name: max(memory for _, memory in every) for name, every in found.items()}
    own, own_peak = best["ours"][0], max(peaks["ours"], 1.0)
    rows: Rows = []
    for name, (stages, _) in best.items():
        whole = sum(stages.values())
        row = {"what": name, "ms": whole * 1e3, "x ours": whole / sum(own.values()), "of update": "100 %"}
        rows.append(row | {"peak MB": peaks[name] / 1e6, "x ours, peak": peaks[name] / own_peak})
        for stage, seconds in stages.items():
            row = {"what": f"  {stage}", "ms": seconds * 1e3, "x ours": seconds / max(own[stage], 1e-9)}
            rows.append(row | {"of update": f"{seconds / whole:.0%}"})
    return rows


def trainer_of(case: Case, folder: Path) -> Trainer:
    """A trainer of the case's weights, on episodes of noise: half of them demonstrations, half its own."""
    config, size = case.adapter.policy.config, case.adapter.architecture.image_size
    sizes = {OBS_STATE: STATE_DIM, ACTION: ACTION_DIM}
    stats = {key: {"q01": -torch.ones(n), "q99": torch.ones(n)} for key, n in sizes.items()}
    pipelines = processors.build(config, stats, byte_tokenizer())
    whole = Pi05(case.adapter.policy, pipelines, architecture=case.adapter.architecture)
    whole.save_pretrained(folder / "base")
    rng, steps = np.random.default_rng(0), 2 * case.args.horizon
    end = np.arange(steps) == steps - 1

    def episode() -> Episode:
        obs = {key: rng.integers(0, 256, (steps, size, size, 3), np.uint8) for key in config.image_features}
        obs[OBS_STATE] = rng.uniform(-1, 1, (steps, STATE_DIM)).astype(np.float32)
        action = rng.uniform(-1, 1, (steps, ACTION_DIM)).astype(np.float32)
        return Episode(obs, action, end.astype(np.float32), end, end, task="put the pen into the cup, slowly")

    write_dataset([episode()], folder / "data", fps=10, repo_id="local/pens")
    trainer = Trainer(
        TrainConfig(
            adapter="pi05",
            policy=str(folder / "base"),
            policy_options={"tokenizer": str(folder / "base" / "tokenizer")},
            statistics="dataset",
            dataset=DatasetConfig("local/pens", folder / "data"),
            horizon=case.args.horizon,
            poco=PocoConfig(num_candidates=case.args.candidates),
            optim=OptimConfig(batch_size=case.states),
            sft_steps=1,
            online_steps=0,
            output_dir=folder / "run",
        )
    )
    trainer.display.console.quiet = True
    trainer.replay.extend([episode()], is_demo=False)
    return trainer


@contextmanager
def stock_head(trainer: Trainer) -> Iterator[None]:
    """While this lasts, the trainer's policy moves its candidates by LeRobot's `denoise_step`, on its own weights."""
    policy: Any = trainer.parts.policy
    model, last = policy.policy.model, []

    def velocity(prefix: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        n, t = x.shape[1], t.expand(x.shape[:2])  # [1, 1] where all chunks share a time
        if not last or last[0] is not prefix or last[1] != n:  # LeRobot's sampler, too, makes its cache once
            columns = tuple((k[:, None], v[:, None], None) for k, v in zip(prefix.keys, prefix.values, strict=True))
            places = torch.arange(prefix.keys[0].shape[1], device=t.device)
            pad = places < prefix.lengths[:, None]
            last[:] = prefix, n, repeated((pad, DynamicCache(columns)), slice(None), n)
        flat = model.denoise_step(**last[2], x_t=x.flatten(0, 1), timestep=1 - t.flatten())
        return -flat.view(x.shape)

    with patch.object(policy, "velocity", velocity):
        yield


def trainer_update(trainer: Trainer, case: Case, head: Callable[[], Any]) -> tuple[dict[str, float], float]:
    """One update: stage -> seconds, and the peak of its memory over what lay there before, in bytes (0: not known)."""
    clock = Clock(case.device, time.process_time if case.args.clock == "cpu" else None)
    adam, candidates = "Adam, target critic", case.args.candidates
    spans = [
        (trainer.updater.batches, "draw", "batch"),
        (trainer.updater.algorithm, "forward", f"M-step: {candidates} + 1 flow errors"),
        (trainer.accelerator, "backward", "backward"),
        (trainer.updater.optimizer, "step", adam),
        (trainer.updater.algorithm, "after_step", adam),
    ]
    release(case.device)
    with (
        head(),
        told_apart(trainer.updater.algorithm, clock, candidates),
        ExitStack() as stack,
        peak_memory(case.device) as peak,
    ):
        for owner, name, span in spans:
            stack.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name), span, None)))
        with trainer.display.stage("update", 1) as bar, clock.span("everything else"):
            trainer.updater.update("online", bar)
    return clock.stages(), peak[0]


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """Gives a list that holds the largest memory in use meanwhile, over that at its beginning, in bytes; 0 where
    the system does not tell. On a CPU it is the process's resident memory."""
    found, reset = [0.0], Path("/proc/self/clear_refs")
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        yield found
        found[0] = float(torch.cuda.max_memory_allocated() - before)
    elif not reset.exists():
        yield found
    else:
        reset.write_text("5")  # the peak begins anew: proc(5)
        before = resident("VmRSS")
        yield found
        found[0] = max(0.0, resident("VmHWM") - before)


def resident(name: str) -> float:
    """A figure of this process's memory, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024


# -- the largest update -----------------------------------------------------------------------------------------------


def bench_memory(case: Case) -> Rows:
    """Updates of ever more states, the process held to the card's memory, until one does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    limit = (case.args.card - 1) * GIB  # CUDA's context and kernels take up to one
    rows: Rows = []
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    try:
        for states in sizes(1024):
            found = update_within(case, states)
            rows.append({"B": states, "fits": "yes" if found else "no"} | (found or {}))
            if found is None:
                break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def update_within(case: Case, states: int) -> dict[str, float] | None:
    """Seconds and peak of an update; None when the memory does not suffice."""
    release(case.device)
    try:
        update = Update(case, states)
        update.run(None)
        seconds = sum(update.run(None).values())
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in case.adapter.parameters():
            parameter.grad = None
    peak = torch.cuda.max_memory_reserved() / GIB if case.device == "cuda" else 0.0
    return {"peak GiB": peak, "s": seconds, "states/s": states / seconds}


def sizes(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12 ... up to `most`."""
    size = 1
    while size <= most:
        yield size
        if size > 1 and size * 3 // 2 <= most:
            yield size * 3 // 2
        size *= 2


# -- measuring --------------------------------------------------------------------------------------------------------


def in_turns[T](works: dict[str, Callable[[], T]], case: Case, *, warm: bool = False) -> dict[str, list[T]]:
    """What each gives, one after the other in every round; a round that does not count comes first unless `warm`.

    Whatever takes less than a second runs three times a round.
    """
    taken: dict[str, list[T]] = {name: [] for name in works}
    for turn in range(case.args.rounds + (not warm)):
        for name, work in works.items():
            started = time.perf_counter()
            results = [work()]
            while time.perf_counter() - started < 1 and len(results) < 3:
                results.append(work())
            if warm or turn:
                taken[name] += results
    return taken


def seconds_of(work: Callable[[], Any], case: Case) -> float:
    started = case.now()
    work()
    return case.now() - started


def release(device: str) -> None:
    """Give freed memory back, and forget its peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
