"""FLOPs, bytes, kernel launches and peak memory of one update of POCO at full size, counted without a GPU.

    python tests/benchmarks/bench_counts.py [pi05] [pi05_cold] [pi05_cold_bf16] [groot] [groot_cold] [mlp] [--check]

The update runs on tensors that have a shape, a dtype and no numbers (torch's FakeTensorMode), by the code that a GPU
runs: attention and RMS norm count as one kernel each, every other operator as one, views as none. The rooflines are
estimates, not measurements: a kernel takes the longer of its FLOPs and its bytes at a GPU's rates, on one stream, the
host ahead of it by the launches. "ideal" takes the best rates that such kernels reach, "eager" three quarters of them
and 8 us of the host for each launch. Sizes: 64 states, 16 candidates, chunks of 10 steps, 10 flow steps, two cameras,
572 tokens of pi0.5; of the MLP 256 states, 32 candidates, 5 steps (the paper's in simulation).

`--keep` writes the counts to results/counts.json; `--check` fails where they exceed the bounds.
"""

import json
import math
import sys
import time
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import torch
import tyro
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import (
    ACTION,
    OBS_IMAGES,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from poco_vla import ChunkBatch, GlobalBatchRNG, Poco, PocoConfig, dense, flow
from poco_vla import policy as sampling

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_cuda import apply_to_fakes

KEPT = Path(__file__).parent / "results" / "counts.json"
BOUNDS = {
    "pi05": {"ideal": 0.335, "eager": 0.45, "launches": 21_000},
    "pi05_cold": {"eager": 1.37},
    "pi05_cold_bf16": {"eager": 1.25},
    "groot": {"peak": 24.1e9},
}
"""Most seconds on an H200, launches and bytes of an update, a hair above what was counted: a regression is seen."""
RATES = {
    "H200": {"bf16": 790e12, "tf32": 400e12, "fp32": 67e12, "bytes": 4.3e12},
    "A100 80 GB": {"bf16": 280e12, "tf32": 140e12, "fp32": 19.5e12, "bytes": 1.8e12},
    "RTX 4090": {"bf16": 150e12, "tf32": 75e12, "fp32": 75e12, "bytes": 0.95e12},
}
"""FLOP and bytes per second that large kernels reach at best."""
EAGER = 0.75
LAUNCH = {"ideal": 4e-6, "eager": 8e-6}
"""Seconds of the host for a launch."""
LEAST = {"ideal": 1.5e-6, "eager": 2.5e-6}
"""Seconds of the shortest kernel."""
NO_KERNEL = {
    *("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"),
    *("aten::new_empty_strided", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_reshape_alias"),
    *("aten::set_", "aten::_local_scalar_dense", "aten::is_pinned", "aten::resize_", "aten::is_same_size"),
    *("aten::record_stream", "prim::device"),
}
"""Operators without a kernel, beside views."""

ON_HOST = {"time_code"}
"""Functions whose numbers the host has: on a GPU nothing waits there."""

type Name = Literal["pi05", "pi05_cold", "pi05_cold_bf16", "groot", "groot_cold", "mlp"]


@dataclass
class Kernel:
    phase: str
    flops: int
    kind: str
    num_bytes: int
    launches: int
    waits: bool = False


class KernelCounter(TorchDispatchMode):
    """Note every kernel of what runs inside, and the memory of all tensors.

    Args:
        answers: what the host is told where it asks for a number, by the asking function; called where it can be.
    """

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__()
        self.answers, self.kernels, self.phase = answers, [], "other"
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    @contextmanager
    def within(self, phase: str) -> Any:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def note(self, flops: int, kind: str, tensors: Any) -> None:
        self.kernels.append(Kernel(self.phase, flops, kind, sum(map(touched, tensors)), 1))

    def hold(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // 512) * 512
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::_local_scalar_dense" and isinstance(args[0], FakeTensor):
            where, answer = self._answer()
            if where not in ON_HOST:
                self.kernels.append(Kernel(self.phase, 0, "", 0, 0, waits=True))
            return answer
        out = func(*args, **kwargs)
        outs = [o for o in tree_leaves(out) if isinstance(o, torch.Tensor)]
        for one in outs:
            self.hold(one)
        if (func.is_view or name in NO_KERNEL) and name != "aten::_to_copy":
            return out
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        flops, kind, count = 0, "", flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = int(count(*args, **kwargs, out_val=out))
            kind = precision_of(next(t for t in ins if t.is_floating_point()))
        distinct = {id(t): t for t in (*ins, *outs)}.values()
        launches = 1
        if name.startswith("aten::_foreach") or "fused_adam" in name:  # many tensors in one launch, some 30
            launches = max(1, -(-len(args[0]) // 30))
            distinct = [t for t in ins if t.numel()] * (2 if "fused_adam" in name else 1)
        self.kernels.append(Kernel(self.phase, flops, kind, sum(map(touched, distinct)), launches))
        return out

    def _answer(self) -> tuple[str, Any]:
        frame = sys._getframe(2)
        while frame is not None:
            where = frame.f_code.co_name
            if where in self.answers:
                answer = self.answers[where]
                return where, answer() if callable(answer) else answer
            frame = frame.f_back
        raise AssertionError("the host asks for a number that nobody knows")


def touched(tensor: torch.Tensor) -> int:
    """Return the bytes that a kernel reads or writes: those of a broadcast axis once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def precision_of(tensor: torch.Tensor) -> str:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"


# -- kernels that a CPU has not ---------------------------------------------------------------------------------------


class OneKernel(torch.autograd.Function):
    """Stand for a fused kernel: the shapes of its result and gradients, counted once each."""

    @staticmethod
    def forward(ctx: Any, counter: KernelCounter, flops: int, width: int, first: Any, *rest: Any) -> Any:
        tensors = (first, *rest)
        ctx.save_for_backward(*tensors)
        ctx.counter, ctx.flops = counter, flops
        out = torch.empty((*first.shape[:-1], width), dtype=first.dtype)
        counter.note(flops, precision_of(first), (*tensors, out))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = ctx.saved_tensors
        gradients = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
        ctx.counter.note(int(2.5 * ctx.flops), precision_of(gradient), (gradient, *tensors, *gradients))
        return None, None, None, *gradients


@contextmanager
def gpu_kernels(counter: KernelCounter) -> Any:
    """Count attention and RMS norm as one kernel, and run the code that adapters have for a GPU."""
    from lerobot_policy_groot_n1d6.model import tokens
    from poco_vla_pi05 import expert, prefix

    def attention(q: Any, k: Any, v: Any, mask: Any = None, *_: Any, **__: Any) -> Any:
        flops = 2 * q.shape[:-1].numel() * k.shape[-2] * (k.shape[-1] + v.shape[-1])
        return OneKernel.apply(counter, flops, v.shape[-1], q, k, v)

    def rms_norm(x: Any, *_: Any, **__: Any) -> Any:
        return OneKernel.apply(counter, 0, x.shape[-1], x)

    def integrate(policy: Any, prefix: Any, noise: Any, steps: int) -> Any:
        """All Euler steps after the first, which may keep what it makes, are one: it is counted as often as it is."""
        x = flow.integrate(policy, prefix, noise, 1)
        begin = len(counter.kernels)
        x = flow.integrate(policy, prefix, x, 1)
        counter.kernels += counter.kernels[begin:] * (steps - 2)
        return x

    with ExitStack() as stack:
        stack.enter_context(patch.object(sampling, "integrate", integrate))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(patch.object(F, "rms_norm", rms_norm))
        stack.enter_context(patch.object(expert, "_norm", expert.fused_norm))
        stack.enter_context(patch.object(torch.nn.Module, "_apply", apply_to_fakes))
        stack.enter_context(patch.object(dense, "CPU_ROWS", sys.maxsize))
        stack.enter_context(patch.object(dense, "_slow_mkl", lambda: False))
        for module in (prefix, tokens):
            stack.enter_context(patch.object(module, "tile_on", lambda device: 64))
        yield


# -- the models --------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """What is counted.

    Attributes:
        policy: at full size, without numbers.
        obs: processed observations of n states.
        prefix: what the store has of n states, put together; None encodes them.
        layer: object and name of what checkpointing recomputes.
        states: of a batch.
        candidates: of a state.
    """

    policy: Any
    obs: Any
    prefix: Any = None
    layer: tuple[Any, str] | None = None
    states: int = 64
    candidates: int = 16
    answers: dict[str, Any] = field(default_factory=dict)


def in_turn(*values: int) -> Any:
    """Return a function that returns one of the values after the other, again and again."""
    endless = cycle(values)
    return lambda: next(endless)


def features(cameras: int = 2) -> dict[str, Any]:
    images = {f"{OBS_IMAGES}.cam{i}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for i in range(cameras)}
    return {
        "input_features": images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (7,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (6,))},
        "chunk_size": 10,
        "n_action_steps": 10,
    }


def pi05(*, cold: bool, vision: torch.dtype = torch.float32) -> Model:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from poco_vla_pi05 import expert
    from poco_vla_pi05.adapter import Pi05
    from poco_vla_pi05.architecture import Architecture, empty_policy
    from poco_vla_pi05.checkpoint import drop_language_heads, frozen_dtype

    config = PI05Config(**features(), dtype="bfloat16", device="cpu")
    with _disable_current_modes():
        policy = empty_policy(config, Architecture())
        drop_language_heads(policy)
    weights = {}
    for name, p in policy.named_parameters():
        dtype = torch.float32 if Pi05.in_head(name) else frozen_dtype(name, torch.bfloat16, vision)
        weights[name] = torch.empty(p.shape, dtype=dtype)
    policy.load_state_dict(weights, strict=False, assign=True)
    for module in policy.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    adapter = Pi05(policy).eval()

    def obs(n: int) -> dict[str, Any]:
        return {key: torch.empty(n, 3, 224, 224) for key in config.image_features} | {
            OBS_STATE: torch.empty(n, 7),
            OBS_LANGUAGE_TOKENS: torch.zeros(n, 200, dtype=torch.long),
            OBS_LANGUAGE_ATTENTION_MASK: torch.zeros(n, 200, dtype=torch.bool),
        }

    def prefix(n: int) -> Any:
        kv = [torch.empty(18, 2, 572 - i % 8, 256, dtype=torch.bfloat16) for i in range(n)]
        return adapter.unpack([{"features": torch.empty(2055), "kv": one} for one in kv])

    answers = {"_without_padding": in_turn(565, 572)}
    return Model(adapter, obs, None if cold else prefix, (expert, "_layer"), answers=answers)


def groot(*, cold: bool) -> Model:
    from lerobot_policy_groot_n1d6.adapter import GrootN1d6Adapter
    from lerobot_policy_groot_n1d6.configuration_groot_n1d6 import GrootN1d6Config
    from lerobot_policy_groot_n1d6.model import transformer
    from lerobot_policy_groot_n1d6.model.embodiment import CategoryLinear
    from lerobot_policy_groot_n1d6.modeling_groot_n1d6 import GrootN1d6Policy
    from lerobot_policy_groot_n1d6.processing import steps
    from lerobot_policy_groot_n1d6.processor_groot_n1d6 import make_groot_n1d6_pre_post_processors

    tokenizer = {"tokenizer": "bytes", "byte_ids": list(range(151_660, 151_666))}
    config = GrootN1d6Config(**features(), max_action_horizon=10, **tokenizer, device=None)
    config.device = None
    bounds = {"min": -2.0, "max": 2.0, "mean": 0.0, "std": 1.0, "q01": -2.0, "q99": 2.0}
    with _disable_current_modes():
        sizes = ((OBS_STATE, 7), (ACTION, 6))
        stats = {key: {name: torch.full((size,), value) for name, value in bounds.items()} for key, size in sizes}
        pipelines = make_groot_n1d6_pre_post_processors(config, stats)
        with torch.device("meta"):
            policy = GrootN1d6Policy(config)
    for module in policy.modules():
        for name, p in module._parameters.items():
            if p is not None:
                made = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    adapter = GrootN1d6Adapter(policy, pipelines)
    for module in policy.modules():
        if isinstance(module, CategoryLinear) and module._all is not None:
            module._all.tensors.clear()  # they wait in main memory, which is not counted
    side, images, rows = 252, 162, {}

    def obs(n: int) -> dict[str, Any]:
        rows["n"] = n
        return {f"{steps.PIXEL_VALUES}.cam{i}": torch.empty(n, 3, side, side) for i in range(2)} | {
            steps.STATE: torch.empty(n, 1, 128),
            steps.EMBODIMENT_ID: torch.zeros(n, dtype=torch.long),
            steps.INPUT_IDS: torch.zeros(n, images + 40, dtype=torch.long),
            steps.ATTENTION_MASK: torch.ones(n, images + 40, dtype=torch.long),
        }

    def prefix(n: int) -> Any:
        made = {"dtype": torch.bfloat16}
        return adapter.unpack(
            [
                {
                    "features": torch.empty(2055),
                    "text": torch.empty(40 - i % 8, 2048, **made),
                    "image": torch.empty(images, 2048, **made),
                    "state": torch.empty(128),
                }
                for i in range(n)
            ]
        )

    answers = {
        "sort_tokens": in_turn(33, 40, images, images),
        "_causal": False,
        "time_code": math.log(10_000),
        "encode": lambda: rows["n"] * images,
    }
    return Model(adapter, obs, None if cold else prefix, (transformer.Block, "forward"), answers=answers)


def mlp() -> Model:
    from lerobot_policy_flow_mlp.adapter import FlowMlp
    from lerobot_policy_flow_mlp.configuration_flow_mlp import FlowMlpConfig
    from lerobot_policy_flow_mlp.modeling_flow_mlp import FlowMlpPolicy

    config = FlowMlpConfig(
        input_features={OBS_STATE: PolicyFeature(FeatureType.STATE, (28,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (5,))},
        chunk_size=5,
        n_action_steps=5,
        hidden_dims=[512] * 4,
        num_inference_steps=10,
        device="cpu",
    )
    adapter = FlowMlp(FlowMlpPolicy(config), None, None)
    adapter._looks_raw = lambda state: False  # of a GPU's tensors nobody asks
    return Model(adapter, lambda n: {OBS_STATE: torch.empty(n, 28)}, states=256, candidates=32)


MODELS: dict[str, Any] = {
    "pi05": lambda: pi05(cold=False),
    "pi05_cold": lambda: pi05(cold=True),
    "pi05_cold_bf16": lambda: pi05(cold=True, vision=torch.bfloat16),
    "groot": lambda: groot(cold=False),
    "groot_cold": lambda: groot(cold=True),
    "mlp": mlp,
}


# -- counting ----------------------------------------------------------------------------------------------------------


def count(name: str) -> dict[str, Any]:
    """Return the kernels of an update, summed by phase, and seconds of it on each GPU."""
    counter = KernelCounter({})
    with FakeTensorMode(allow_non_fake_inputs=True), counter, gpu_kernels(counter):
        model = MODELS[name]()
        counter.answers = model.answers
        config = PocoConfig(num_candidates=model.candidates, eta=0.001, zeta=0.01)
        poco = Poco(model.policy, config, GlobalBatchRNG(torch.Generator()))
        optimizer = torch.optim.Adam(
            [{"params": group["params"], "lr": group["lr"]} for group in poco.parameter_groups()], fused=True
        )
        for group in optimizer.param_groups:  # makes the moments
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.zero_grad()
        counter.kernels.clear()
        held = counter.peak = counter.live
        with phases(counter, poco, model.layer):
            update(counter, model, poco, optimizer)
    return figures(counter, held)


def update(counter: KernelCounter, model: Model, poco: Poco, optimizer: torch.optim.Optimizer) -> None:
    n, spec = model.states, poco.policy.spec
    flags = {key: torch.ones(n, dtype=torch.bool) for key in ("is_demo", "is_success")}
    states: dict[str, Any] = {"obs": {}, "next_obs": {}}
    if model.prefix is None:
        states = {key: model.obs(n) for key in states}
    else:
        with counter.within("unpack"):
            states |= {key: model.prefix(n) for key in ("prefix", "next_prefix")}
    batch = ChunkBatch(
        actions=torch.empty(n, spec.horizon, spec.width),
        valid=torch.ones(n, spec.horizon, dtype=torch.bool),
        returns=torch.zeros(n),
        discount=torch.zeros(n),
        **flags,
        **states,
    )
    loss, _ = poco(batch, "online", poco.draw_noise(batch, "online"))
    with counter.within("backward"):
        loss.backward()
    with counter.within("optimizer"):
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], float("inf"), foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        poco.after_step("online")


@contextmanager
def phases(counter: KernelCounter, poco: Poco, layer: tuple[Any, str] | None) -> Any:
    """Give the kernels of an update the names of its parts."""

    def named(target: Any, method: str, phase: Any) -> Any:
        own = getattr(target, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with counter.within(phase(*args)):
                return own(*args, **kwargs)

        return patch.object(target, method, call)

    def sampled(prefix: Any, noise: Any) -> str:
        return "E-step" if noise.shape[1] > 1 else "bootstrap sample"

    with ExitStack() as stack:
        stack.enter_context(named(poco.policy, "encode", lambda *_: "encode"))
        stack.enter_context(named(poco, "_propose", sampled))
        stack.enter_context(named(poco, "_flow_errors", lambda *_: "M-step forward"))
        if layer is not None:
            again = lambda *_: "recompute" if counter.phase == "backward" else counter.phase  # noqa: E731
            stack.enter_context(named(*layer, again))
        yield


def figures(counter: KernelCounter, held: int) -> dict[str, Any]:
    parts: dict[str, Counter[str]] = {}
    for kernel in counter.kernels:
        part = parts.setdefault(kernel.phase, Counter())
        part["launches"] += kernel.launches
        part["bytes"] += kernel.num_bytes
        part["waits"] += kernel.waits
        if kernel.flops:
            part[kernel.kind] += kernel.flops
    seconds = {gpu: {way: estimate(counter.kernels, rates, way) for way in LAUNCH} for gpu, rates in RATES.items()}
    return {
        "phases": parts,
        "launches": sum(kernel.launches for kernel in counter.kernels),
        "waits": sum(kernel.waits for kernel in counter.kernels),
        "held": held,
        "peak": counter.peak,
        "seconds": seconds,
    }


def estimate(kernels: list[Kernel], rates: dict[str, float], way: str) -> float:
    """Return the seconds of kernels on one stream, the host ahead of it until it has to wait."""
    share = 1.0 if way == "ideal" else EAGER
    host = gpu = 0.0
    for kernel in kernels:
        if kernel.waits:
            host = max(host, gpu)
        host += LAUNCH[way] * kernel.launches
        if kernel.launches:
            flops = kernel.flops / (share * rates[kernel.kind]) if kernel.flops else 0.0
            gpu = max(gpu, host) + max(flops, kernel.num_bytes / (share * rates["bytes"]), LEAST[way])
    return max(host, gpu)


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['launches']:,} launches, the host waits {found['waits']} times,", end=" ")
    print(f"{found['held'] / 1e9:.1f} GB held, {found['peak'] / 1e9:.1f} GB at most")
    for phase, part in found["phases"].items():
        flops = ", ".join(f"{part[kind] / 1e12:.3f} TFLOP {kind}" for kind in ("bf16", "tf32", "fp32") if part[kind])
        print(f"  {phase:18s} {part['launches']:7,} launches  {part['bytes'] / 1e9:8.1f} GB  {flops}")
    for gpu, seconds in found["seconds"].items():
        print(f"  {gpu}: {seconds['ideal']:.3f} s ideal, {seconds['eager']:.3f} s eager (estimates)")


def exceeded(name: str, found: dict[str, Any]) -> list[str]:
    """Return the bounds that counts exceed, one text each."""
    values = found["seconds"]["H200"] | {"launches": found["launches"], "peak": found["peak"]}
    bounds = BOUNDS.get(name, {})
    return [f"{name}: {key} is {values[key]:.4g}, at most {most}" for key, most in bounds.items() if values[key] > most]


@dataclass(frozen=True)
class Args:
    """Count an update."""

    models: Annotated[tuple[Name, ...], tyro.conf.Positional] = (
        "pi05",
        "pi05_cold",
        "pi05_cold_bf16",
        "groot",
        "groot_cold",
        "mlp",
    )
    """What to count; `_cold` encodes its states, the others take prefixes out of the store."""
    keep: bool = False
    """Write the counts to results/counts.json."""
    check: bool = False
    """Fail where they exceed the bounds."""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = tyro.cli(Args, args=argv)
    found, wrong = {}, []
    for name in args.models:
        begin = time.monotonic()
        found[name] = count(name)
        show(name, found[name])
        print(f"  counted in {time.monotonic() - begin:.0f} s", flush=True)
        wrong += exceeded(name, found[name])
        if args.keep:
            kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
            kept[name] = found[name] | {"date": datetime.now(UTC).date().isoformat()}
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(wrong))
    if args.check and wrong:
        raise SystemExit(1)
    return found


if __name__ == "__main__":
    main()
