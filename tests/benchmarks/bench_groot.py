"""What GR00T N1.6 costs behind one shared prefix, against the same model without one. `make benchgroot` runs it.

    python tests/benchmarks/bench_groot.py [expected] [sampling] [gradient] [latency] [update] [memory] [--depth 4]
        [--candidates 32] [--horizon 50] [--states 1] [--views 1] [--threads 2] [--device cuda] [--dtype bfloat16]

- expected: FLOPs of the full-size model, counted on the meta device, beside those that its specification gives.
- sampling: N chunks per state by Euler steps. Baselines, both by the plain reading of the specification, one candidate
  per row: features once per candidate, keys and values at every step; and features once per state, all else alike.
- gradient: forward and backward of the flow errors of N candidates per state, against the same two.
- latency: one chunk of one state.
- update: one update of POCO, stage by stage, and the rate of its matrix products beside a large one of the same run.
- memory: the largest batch whose update fits on a card, for each set of weights that may train (CUDA only).

On a CPU every width is the real one, and the stacks have `--depth` of 32 layers of the transformer and about as small a
share of the others'. Variants take turns, so that whatever else runs meets all of them alike. Weights are random, and
the vocabulary and the number of embodiments are small where that changes no time.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import bench_pi05
import torch
import tyro
from bench_pi05 import ACTION_DIM, STATE_DIM, Rows, backward, in_turns, release, seconds_of
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from lerobot_policy_groot_n1d6.adapter import GrootN1d6Adapter
from lerobot_policy_groot_n1d6.adapter_loading import LORA_TARGETS
from lerobot_policy_groot_n1d6.configuration_groot_n1d6 import GrootN1d6Config
from lerobot_policy_groot_n1d6.model import (
    Encoded,
    GrootN1d6,
    GrootSizes,
    Group,
    Memory,
    Tokens,
    random_weights,
)
from lerobot_policy_groot_n1d6.modeling_groot_n1d6 import GrootN1d6Policy
from lerobot_policy_groot_n1d6.processing.steps import ATTENTION_MASK, EMBODIMENT_ID, INPUT_IDS, PIXEL_VALUES, STATE
from lerobot_policy_groot_n1d6.processor_groot_n1d6 import make_groot_n1d6_pre_post_processors
from measure import device_name, table_of, thread_count
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from poco_vla import Lora, flow_errors, integrate

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import plain_groot
from plain_groot import plain_velocity

type Section = Literal["expected", "sampling", "gradient", "latency", "update", "memory"]

SPECIFIED = {1: (2.7, 1.26), 2: (4.1, 1.44), 3: (5.3, 1.61)}
"""Views -> times fewer FLOPs than naive, than feature caching: section 6 of the specification, N 32, H 50, 4 steps."""
LATENCY = {"H100": 77, "H100, backbone": 23, "H100, head": 49, "H100, compiled": 38, "RTX 4090": 82}
"""Published milliseconds for 1 view, 4 steps, H 50, bfloat16."""
SLOT = 10  # of a new embodiment
SMALL_VOCAB, SMALL_SLOTS = 264, SLOT + 1  # bytes and special tokens; no embodiment after ours


@dataclass(frozen=True)
class Args:
    """Measure GR00T N1.6 behind a shared prefix, against the same model without one."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional] = (
        "expected",
        "sampling",
        "gradient",
        "latency",
        "update",
        "memory",
    )
    """What to measure; `memory` needs CUDA and is left out without."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the backbone and of the head's matrix products; None is float32 on a CPU, bfloat16 on a GPU."""
    depth: int | None = None
    """Layers of the transformer, four kinds in turn; None is 4 on a CPU, all 32 on a GPU."""
    states: int | None = None
    """B; None is 1 on a CPU, 64 on a GPU."""
    candidates: int | None = None
    """N; None is 32 on a CPU, 16 on a GPU."""
    horizon: int = 50
    """H. The checkpoints' is 50; a chunk of the recipes is shorter, and is not padded."""
    views: int = 1
    """Pictures of a state, 81 tokens each."""
    rows: int = 32
    """Rows that a baseline takes at once."""
    rounds: int = 3
    """Measurements of each variant, in turns, after one that does not count."""
    threads: int | None = None
    """CPU threads; None is torch's default."""
    clock: Literal["wall", "cpu"] = "wall"
    """"cpu" counts the seconds that this process ran: with one thread, what it would take were nothing else running."""
    card: float = 24.0
    """Memory of the card that `memory` asks about, in GiB; one of them is left to CUDA itself."""
    tiny: bool = False
    """A model of some 0.2 million parameters: shows that everything runs, and nothing else."""
    json: Path | None = None
    """File for the figures."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and keep the figures where asked."""
    args = tyro.cli(Args, args=argv)
    args = replace(args, candidates=args.candidates or (16 if args.device == "cuda" else 32))
    console = Console() if Console().is_terminal else Console(width=140)
    sections: dict[Section, tuple[str, Callable[[Case], Rows]]] = {
        "expected": ("GFLOP of the full-size model per state and candidate, TFLOP of all of a state's", bench_expected),
        "sampling": ("Sampling all candidates", bench_sampling),
        "gradient": ("Gradient of the flow errors of all candidates", bench_gradient),
        "latency": ("One chunk of one state", bench_latency),
        "update": ("One update of POCO", bench_pi05.bench_update),
        "memory": (f"Largest update on a card of {args.card:g} GiB", bench_memory),
    }
    with thread_count(args.threads) if args.threads else nullcontext():
        case = Case.of(args)
        console.print(case.description)
        figures: dict[str, Any] = {"case": case.description, "torch": torch.__version__}
        figures["args"] = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(args).items()}
        for name in args.sections:
            if name == "memory" and args.device == "cpu":
                continue
            title, bench = sections[name]
            rows = bench(case)
            console.print(table_of(title, rows))
            figures[name] = rows
            release(args.device)
    if args.json:
        figures["date"] = datetime.now(UTC).date().isoformat()
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case(bench_pi05.Case):
    """One set of weights, and what is asked of it."""

    args: Any
    adapter: Any

    @classmethod
    def of(cls, args: Any) -> "Case":
        cuda = args.device == "cuda"
        adapter = random_adapter(args)
        states, sizes, config = args.states or (64 if cuda else 1), adapter.policy.sizes, adapter.policy.config
        place = torch.cuda.get_device_name() if cuda else f"{device_name()}, {torch.get_num_threads()} threads"
        counted = "; seconds of CPU time" if args.clock == "cpu" else ""
        description = (
            f"{place}{counted}; torch {torch.__version__}; {config.dtype}; layers: transformer {sizes.head.depth} of "
            f"32, language {sizes.language.depth} of 16, vision {sizes.vision.depth} of 27\n"
            f"B {states}, N {args.candidates}, H {args.horizon}, {adapter.spec.flow_steps} steps; {args.views} views, "
            f"{args.views * view_tokens(args)} image and {text_tokens(args.views)} text tokens"
        )
        return cls(args, adapter, states, description)

    def observations(self, states: int, seed: int = 0) -> dict[str, Any]:
        """Pictures of noise; prompts a few tokens apart, padded on the left, the first as long as in the specification:
        12 words of instruction."""
        args, generator = self.args, torch.Generator().manual_seed(seed)
        views, image = args.views, [self.adapter.policy.sizes.language.image_token] * view_tokens(args)
        ids = torch.randint(5, 200, (states, text_tokens(views) + views * len(image)), generator=generator)
        for view in range(views):  # 31 tokens before the first picture, 7 between two of them, 3 after the last
            start = 31 + view * (len(image) + 7)
            ids[:, start : start + len(image)] = torch.tensor(image)
        side, state_dim = image_side(args), self.adapter.policy.config.max_state_dim
        state = torch.randn((states, 1, state_dim), generator=generator)
        state[..., STATE_DIM:] = 0
        obs = {
            f"{PIXEL_VALUES}cam{i}": torch.rand((states, 3, side, side), generator=generator) * 2 - 1
            for i in range(views)
        }
        obs |= {
            STATE: state,
            EMBODIMENT_ID: torch.full((states,), SLOT),
            INPUT_IDS: ids,
            ATTENTION_MASK: (torch.arange(ids.shape[1]) >= torch.arange(states)[:, None] % 8).long(),
        }
        return {key: value.to(self.device) for key, value in obs.items()}


def image_side(args: Args) -> int:
    return 56 if args.tiny else 252


def view_tokens(args: Args) -> int:
    return (image_side(args) // 28) ** 2


def text_tokens(views: int) -> int:
    return 27 + 7 * views


def sizes_of(args: Args) -> GrootSizes:
    """The full size, or so many layers of it."""
    if args.tiny:
        tiny = GrootSizes.tiny()
        tiny = replace(tiny, head=replace(tiny.head, state_dim=32, max_steps=64, depth=args.depth or 4))
        return replace(tiny, language=replace(tiny.language, vocab=SMALL_VOCAB, image_token=259))
    full = GrootSizes()
    depth = args.depth or (full.head.depth if args.device == "cuda" else 4)
    share = depth / full.head.depth
    vision = replace(full.vision, depth=max(1, round(full.vision.depth * share)))
    language = replace(full.language, depth=max(1, round(full.language.depth * share)))
    head = replace(full.head, depth=depth)
    if args.device == "cpu":
        language = replace(language, vocab=SMALL_VOCAB, image_token=259)
        head = replace(head, num_embodiments=SMALL_SLOTS)
    return GrootSizes(vision, language, head)


def random_adapter(args: Args, lora: Lora | None = None, **options: Any) -> GrootN1d6Adapter:
    """The adapter with random weights."""
    sizes = sizes_of(args)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    images = {f"{OBS_IMAGES}.cam{i}": PolicyFeature(FeatureType.VISUAL, (3, 256, 256)) for i in range(args.views)}
    config = GrootN1d6Config(
        input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        chunk_size=args.horizon,
        n_action_steps=args.horizon,
        max_action_horizon=args.horizon,
        max_state_dim=sizes.head.state_dim,
        max_action_dim=sizes.head.action_dim,
        dtype=dtype,
        compute=dtype,
        sizes=asdict(sizes),
        tokenizer="bytes",
        device=args.device,
        **options,
    )
    with torch.device(args.device):  # a GPU draws the first weights, which do not stay, a hundred times faster
        policy = GrootN1d6Policy(config)
    policy.load_state_dict(random_weights(policy))
    bounds = {"min": -2.0, "max": 2.0, "mean": 0.0, "std": 1.0, "q01": -2.0, "q99": 2.0}
    widths = {OBS_STATE: STATE_DIM, ACTION: ACTION_DIM}
    stats = {key: {name: torch.full((n,), value) for name, value in bounds.items()} for key, n in widths.items()}
    pipelines = make_groot_n1d6_pre_post_processors(config, stats)
    adapter: Any = GrootN1d6Adapter(policy.eval(), pipelines, lora=lora).to(args.device)
    adapter.compute = policy.compute  # where bench_pi05 reads it
    return adapter


# -- the baselines ----------------------------------------------------------------------------------------------------


class Baseline:
    """One candidate per row, by the plain reading of the specification.

    Args:
        case: what is asked.
        obs: B states.
        cached: features and states' tokens once per state, not once per candidate.
        gathered: the embodiment's weights copied for each row at each step, as the original does; without, they are
            sliced once, which says what the rest costs.
    """

    def __init__(self, case: Case, obs: dict[str, Any], *, cached: bool, gathered: bool = False) -> None:
        self.case, self.obs, self.cached, self.gathered = case, obs, cached, gathered
        self.policy, self.head = case.adapter.policy, case.adapter.head

    def groups(self) -> Iterator[tuple[slice, Encoded, torch.Tensor]]:
        """Rows that are taken at once, the features of each of them, and their states' tokens. Lazily: the time of
        encoding is the time of asking."""
        n, total = self.case.args.candidates, self.case.states * self.case.args.candidates
        once = self.encode(self.obs) if self.cached else None
        for start in range(0, total, self.case.args.rows):
            rows = slice(start, min(start + self.case.args.rows, total))
            of_state = torch.arange(rows.start, rows.stop, device=self.case.device) // n
            if once is None:
                obs = {key: value[of_state] for key, value in self.obs.items()}
                yield rows, self.encode(obs), self.token(obs[STATE])
            else:  # tokens of this group's states: a group's backward frees their graph
                first, last = rows.start // n, (rows.stop - 1) // n
                tokens = self.token(self.obs[STATE][first : last + 1])
                yield rows, Encoded(*(tensor[of_state] for tensor in once)), tokens[of_state - first]

    def encode(self, obs: dict[str, Any]) -> Encoded:
        encoded = self.policy.encode(obs)
        return encoded._replace(features=encoded.features.float())

    def token(self, state: torch.Tensor) -> torch.Tensor:
        return self.head.state_tokens(state, SLOT, compute=self.policy.compute)

    def velocity(self, encoded: Encoded, token: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        slots, compute = torch.full((len(x),), SLOT, device=x.device), self.policy.compute
        mixed = torch.autocast(self.case.device, dtype=compute, enabled=compute != torch.float32)
        sliced: AbstractContextManager[Any] = (
            nullcontext() if self.gathered else patch.object(plain_groot, "_linear", _slice)
        )
        unused: Any = None  # the state: its token is at hand
        with mixed, sliced:
            return plain_velocity(self.head, *encoded, unused, x, t, slots, state_token=token).float()

    @torch.no_grad()
    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        flat, steps, samples = noise.flatten(0, 1), self.case.adapter.spec.flow_steps, []
        for rows, encoded, token in self.groups():
            x = flat[rows]
            for k in range(steps):
                x = x + self.velocity(encoded, token, x, x.new_full((len(x),), k / steps)) / steps
            samples.append(x)
        return torch.cat(samples).view(noise.shape)

    def losses(self, chunks: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> Iterator[torch.Tensor]:
        """Shares of the mean flow error, group by group."""
        actions, noise, t = chunks.flatten(0, 1), noise.flatten(0, 1), t.flatten()
        for rows, encoded, token in self.groups():
            time = t[rows, None, None]
            found = self.velocity(encoded, token, (1 - time) * noise[rows] + time * actions[rows], t[rows])
            error = (found - (actions[rows] - noise[rows]))[..., :ACTION_DIM].square()
            yield error.mean(dim=(1, 2)).sum() / len(t)


def _slice(layer: Any, x: torch.Tensor, embodiment: torch.Tensor) -> torch.Tensor:
    """In the place of `plain_groot._linear`: all rows are of one embodiment."""
    weight, bias = (p if layer.W.ndim == 2 else p[SLOT] for p in (layer.W, layer.b))  # the one that trains, or of all
    return x @ weight + bias


# -- what is expected -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Of the matrix products of so many states, candidates and steps of a chunk, counted on the meta device.

    `vision`, `language` and `lm_head` are one state's, `token` all states', all else that of all candidates.
    """

    args: Args
    sizes: GrootSizes
    states: int
    views: int
    horizon: int

    @classmethod
    def full(cls, args: Args, states: int, views: int, horizon: int) -> "Flops":
        return cls(replace(args, tiny=False), GrootSizes(), states, views, horizon)

    @cached_property
    def network(self) -> GrootN1d6:
        return GrootN1d6.empty(self.sizes).eval()  # dropout would have more computed again

    @property
    def candidates(self) -> int:
        return self.args.candidates or 1

    @property
    def tokens(self) -> tuple[int, int]:
        """Of text and of images."""
        return text_tokens(self.views), self.views * view_tokens(self.args)

    @cached_property
    def vision(self) -> int:
        side = image_side(self.args)
        images = [torch.empty(1, 3, side, side, device="meta")] * self.views
        return counted(lambda: self.network.vision_language.image_tokens(images))

    @cached_property
    def language(self) -> int:
        embedded = torch.empty(1, sum(self.tokens), self.sizes.language.width, device="meta")
        model: Any = self.network.vision_language.language_model.model
        plain_causal: Any = {"full_attention": None}
        return counted(lambda: model(inputs_embeds=embedded, attention_mask=plain_causal, use_cache=False))

    @property
    def lm_head(self) -> int:
        """Logits of every token, which nothing needs. The original computes them, our baselines do not."""
        return 2 * sum(self.tokens) * self.sizes.language.width * self.sizes.language.vocab

    @cached_property
    def token(self) -> int:
        return counted(self._token)

    @cached_property
    def kv(self) -> int:
        return counted(self._kv)

    @property
    def plain_kv(self) -> int:
        """The part of `plain_step` that ours has once: keys and values of all tokens, at every step and candidate."""
        head, cross = self.sizes.head, sum(kind != "self" for kind in self.network.action_head.model.kinds)
        return self.states * self.candidates * cross * 4 * sum(self.tokens) * head.context * head.width

    @cached_property
    def step(self) -> int:
        memories, token = self._kv(), self._token()
        return counted(lambda: self._fast(memories, token, one_time=True))

    @cached_property
    def plain_step(self) -> int:
        token = self._token()
        return counted(lambda: self._plain(token))

    def sampling(self, steps: int) -> dict[str, int]:
        features, rows = self.vision + self.language, self.states * self.candidates
        return {
            "ours": self.states * features + self.kv + self.token + steps * self.step,
            "cached": self.states * features + self.token + steps * self.plain_step,
            "naive": rows * features + self.candidates * self.token + steps * self.plain_step,
        }

    def gradients(self) -> dict[str, int]:
        features, rows = self.vision + self.language, self.states * self.candidates
        with torch.enable_grad():
            ours, kept = (counted(partial(self._fast_gradient, recompute)) for recompute in (True, False))
            cached, naive = (counted(partial(self._plain_gradient, copies)) for copies in (1, self.candidates))
        return {
            # Ours makes keys, values and states' tokens twice: with the prefix, and again where gradients are recorded.
            "ours": self.states * features + self.kv + self.token + ours,
            "ours, all kept for backward": self.states * features + self.kv + self.token + kept,
            "cached": self.states * features + cached,
            "naive": rows * features + naive,
        }

    def _fast_gradient(self, recompute: bool) -> None:
        self._fast(self._kv(), self._token(), recompute=recompute).sum().backward()

    def _plain_gradient(self, copies: int) -> None:
        self._plain(self._token(copies)).sum().backward()

    def _token(self, copies: int = 1) -> torch.Tensor:
        state = torch.empty(self.states * copies, 1, self.sizes.head.state_dim, device="meta")
        return self.network.action_head.state_tokens(state, SLOT)

    def _kv(self) -> tuple[Memory, ...]:
        groups = (
            Group(torch.empty(self.states, count, self.sizes.head.context, device="meta"), None)
            for count in self.tokens
        )
        return self.network.action_head.cross_kv(Tokens(*groups))

    def _fast(
        self, memories: tuple[Memory, ...], token: torch.Tensor, *, one_time: bool = False, recompute: bool = False
    ) -> torch.Tensor:
        x = torch.empty(self.states, self.candidates, self.horizon, self.sizes.head.action_dim, device="meta")
        t = torch.empty((1, 1) if one_time else x.shape[:2], device="meta")
        return self.network.action_head.velocity(memories, token, x, t, SLOT, recompute=recompute)

    def _plain(self, token: torch.Tensor) -> torch.Tensor:
        rows, head = self.states * self.candidates, self.sizes.head
        empty: Any = partial(torch.empty, device="meta")
        mask = empty(rows, sum(self.tokens), dtype=torch.bool)
        features, x = empty(rows, sum(self.tokens), head.context), empty(rows, self.horizon, head.action_dim)
        of_rows = token.repeat_interleave(rows // len(token), dim=0)
        unused: Any = None
        with patch.object(plain_groot, "_linear", _slice):
            return plain_velocity(
                self.network.action_head, features, mask, mask, unused, x, empty(rows), unused, state_token=of_rows
            )


def counted(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that run, attention's written out as such."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def bench_expected(case: Case) -> Rows:
    """The full-size model for one state. "As specified" wastes the language model's last layer in both baselines."""
    n, steps, rows = case.args.candidates, GrootSizes().head.flow_steps, []
    for horizon in sorted({50, case.args.horizon}, reverse=True):
        for views in SPECIFIED:
            found = Flops.full(case.args, 1, views, horizon)
            total = found.sampling(steps)
            naive, cached = total["naive"] + n * found.lm_head, total["cached"] + found.lm_head
            row = {
                "views": views,
                "H": horizon,
                "ViT": found.vision / 1e9,
                "LLM": found.language / 1e9,
                "K/V, step": found.plain_kv / n / 1e9,
                "K/V, once": found.kv / 1e9,
                "rest, step": (found.plain_step - found.plain_kv) / n / 1e9,
                "naive": naive / 1e12,
                "cached": cached / 1e12,
                "ours": total["ours"] / 1e12,
                "x naive": naive / total["ours"],
                "x cached": cached / total["ours"],
                "specified": "x{}, x{}".format(*SPECIFIED[views]) if (n, horizon) == (32, 50) else "",
                "no lm_head": "x{:.2f}, x{:.2f}".format(*(total[name] / total["ours"] for name in ("naive", "cached"))),
            }
            rows.append(row)
    return rows


# -- samples ----------------------------------------------------------------------------------------------------------

NAMES = {"cached": "features cached", "gathered": "features cached, weights gathered"}
"""Where a variant's own name is too short. "Gathered" copies the embodiment's weights for each row, as the original
does: no matrix product, and a larger part of all the fewer layers there are."""


@torch.no_grad()
def bench_sampling(case: Case) -> Rows:
    """Time and FLOPs of each way to the same samples; at this depth, and what FLOPs say of the full one."""
    adapter, steps = case.adapter, case.adapter.spec.flow_steps
    obs, (_, noise, _) = case.observations(case.states), case.draws()
    works: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: integrate(adapter, adapter.encode(obs), noise, steps),
        "cached": lambda: Baseline(case, obs, cached=True).sample(noise),
        "naive": lambda: Baseline(case, obs, cached=False).sample(noise),
        "gathered": lambda: Baseline(case, obs, cached=True, gathered=True).sample(noise),
    }
    samples = {name: work() for name, work in works.items()}
    expected = samples["cached"]
    gaps = {name: (sample - expected).abs().max().item() for name, sample in samples.items()}
    seconds = in_turns({name: partial(seconds_of, work, case) for name, work in works.items()}, case, warm=True)
    flops, full = (counted_for.sampling(steps) for counted_for in counts(case))
    return [
        {
            **ratios(name, seconds, flops, full),
            f"off by (of {expected.abs().max():.2g})": gaps[name],
        }
        for name in works
    ]


def counts(case: Case) -> tuple[Flops, Flops]:
    """Of the model that is measured, and of the full-size one."""
    asked = {"states": case.states, "views": case.args.views, "horizon": case.args.horizon}
    return Flops(case.args, case.adapter.policy.sizes, **asked), Flops.full(case.args, **asked)


def ratios(name: str, seconds: dict[str, list[float]], flops: dict[str, int], full: dict[str, int]) -> dict[str, Any]:
    """What is said of a variant beside ours. Gathering is no matrix product: its FLOPs are those of caching."""
    alike = "cached" if name == "gathered" else name
    best = min(seconds[name])
    return {
        "what": NAMES.get(name, name),
        "s": best,
        "s, median": statistics.median(seconds[name]),
        "GFLOP": flops[alike] / 1e9,
        "GFLOP/s": flops[alike] / best / 1e9,
        "x ours, time": best / min(seconds["ours"]),
        "x ours, FLOPs": flops[alike] / flops["ours"],
        "FLOPs at full size": full[alike] / full["ours"],
    }


# -- gradients --------------------------------------------------------------------------------------------------------


def bench_gradient(case: Case) -> Rows:
    """Time, FLOPs and bytes saved for backward of each way to the same loss."""
    adapter, held = case.adapter, []
    obs, draws = case.observations(case.states), case.draws()
    valid = torch.ones(case.states, adapter.spec.horizon, dtype=torch.bool, device=case.device)
    chunks, noise, t = draws
    own_kv = adapter.head.cross_kv

    def recorded(*args: Any, **options: Any) -> Any:
        """A layer that is computed again reads its keys and values in backward, where no hook sees them."""
        memories = own_kv(*args, **options)
        held[:] = [tensor for memory in memories for tensor in (memory.keys, memory.values)]
        return memories

    def ours(recompute: bool) -> Iterator[torch.Tensor]:
        adapter.recompute = recompute
        shared = adapter.encode(obs)
        with patch.object(adapter.head, "cross_kv", recorded):
            yield flow_errors(adapter, shared, chunks, valid, noise=noise, t=t).mean()
        held.clear()
        adapter.recompute = True

    ways: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
        "ours": partial(ours, True),
        "ours, all kept for backward": partial(ours, False),
        "cached": lambda: Baseline(case, obs, cached=True).losses(*draws),
        "naive": lambda: Baseline(case, obs, cached=False).losses(*draws),
        "gathered": lambda: Baseline(case, obs, cached=True, gathered=True).losses(*draws),
    }
    parameters = list(adapter.policy.parameters())
    works = {
        name: partial(backward, way, parameters, held if name == "ours" else [], case) for name, way in ways.items()
    }
    works = {name: work for name, work in works.items() if fits(work, case)}
    found = in_turns(works, case, warm=True)
    for parameter in parameters:
        parameter.grad = None
    seconds = {name: [one["seconds"] for one in every] for name, every in found.items()}
    saved = {name: every[-1] for name, every in found.items()}
    flops, full = (counted_for.gradients() for counted_for in counts(case))
    own_bytes, own_loss = saved["ours"]["bytes"], saved["ours"]["loss"]
    rows: Rows = [
        ratios(name, seconds, flops, full)
        | {"saved MB": saved[name]["bytes"] / 1e6}
        | ({"peak MB": saved[name]["peak"] / 1e6} if case.device == "cuda" else {})
        | {"x ours, saved": saved[name]["bytes"] / own_bytes, "loss, off by": abs(saved[name]["loss"] / own_loss - 1)}
        for name in works
    ]
    rows += [{"what": f"{NAMES.get(name, name)}: does not fit"} for name in ways if name not in works]
    if kept := saved.get("ours, all kept for backward"):
        layer = (kept["bytes"] - own_bytes) / adapter.policy.sizes.head.depth
        with_layer = {"saved MB": (own_bytes + layer) / 1e6, "x ours, saved": 1 + layer / own_bytes}
        rows.append({"what": "ours, and the layer that backward has in hand"} | with_layer)
    return rows


def fits(work: Callable[[], Any], case: Case) -> bool:
    """Whether it runs; the first run counts for nothing else."""
    try:
        work()
    except torch.OutOfMemoryError:
        return False
    finally:
        release(case.device)
    return True


# -- one chunk, and the largest update --------------------------------------------------------------------------------


@torch.no_grad()
def bench_latency(case: Case) -> Rows:
    """What a robot waits for, once its frames are processed: no compiling, no graph."""
    adapter, steps = case.adapter, case.adapter.spec.flow_steps
    obs = case.observations(1)
    noise = torch.randn(1, 1, adapter.spec.horizon, adapter.spec.width, device=case.device)
    prefix = adapter.encode(obs)
    works: dict[str, Callable[[], Any]] = {
        "vision-language model": lambda: adapter.policy.encode(obs),
        "prefix: that, keys and values": lambda: adapter.encode(obs),
        f"head: {steps} steps": lambda: integrate(adapter, prefix, noise, steps),
        "all": lambda: integrate(adapter, adapter.encode(obs), noise, steps),
    }
    times = in_turns({name: partial(seconds_of, work, case) for name, work in works.items()}, case)
    rows: Rows = [
        {"what": name, "ms": min(took) * 1e3, "ms, median": statistics.median(took) * 1e3}
        for name, took in times.items()
    ]
    if case.device == "cuda":
        rows += [{"what": f"published, {name}", "ms": float(ms)} for name, ms in LATENCY.items()]
    return rows


def bench_memory(case: Case) -> Rows:
    """The largest batch for each set of weights that may train."""
    sets: dict[str, dict[str, Any]] = {
        "head": {},
        "head without the embodiments' networks": {"tune_embodiment_encoders": False},
        "LoRA of rank 16": {"lora": Lora(LORA_TARGETS)},
    }
    rows: Rows = []
    case.adapter.to("cpu")  # only what trains lies on the card
    try:
        for name, options in sets.items():
            adapter = random_adapter(case.args, **options)
            trains = sum(p.numel() for p in adapter.parameters() if p.requires_grad) / 1e6
            found = bench_pi05.bench_memory(replace(case, adapter=adapter))
            rows += [{"trains": f"{name}, {trains:,.0f} million"} | row for row in found]
            del adapter
            gc.collect()
    finally:
        case.adapter.to(case.device)
    return rows


if __name__ == "__main__":
    main()
